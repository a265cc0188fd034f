"""Which paths are served: nothing reaches the worker's store, and no name leaves the data directory."""

import http.client
import posixpath
import re
from urllib.parse import quote, unquote

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from proxy.paths import target
from tests.conftest import proxy_to
from tests.proxy.scripted import Scripted
from tests.stub import MODEL

PARTS = ["v1", "activations", "Activations", "%61ctivations", "models", "x", "", ".", "..", "%2e%2e", "%252e%252e"]
JOINTS = ["/", "//", "%2f", "%2F", "%252f", "\\", "%5c", ";", "/./", "?", "%3f", "#", "%23", "%00", "%20"]
PATHS = st.builds(
    lambda start, pairs: start + "".join(joint + part for joint, part in pairs),
    st.sampled_from(["/v1", "/runs/r/v1", "/episodes/e/v1", "", "/", "http://evil/v1"]),
    st.lists(st.tuples(st.sampled_from(JOINTS), st.sampled_from(PARTS)), min_size=1, max_size=5),
)


def readings(path):
    """All that a server could make of a path: resolved once more and again, its slashes and dots made plain."""
    found = set()
    for _ in range(3):
        plain = re.split(r"[?#;\x00]", path.replace("\\", "/"))[0]
        found |= {posixpath.normpath(re.sub("/+", "/", plain)).lower().strip("/ ")}
        path = unquote(path)
    return found


@given(PATHS)
@example("/v1/x/%2e%2e/activations")
@example("/v1//activations")
def test_no_way_of_writing_it_makes_a_path_the_stores(path):
    asked = target(unquote(path))
    assert asked is None or not [r for r in readings(asked.path) if r.startswith("v1/activations")]
    assert asked is None or (re.fullmatch(r"[A-Za-z0-9/._~:@+,=-]+", asked.path) and ".." not in asked.path.split("/"))


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A proxy, and a worker that notes the paths it is asked for."""
    with Scripted() as worker, proxy_to(worker.url, tmp_path_factory.mktemp("paths") / "data") as proxy:
        yield proxy, worker


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(PATHS)
@example("/v1/x/%2e%2e/activations/c-1")
@example("/v1/x/..%2factivations/c-1")
@example("/v1/models%3f/../activations")
@example("//v1/activations")
def test_no_way_of_writing_it_reaches_the_workers_store(watched, path):
    """As bytes on a socket, through the real proxy, to a worker that says what it got."""
    proxy, worker = watched
    connection = http.client.HTTPConnection("127.0.0.1", proxy.config.port, timeout=20)
    connection._validate_path = lambda url: None
    try:
        connection.request("GET", path, headers={"Host": "127.0.0.1"})  # whatever the path names
        status = connection.getresponse().status
    finally:
        connection.close()
    assert status in (200, 400, 404)
    for came in worker.requests:
        assert came.path.startswith("/v1") and not [r for r in readings(came.path) if r.startswith("v1/activations")]


NAMES = st.text(max_size=20) | st.lists(st.sampled_from(["..", ".", "/", "\\", "a", "\0", "%2f", "~", "-"])).map(
    "".join
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(NAMES, st.sampled_from(["run", "episode", "header", "admin"]))
@example("../../out", "run")
@example("..", "admin")
def test_a_name_is_used_as_it_is_or_refused(watched, name, place):
    """Whatever is asked for: below the data directory are runs with plain names, and beside it nothing new."""
    proxy, _ = watched
    data = proxy.config.data
    before = {path.name for path in data.parent.iterdir()}
    quoted = quote(name, safe="")
    paths = {"run": f"/runs/{quoted}/v1/completions", "episode": f"/episodes/{quoted}/v1/completions"}
    path = paths.get(place, f"/tautap/runs/{quoted}" if place == "admin" else "/v1/completions")
    connection = http.client.HTTPConnection("127.0.0.1", proxy.config.port, timeout=20)
    connection.putrequest("POST", path)
    if place == "header":
        connection.putheader("X-Episode-Id", re.sub(r"[\r\n]", "", name).encode())
    body = b'{"model": "%s", "prompt": "Hi"}' % MODEL.encode()
    connection.putheader("Content-Length", len(body))
    connection.endheaders(body)
    status = connection.getresponse().status
    connection.close()
    assert status in (200, 400, 404)
    assert {path.name for path in data.parent.iterdir()} == before
    for path in data.rglob("*"):
        assert re.fullmatch(r"[A-Za-z0-9.][A-Za-z0-9._-]*", path.name) and path.resolve().is_relative_to(data.resolve())
