"""How the proxy gets a call's activations: out of the worker's spool where that is in sight, else over HTTP."""

import asyncio
import logging
import shutil
import socket
import uuid
from contextlib import nullcontext

import aiohttp
import httpx
import numpy as np
import pytest
from starlette.responses import Response

from episodes.errors import CaptureLost, WorkerFailed
from episodes.wire import CAPTURE_HEADER, CallFile, Capture
from proxy import backend as backends
from proxy.backend import Backend
from tests.proxy.scripted import Scripted, chunk, head
from tests.stub import MODEL, Running, Stub, rows
from worker.server import Routes
from worker.spool import spooled


def ask(url, n=1):
    """A captured call; its id."""
    call = f"c-{uuid.uuid4().hex}"
    body = {"model": MODEL, "prompt": "Hi", "n": n}
    httpx.post(f"{url}/v1/completions", json=body, headers={CAPTURE_HEADER: Capture(call).header()}).raise_for_status()
    return call


def claim(url, calls, tmp_path, min_free_bytes=0, **options):
    """The files of these calls, claimed one after the other by one backend."""

    async def claiming():
        async with aiohttp.ClientSession(auto_decompress=False) as session:
            backend = Backend(url, session, claim_timeout_s=5, **options)
            for call in calls:
                await backend.claim(call, tmp_path / call, min_free_bytes)

    asyncio.run(claiming())
    return [tmp_path / call for call in calls]


def check(path, n=1):
    file = CallFile(path)
    assert len(file.sequences) == n
    for sequence in file.sequences:
        assert np.array_equal(file.rows[file.choice == sequence.choice], rows(sequence.tokens.tolist(), file.points))


def test_a_worker_on_the_same_file_system_gives_its_own_file(stub, tmp_path):
    calls = [ask(stub.url), ask(stub.url, n=2)]
    one, two = claim(stub.url, calls, tmp_path)
    assert one.samefile(spooled(tmp_path / "spool", calls[0], 0))
    check(one)
    check(two, n=2)


def test_a_spool_mounted_at_another_path_is_found_by_the_option(stub, tmp_path):
    """As in a container: the worker's name of its directory means nothing here, the volume is at `mnt`."""
    mounted = tmp_path / "mnt"
    mounted.symlink_to(tmp_path)
    calls = [ask(stub.url)]
    (one,) = claim(stub.url, calls, tmp_path, spool_dir=mounted)
    assert one.samefile(spooled(tmp_path / "spool", calls[0], 0))
    check(one)


@pytest.mark.parametrize("n", [1, 2])
def test_a_spool_out_of_sight_is_claimed_over_http(stub, tmp_path, caplog, n):
    """And it is said once that what was given is not the spool."""
    calls = [ask(stub.url, n), ask(stub.url, n)]
    with caplog.at_level(logging.INFO, "tautap.proxy"):
        files = claim(stub.url, calls, tmp_path, spool_dir=tmp_path / "nowhere")
    for path, call in zip(files, calls, strict=True):
        assert not path.samefile(spooled(tmp_path / "spool", call, 0))
        check(path, n)
    (said,) = [r for r in caplog.records if "over HTTP" in r.getMessage()]
    assert said.levelname == "WARNING" and "nowhere/spool" in said.getMessage()


def test_what_the_worker_does_not_have_is_lost_with_its_reason(stub, tmp_path):
    with pytest.raises(CaptureLost, match="no captured call has this id"):
        claim(stub.url, ["c-nobody"], tmp_path)


async def endless(came, out):
    """A reply that has no end, of JSON unless a call file is asked for."""
    out.write(head("application/json", None) if "recipe" in came.path else head("application/octet-stream", None))
    while True:
        out.write(chunk(bytes(1 << 18)))
        await out.drain()


async def huge(came, out):
    """A reply that says that it is larger than any disk."""
    out.write(head("application/octet-stream", 1 << 60))
    await endless(came, out)


@pytest.mark.parametrize(("send", "most"), [(endless, 256 << 20), (huge, 0)])
def test_a_claim_ends_where_it_would_leave_the_disk_too_little(tmp_path, send, most):
    """As on a full disk, for another time: what a worker sends has no limit, and what it announces none either."""
    free = shutil.disk_usage(tmp_path).free

    async def claiming(url):
        async with aiohttp.ClientSession() as session:
            backend = Backend(url, session, claim_timeout_s=5)
            backend._in_sight = False  # as of a spool that is not in sight
            await backend.claim("c-1", tmp_path / "c-1", free - (16 << 20))

    with Scripted(send) as worker, pytest.raises(OSError, match="--min-free-bytes is"):
        asyncio.run(asyncio.wait_for(claiming(worker.url), 30))
    assert (tmp_path / "c-1").stat().st_size <= most


