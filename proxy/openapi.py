"""What the proxy itself promises, as an OpenAPI document. Fields that it does not read are the worker's to judge: their
schemas are open here, and what the worker thinks of them comes back as a 4xx.
"""

from __future__ import annotations

import importlib.metadata
from typing import get_args

import msgspec
from aiohttp import web

from episodes.layout import NAME as NAMES
from episodes.messages import JSON
from episodes.tables import Totals
from episodes.wire import Tokens
from proxy.admin import Progress


def _object(**fields: JSON) -> JSON:
    """An object that has all of these fields."""
    return {"type": "object", "required": list(fields), "properties": fields}


ERROR = _object(error={"type": "object", "required": ["message", "type", "code"]})
COMPLETION = _object(choices={"type": "array", "items": {"type": "object", "required": ["index"]}})
COLLECT: JSON = {
    "oneOf": [
        {"type": "boolean"},
        {
            "type": "object",
            "properties": {
                "layers": {"type": "array", "items": {"type": "integer"}},
                "hook_points": {"type": "array", "items": {"type": "string"}},
                "tokens": {"enum": list(get_args(Tokens))},
            },
        },
    ]
}
NAME: JSON = {"type": "string", "pattern": f"^{NAMES.pattern}$"}
RUN: JSON = {"name": "run", "in": "path", "required": True, "schema": NAME}
# Whose the results are: the file, and tau-bench's environment and split.
WHOSE: list[JSON] = [{"name": name, "in": "query", "schema": {"type": "string"}} for name in ("name", "env", "split")]
INTEGER: JSON = {"type": "integer"}
STRINGS: JSON = {"type": "array", "items": {"type": "string"}}
TRAJECTORY: JSON = {"type": "array", "items": {"type": "object"}}
RESULT = _object(task_id=INTEGER, trial=INTEGER, reward={"type": "number"}, info={"type": "object"}, traj=TRAJECTORY)
RESULTS: JSON = {
    "type": "object",
    "required": ["results"],
    "properties": {
        "results": {"type": "array", "items": RESULT},
        "tasks": {"type": "object", "additionalProperties": {"type": "string"}},
    },
}
JOINED = _object(joined=INTEGER, new=INTEGER, results=STRINGS, episodes=STRINGS, doubts=STRINGS)
REFUSALS = {
    "400": "something is wrong with the request",
    "401": "no key, or none of the proxy's",
    "403": "no keys are set, and it comes from a web page or to a name that is not this machine's",
    "404": "no such path, or no such model",
    "405": "not with this method",
    "408": "the body did not come in time",
    "409": "the run cannot be used",
    "413": "the body is too large",
    "415": "the body is packed in a way that is not known",
    "429": "too many requests are in flight",
    "500": "the proxy failed",
    "502": "the worker cannot be reached or failed",
    "503": "the recorder cannot keep up",
    "504": "the worker took too long",
}


def document() -> JSON:
    version = importlib.metadata.version("tautap")
    return {
        "openapi": "3.1.0",
        "info": {"title": "tautap", "version": version, "description": "The OpenAI API, recorded."},
        "security": [{"bearer": []}],
        "components": {
            "schemas": {"Error": ERROR},
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
        "paths": {
            "/v1/chat/completions": {"post": _generation("messages", {"type": "array", "items": {"type": "object"}})},
            "/v1/completions": {"post": _generation("prompt", {"type": ["string", "array"]})},
            "/v1/models": {"get": _operation("the models that are served", {"type": "object", "required": ["data"]})},
            "/tautap": {"get": _operation("the proxy", {"type": "object", "required": ["run", "aliases"]})},
            "/tautap/runs/{run}": {
                "parameters": [RUN],
                "get": _operation("what the run holds so far", _counts(Progress)),
                "post": _operation("the same, and the run is open", _counts(Progress)),
            },
            "/tautap/runs/{run}/seal": {
                "parameters": [RUN],
                "post": _operation("what its episodes hold, all of them sealed", _counts(Totals)),
            },
            "/tautap/runs/{run}/link": {
                "parameters": [RUN, *WHOSE],
                "post": _operation("what became of tau-bench's results", JOINED) | _body(RESULTS),
            },
            "/metrics": {"get": _operation("what Prometheus reads", {"type": "string"}, "text/plain")},
            "/health/live": {"get": _health("the proxy lives")},
            "/health/ready": {"get": _health("the worker answers, too")},
        },
    }


async def answer(request: web.Request) -> web.Response:
    return web.Response(body=msgspec.json.encode(document()), content_type="application/json")


def _generation(prompt: str, schema: JSON) -> JSON:
    fields = {
        "model": {"type": "string"},
        prompt: schema,
        "stream": {"type": "boolean"},
        "collect_activations": COLLECT,
    }
    body = {"type": "object", "required": ["model", prompt], "properties": fields}
    operation = _operation("a completion, or its events where `stream` is set", COMPLETION)
    operation["responses"]["200"]["content"]["text/event-stream"] = {}
    episode = {"name": "X-Episode-Id", "in": "header", "schema": NAME}
    return operation | {"parameters": [episode]} | _body(body)


def _body(schema: JSON) -> JSON:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _operation(gives: str, schema: JSON, kind: str = "application/json") -> JSON:
    good = {"description": gives, "content": {kind: {"schema": schema}}}
    return {"responses": {"200": good} | {code: _refusal(code) for code in REFUSALS}}


def _refusal(code: str) -> JSON:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {"description": REFUSALS[code], "content": error}


def _health(good: str) -> JSON:
    content = {"application/json": {"schema": {"type": "object", "required": ["status"]}}}
    responses = {"200": {"description": good, "content": content}, "503": {"description": "no", "content": content}}
    return {"security": [], "responses": responses | {"403": _refusal("403")}}


def _counts(kind: type[msgspec.Struct]) -> JSON:
    return _object(**dict.fromkeys(kind.__struct_fields__, INTEGER))
