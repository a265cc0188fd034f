"""The proxy keeps what its OpenAPI document promises, whatever is sent: schemathesis tries."""

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from proxy.config import Config
from proxy.openapi import document
from proxy.server import Proxy
from tests.conftest import proxy_to
from tests.stub import MODEL, Running, Stub

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


def served():
    """The document, of a proxy that serves the stub and writes the run `r`: else nearly all that is tried would end at
    a wrong model, or at a run that is not open.
    """
    found = document()
    for path in ("/v1/chat/completions", "/v1/completions"):
        body = found["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        body["properties"]["model"] = {"enum": [MODEL]}
    for path in ("/tautap/runs/{run}/seal", "/tautap/runs/{run}/link"):
        run, *whose = found["paths"][path]["parameters"]
        found["paths"][path]["parameters"] = [run | {"schema": {"enum": ["r"]}}, *whose]
    return found


schema = schemathesis.openapi.from_dict(served())


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    home = tmp_path_factory.mktemp("openapi")
    with Running(Stub(home / "spool")) as stub, proxy_to(stub.url, home / "data") as proxy:
        yield proxy.url


def test_the_document_is_served_as_it_is(url):
    assert httpx.get(f"{url}/openapi.json").json() == document()


def test_every_route_of_the_proxys_own_is_in_the_document(tmp_path):
    """But the document itself. What is not the proxy's own is the worker's to document."""
    routes = Proxy(Config(("http://127.0.0.1:1",), data=tmp_path, run="r")).app().router.routes()
    known = {route.resource.canonical for route in routes} - {"/{path}", "/openapi.json"}
    assert known <= document()["paths"].keys()


@schema.parametrize()
@settings(max_examples=25, suppress_health_check=list(HealthCheck))
def test_every_reply_is_one_that_was_promised(case, url):
    case.call_and_validate(base_url=url, checks=CHECKS)
