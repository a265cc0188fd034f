"""`--edit file.py:function`: a user's nnsight block on every captured request, beside the capture, which sees its work.

    def steer(model):
        hidden, residual = model.model.layers[12].output  # vLLM's own values, as nnsight names them
        hidden += DIRECTION

The function is called once for every step of every captured request, and sees the rows that this step computes of it:
a prompt comes in chunks, and cached positions not at all, so an edit has to treat each row by itself. With a second
parameter it is told which rows they are, as `Rows`. What fails ends the capture of its request, never the engine.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from nnsight.intervention.envoy import Envoy
from nnsight.intervention.interleaver import Mediator, OutOfOrderError
from nnsight.modeling.vllm.batching import VLLMBatcher

from worker.orders import load_edit
from worker.tap import Tap


class Rows(NamedTuple):
    """Rows of one step: positions start, start + 1, … of a request whose first n_prompt positions are its prompt.

    They are rows at, at + 1, … of the batch.
    """

    request: str
    at: int
    start: int
    n_rows: int
    n_prompt: int


class Block(Mediator):
    """One call of the user's function, in a greenlet of its own, in step with the forward pass."""

    def __init__(self, call: Callable[[], object], rows: Rows) -> None:
        super().__init__(code=None, glbls={}, lcls={})
        self.rows = rows
        self.batch_group = [rows.at, rows.n_rows]
        self._call = call

    def _run(self) -> None:
        self._call()
        self.flush()

    def begin(self, tap: Tap) -> None:
        """Run up to the first value that the function asks for."""
        try:
            self.start(tap)
        except Exception as error:
            self.exception = error

    def end(self) -> BaseException | None:
        """Once the pass is over: what went wrong, if anything did."""
        if self.alive and self.exception is None:
            self.exception = OutOfOrderError(
                f"{self.pending} was asked for when the model had run past it, or never is"
            )
        return self.exception


class Edit:
    """A user's function on a model that a tap observes."""

    def __init__(self, location: str, tap: Tap, model: Any) -> None:
        """location: `file.py:function`"""
        self._location, self._tap = location, tap
        self._function = load_edit(location)
        self._told = len(inspect.signature(self._function).parameters) > 1
        self._envoy = Envoy(model, interleaver=tap)
        tap.defer_exceptions = True

    def run(self, rows: list[Rows], total: int, fail: Callable[[str, str], None], forward: Callable[[], Any]) -> Any:
        """What `forward`, a pass of `total` rows, returns with these edited; `fail(request, reason)` where it fails. If
        the pass cannot go on, it is done again without them.
        """
        tap = self._tap
        blocks = [self._block(r) for r in rows]
        tap.batcher = VLLMBatcher(None)
        tap.batcher.total = total
        tap.mediators = blocks
        try:
            for block in blocks:
                block.begin(tap)
            tap.reindex()
            errors: list[BaseException | None]
            try:
                output = forward()
                errors = [block.end() for block in blocks]
            except Exception as error:  # what is assigned may not fit the batch, and a skip has to cover all of it
                tap.mediators, errors = [], [error] * len(blocks)
                output = forward()
                tap.mediators = blocks
            for block, why in zip(blocks, errors, strict=True):
                if why is not None:
                    fail(block.rows.request, f"{self._location}: {type(why).__name__}: {why}")
            return output
        finally:
            tap.cancel()

    def _block(self, rows: Rows) -> Block:
        told = (rows,) if self._told else ()
        return Block(lambda: self._function(self._envoy, *told), rows)