def test_a_copy_out_of_the_spool_leaves_the_disk_as_much_and_a_link_takes_nothing(stub, tmp_path):
    one, two = [ask(stub.url), ask(stub.url, n=2)]
    (linked,) = claim(stub.url, [one], tmp_path, min_free_bytes=1 << 60)
    check(linked)
    with pytest.raises(OSError, match="--min-free-bytes is"):
        claim(stub.url, [two], tmp_path, min_free_bytes=1 << 60)
    assert not (tmp_path / two).exists()


def test_what_a_worker_says_of_itself_is_not_held_in_memory_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(backends, "REPLY_LIMIT", 1 << 20)

    async def asking(url):
        async with aiohttp.ClientSession() as session:
            backend = Backend(url, session)
            assert (await backend.metrics(), await backend.waiting()) == (b"", [])
            with pytest.raises(WorkerFailed, match="its reply is longer than 1,048,576 bytes"):
                await backend.claim("c-1", tmp_path / "c-1")

    with Scripted(endless) as worker:
        asyncio.run(asyncio.wait_for(asking(worker.url), 30))


def test_a_worker_that_cannot_say_yet_what_it_is_is_not_taken_for_one_that_is_not_ours(tmp_path, monkeypatch):
    """As behind a balancer while it starts: it is asked again, and recorded."""
    said, asked = Routes.capabilities, []

    async def late(routes, request):
        asked.append(request)
        return await said(routes, request) if len(asked) > 1 else Response(status_code=503)

    async def asking(url):
        async with aiohttp.ClientSession() as session:
            backend = Backend(url, session)
            assert await backend.capabilities() is None and not backend.foreign
            return await backend.capabilities()

    monkeypatch.setattr(Routes, "capabilities", late)
    with Running(Stub(tmp_path / "spool")) as worker:
        assert asyncio.run(asking(worker.url)).model == MODEL


@pytest.fixture
def silent():
    """A worker that is stopped: it lets one connect, and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as worker:
        yield f"http://127.0.0.1:{worker.getsockname()[1]}"


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (Backend.capabilities, None),
        (Backend.waiting, []),
        (lambda backend: backend.forget("c-1"), None),
        (lambda backend: backend.holds("c-1"), None),
    ],
)
def test_a_worker_that_does_not_answer_is_not_waited_for(silent, monkeypatch, ask, said):
    monkeypatch.setattr(backends, "HEALTH_S", 0.1)

    async def asking():
        async with aiohttp.ClientSession() as session:
            return await ask(Backend(silent, session))

    assert asyncio.run(asyncio.wait_for(asking(), 5)) == said


def test_what_a_worker_does_not_hear_to_forget_it_is_told_with_the_next(stub, monkeypatch):
    """As over a network that was down for longer than it is tried."""
    calls = [ask(stub.url), ask(stub.url)]
    request, n = aiohttp.ClientSession.request, 0

    def fails_at_first(session, method, *args, **kwargs):
        nonlocal n
        n += method == "DELETE"
        if method == "DELETE" and n <= 3:
            raise aiohttp.ClientConnectionError
        return request(session, method, *args, **kwargs)

    async def forgetting():
        async with aiohttp.ClientSession() as session:
            backend, held = Backend(stub.url, session), []
            for call in calls:
                await backend.forget(call)
                held.append([held.call for held in await backend.waiting()])
            return held

    monkeypatch.setattr(backends, "RETRY_S", 0.01)
    monkeypatch.setattr(aiohttp.ClientSession, "request", fails_at_first)
    assert asyncio.run(forgetting()) == [calls, []] and n == 5


def test_a_claim_that_is_not_answered_is_lost_when_its_time_is_over(silent, tmp_path):
    """And does not keep those behind it waiting."""

    async def claiming():
        async with aiohttp.ClientSession() as session:
            await Backend(silent, session, claim_timeout_s=0.1).claim("c-1", tmp_path / "c-1")

    with pytest.raises(CaptureLost, match="the worker did not answer"):
        asyncio.run(asyncio.wait_for(claiming(), 5))


@pytest.mark.parametrize("breaks_off", [False, True])
def test_the_time_for_a_claim_is_that_for_its_answer_to_begin(tmp_path, breaks_off):
    """Activations on their way are not cut off when it is over; where they break off, they are not asked for again."""
    given, limit_s, n = b"x" * 50, 0.1, 0

    async def send(came, out):
        nonlocal n
        n += 1
        out.write(head("application/octet-stream", len(given)))
        for i in range(len(given) // 2 if breaks_off else len(given)):
            out.write(given[i : i + 1])
            await asyncio.sleep(3 * limit_s / len(given))
        out.close()

    async def claiming(url):
        async with aiohttp.ClientSession() as session:
            await Backend(url, session, claim_timeout_s=limit_s).claim("c-1", tmp_path / "c-1")

    with Scripted(send) as worker, pytest.raises(CaptureLost) if breaks_off else nullcontext():
        asyncio.run(asyncio.wait_for(claiming(worker.url), 5))
    assert n == 1 and (breaks_off or (tmp_path / "c-1").read_bytes() == given)
