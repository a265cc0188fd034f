"""What the API server tells the engine process: the recorder's configuration, and an order for each captured request.

Kept apart from the recorder because importing nnsight gives every object a `save` method, which the engine process
can bear and the API server's libraries (anyio) cannot.
"""

from __future__ import annotations

import msgspec

from episodes.wire import Tokens

XARG = "tautap"


class Config(msgspec.Struct, frozen=True):
    """The recorder's share of vLLM's `additional_config`, under the key `tautap`.

    points, tokens: what is recorded of a call that names none. custom: as in `episodes.points.Points`.
    """

    spool_dir: str
    spool_bytes: int
    buffer_bytes: int
    points: list[str]
    custom: dict[str, str] = {}
    tokens: Tokens = "all"


class Order(msgspec.Struct, frozen=True):
    """What to record of a request, in `SamplingParams.extra_args["tautap"]`.

    first_choice: the choice that the request's first sequence becomes; `n > 1` children count on from it
    """

    call: str
    points: list[str]
    first_choice: int
    tokens: Tokens = "all"
