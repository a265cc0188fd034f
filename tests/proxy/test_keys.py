"""Who may talk to the proxy, and what it says to the worker."""

import logging
import ssl
import subprocess

import httpx
import openai
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from episodes.access import loopback
from episodes.errors import BadInput, WorkerFailed
from proxy.__main__ import cli
from proxy.config import TLS
from proxy.keys import Keys, api_keys, backend_key, parse
from tests.conftest import proxy_to
from tests.proxy.test_server import committed
from tests.stub import MODEL, Running, Stub

ALICE, BOB, INNER = "alice-key-0123456789", "bob-key-0123456789", "inner-key-0123456789"
BODY = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture
def locked(stub, tmp_path):
    with proxy_to(stub.url, tmp_path / "data", keys=Keys({"alice": ALICE, "bob": BOB}), backend_key=INNER) as running:
        yield running


def client(proxy, key):
    return openai.OpenAI(base_url=f"{proxy.url}/v1", api_key=key, max_retries=0)


def test_who_has_a_key_is_served_and_named_in_the_journal(stub, locked):
    for key in (ALICE, BOB):
        assert client(locked, key).chat.completions.create(**BODY).choices
    assert [call.client for call in committed(locked, 2).history.calls.values()] == ["alice", "bob"]
    assert {headers["authorization"] for headers in stub.stub.headers} == {f"Bearer {INNER}"}


@pytest.mark.parametrize("key", ["none", ALICE[:-1], ALICE + "x", INNER, ALICE.upper()])
def test_who_has_none_is_told_so_in_openais_shape(stub, locked, key):
    with pytest.raises(openai.AuthenticationError, match="OPENAI_API_KEY"):
        client(locked, key).chat.completions.create(**BODY)
    assert not stub.stub.headers and not locked.open().history.calls


ROUTES = [
    ("GET", "/v1/models"), ("GET", "/tautap"), ("POST", "/tautap/runs/x"), ("POST", "/tautap/runs/r/seal"),
    ("POST", "/tautap/runs/r/link"), ("GET", "/openapi.json"), ("GET", "/nowhere"), ("GET", "/metrics"),
    ("GET", "/health/live/"), ("GET", "//health/live"), ("OPTIONS", "/v1/models"),
]  # fmt: skip
WRONG = [None, b"Bearer", f"Basic {ALICE}".encode(), b"Bearer \xff", f"Bearer {ALICE} {BOB}".encode()]


def test_every_route_but_health_wants_a_key(locked, http):
    for method, path in ROUTES:
        for authorization in WRONG:
            headers = {} if authorization is None else {"Authorization": authorization}
            reply = http.request(method, f"{locked.url}{path}", headers=headers)
            assert reply.status_code == 401 and reply.headers["www-authenticate"] == "Bearer", (method, path, headers)
    assert not (locked.config.data / "x").exists()
    for method, path in ROUTES:
        reply = http.request(method, f"{locked.url}{path}", headers={"Authorization": f"bearer {BOB}"})
        assert reply.status_code != 401, (method, path)
    assert (locked.config.data / "x").exists()


def test_health_needs_no_key(locked, http):
    for path in ("/health/live", "/health/ready"):
        assert http.get(f"{locked.url}{path}").status_code == 200


def test_no_key_is_in_a_log_or_a_file(locked, http, caplog):
    """Not where it let somebody in, and not where it did not."""
    caplog.set_level(logging.DEBUG)
    client(locked, ALICE).chat.completions.create(**BODY)
    http.get(f"{locked.url}/v1/models", headers={"Authorization": f"Bearer {BOB}x"})
    locked.stop()
    said = caplog.text + repr(locked.config) + repr(locked.config.keys)
    for path in locked.config.data.rglob("*"):
        said += path.read_text(errors="replace") if path.is_file() else ""
    assert "alice" in said and not [key for key in (ALICE, BOB, INNER) if key in said]


def test_keys_come_from_a_file_or_the_environment(tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"# who may\n\nalice {ALICE}\n bob\t{BOB} \n")
    assert api_keys(file, {"TAUTAP_API_KEYS": "x 12345678"}) == {"alice": ALICE, "bob": BOB}
    assert api_keys(None, {"TAUTAP_API_KEYS": f"alice {ALICE},bob {BOB}"}) == {"alice": ALICE, "bob": BOB}
    assert api_keys(None, {}) == {} and not Keys()
    file.write_text(f"{INNER}\n")
    assert backend_key(file, {"TAUTAP_BACKEND_KEY": "x"}) == INNER
    assert backend_key(None, {"TAUTAP_BACKEND_KEY": INNER}) == INNER and backend_key(None, {}) is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds no key"),
        ("secret-without-name", "entry 1: give a name"),
        ("# x\na short", "entry 2: give a name"),
        ("a 12345678\na 87654321", "entry 2: the name a is there twice"),
        ("a/b 12345678", "entry 1"),
    ],
)
def test_a_file_of_keys_that_is_none_is_refused_without_saying_a_key(text, says):
    with pytest.raises(BadInput, match=says) as refused:
        parse(text.splitlines(), "keys")
    assert not [word for word in ("secret-without-name", "12345678", "short") if word in str(refused.value)]


@given(st.dictionaries(st.text(min_size=1), st.text(min_size=1)), st.text())
def test_only_the_very_key_opens(named, given_key):
    keys = Keys(named)
    found = keys.whose(f"Bearer {given_key}")
    assert (found is not None) == (given_key.strip() in named.values())
    assert found is None or named[found] == given_key.strip()


