"""What the API server tells the engine process: the recorder's configuration, and an order for each captured request.

Kept apart from the recorder because importing nnsight gives every object a `save` method, which the engine process
can bear and the API server's libraries (anyio) cannot.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

from episodes.errors import BadInput
from episodes.wire import CaptureSource, Tokens

XARG = "tautap"


class Config(msgspec.Struct, frozen=True):
    """The recorder's share of vLLM's `additional_config`, under the key `tautap`.

    points, tokens: what is recorded of a call that names none. custom: as in `episodes.points.Points`. source: where
    values come from: `nnsight`'s observers, these inside CUDA `graphs`, or vLLM's own `aux`iliary hidden states. edit:
    `file.py:function`, or none.
    """

    spool_dir: str
    spool_bytes: int
    buffer_bytes: int
    points: list[str]
    custom: dict[str, str] = {}
    tokens: Tokens = "all"
    source: CaptureSource = "nnsight"
    edit: str = ""


class Order(msgspec.Struct, frozen=True):
    """What to record of a request, in `SamplingParams.extra_args["tautap"]`.

    first_choice: the choice that the request's first sequence becomes; `n > 1` children count on from it
    """

    call: str
    points: list[str]
    first_choice: int
    tokens: Tokens = "all"


def load_edit(location: str) -> Callable[..., object]:
    """The function at `file.py:function`; BadInput, saying what there is, if there is none. The file may import others
    that lie beside it, but for those that have a name of ours or of a library's.
    """
    name, _, function = location.rpartition(":")
    path = Path(name)
    if not name or not path.is_file():
        raise BadInput(f"--edit {location!r}: give file.py:function; there is no file {name!r}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise BadInput(f"--edit {location!r}: {path.name} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    if (beside := str(path.parent.absolute())) not in sys.path:
        sys.path.append(beside)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise BadInput(f"--edit {location!r}: {path.name} does not import: {type(error).__name__}: {error}") from error
    found = getattr(module, function, None)
    if not inspect.isfunction(found):
        has = [n for n, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__]
        raise BadInput(
            f"--edit {location!r}: {path.name} has no function {function!r}, only {', '.join(has) or 'none'}"
        )
    if len(inspect.signature(found).parameters) not in (1, 2):
        raise BadInput(f"--edit {location!r}: {function} must take (model) or (model, rows)")
    return found