@pytest.mark.parametrize(
    ("host", "is_loopback"),
    [
        ("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("", False),
        ("::", False), ("10.0.0.1", False), ("example.org", False), ("localhost.example.org", False),
    ],
)  # fmt: skip
def test_beyond_loopback_the_proxy_listens_only_with_keys(tmp_path, host, is_loopback):
    assert loopback(host) == is_loopback
    if is_loopback:
        return
    done = CliRunner().invoke(cli, ["proxy", "--backend", "http://x", "--data", str(tmp_path), "--host", host])
    assert done.exit_code == 2 and "--api-key-file" in done.stderr


FOREIGN = [
    {"Host": "evil.example:8000"}, {"Host": "127.0.0.1.evil.example"}, {"Host": "localhost@evil.example"},
    {"Host": "::"}, {"Origin": "https://evil.example"}, {"Origin": "http://localhost.evil.example"},
    {"Origin": "null"}, {"Origin": "file://"}, {"Sec-Fetch-Site": "cross-site"},
]  # fmt: skip
HERE = [
    {}, {"Host": "localhost"}, {"Host": "LocalHost:1"}, {"Host": "[::1]:8000"}, {"Host": "127.8.8.8:80"},
    {"Origin": "http://localhost:3000"}, {"Origin": "https://[::1]"}, {"Sec-Fetch-Site": "none"},
    {"Origin": "http://localhost:3000", "Sec-Fetch-Site": "cross-site"},
]  # fmt: skip


@pytest.mark.parametrize("sent", FOREIGN)
def test_without_keys_no_web_page_is_served(stub, proxy, http, sent):
    """Nor one whose name leads here by now, of which the browser thinks that it speaks with its own server."""
    for method, path in [*ROUTES, ("POST", "/v1/chat/completions"), ("GET", "/health/live")]:
        reply = http.request(method, f"{proxy.url}{path}", headers=sent)
        ((name, text),) = sent.items()
        error = reply.json()["error"]
        assert reply.status_code == 403 and error["type"] == "permission_denied", (method, path)
        assert error["message"].startswith(f"{name} {text!r}: without keys only this machine is served")
    assert not stub.stub.headers and not (proxy.config.data / "x").exists()


@pytest.mark.parametrize("sent", HERE)
def test_without_keys_whoever_is_on_this_machine_is_served(proxy, http, sent):
    assert http.post(f"{proxy.url}/v1/chat/completions", json=BODY, headers=sent).status_code == 200
    assert http.get(f"{proxy.url}/health/live", headers=sent).status_code == 200


def test_with_a_key_it_does_not_matter_by_what_name_one_comes(locked, http):
    key = {"Authorization": f"Bearer {ALICE}"}
    for sent in FOREIGN:
        assert http.get(f"{locked.url}/v1/models", headers=sent | key).status_code == 200


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--backend", "localhost:8001"], "give a URL"),
        (["--port", "0"], "1<=x<=65535"),
        (["--tls-cert", "x"], "give both"),
        (["--tls-cert", "x", "--tls-key", "y"], "No such file"),
        (["--api-key-file", "/nowhere"], "/nowhere cannot be read"),
        (["--backend-key-file", "/dev/null"], "here are 0"),
        (["--max-in-flight", "0"], "--max-in-flight"),
        (["--idle-timeout-s", "-1"], "--idle-timeout-s"),
    ],
)
def test_wrong_settings_are_one_line(tmp_path, flags, says):
    done = CliRunner().invoke(cli, ["proxy", "--data", str(tmp_path), "--backend", "http://127.0.0.1:9", *flags])
    assert done.exit_code == 2 and says in done.stderr


def test_a_worker_that_refuses_the_proxys_key_stops_it(tmp_path):
    """Else it would be taken for a worker that records nothing."""
    guarded = Stub(tmp_path / "spool", api_key=INNER)
    with Running(guarded) as worker:
        with pytest.raises(WorkerFailed, match="--backend-key-file"), proxy_to(worker.url, tmp_path / "a"):
            pass
        with proxy_to(worker.url, tmp_path / "b", backend_key=INNER) as proxy:
            proxy.client().chat.completions.create(**BODY)
            (call,) = committed(proxy, 1).history.calls.values()
    assert call.n_kept == call.n_positions > 0


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    home = tmp_path_factory.mktemp("tls")
    cert, key = home / "cert.pem", home / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "2", "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*command, "-keyout", str(key), "-out", str(cert)], check=True, capture_output=True)
    return TLS(cert, key)


def test_with_a_certificate_it_speaks_tls_and_nothing_else(stub, tmp_path, certificate):
    with proxy_to(stub.url, tmp_path / "data", tls=certificate) as proxy:
        trusting = httpx.Client(verify=ssl.create_default_context(cafile=str(certificate.cert)))
        url = f"https://127.0.0.1:{proxy.config.port}"
        assert proxy.config.url == url
        with trusting, openai.OpenAI(base_url=f"{url}/v1", api_key="x", http_client=trusting) as talking:
            text = "".join(
                chunk.choices[0].delta.content or "" for chunk in talking.chat.completions.create(**BODY, stream=True)
            )
        assert text
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{proxy.url}/health/live")
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(f"{url}/health/live")
