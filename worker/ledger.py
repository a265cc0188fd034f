"""The ledger: what the API server knows of each captured call, and where its rows lie in the spool.

The engine process writes rows; only the API server knows which sequences a request became, what tokens the client
was given and when the request was over. A call's activations are there once both have said so.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from episodes import wire
from episodes.errors import CaptureLost
from worker.orders import XARG, Order
from worker.spool import FAILED, PART, WHOLE, spooled

# A request that was dropped or failed while it was queued never reaches the runner: nothing of it will be spooled.
ABORT_GRACE_S = 5.0
RAN = ("stop", "length", "repetition")
# What vLLM raises of a request that it does not take, by name, for the stub has no vLLM. Any other error may come when
# the engine has run all of it.
NOT_TAKEN = {"VLLMClientError", "GracefulHTTPError", "ValueError"}
CALL_LIMIT = 10_000
SWEEP_S = 1.0
POLL_S = 0.005


@dataclass
class Growing:
    """A sequence as the client's choice sees it."""

    adapter: str
    prompt_token_ids: list[int] = field(default_factory=list)
    completion_token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    n_cached: int = 0
    refused: bool = False  # the engine ran nothing of it
    ended: bool = False  # by the engine itself, which runs no token after that
    last_fed: bool = False

    def sequence(self, choice: int) -> wire.Sequence:
        return wire.Sequence(
            choice,
            self.prompt_token_ids,
            self.completion_token_ids,
            self.finish_reason,
            self.n_cached,
            self.adapter,
            self.last_fed,
        )

    def learn(self, prompt: NDArray[np.int32], position: NDArray[np.int32], token_id: NDArray[np.int32]) -> None:
        """Take in, of a sequence that the engine did not end itself, what it ran: its client may have left before it
        was told any of that.

        prompt: [tokens]. position, token_id: [rows], as recorded
        """
        self.prompt_token_ids = self.prompt_token_ids or prompt.tolist()
        ran = token_id[position >= len(prompt)].tolist()
        self.completion_token_ids = self.completion_token_ids or ran
        n = len(self.completion_token_ids)
        self.last_fed = 0 < n <= len(ran) and ran[n - 1] == self.completion_token_ids[-1]


@dataclass
class Call:
    """A captured call. salt: its `Capture`'s. ended: set when the request is over, at `ended_at` monotonic seconds.

    extents: what was first said of its call file. It stays so: whoever takes the file over in place, by a link, writes
    into the spool file, and may be killed amid that; the rows are where they were.
    """

    id: str
    points: list[str]
    tokens: wire.Tokens
    salt: str = ""
    sequences: list[Growing] = field(default_factory=list)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    ended_at: float = 0.0
    extents: list[wire.Extent] | None = None

    def order(self, n: int, adapter: str = "") -> Order:
        """Take in a request of n sequences, and say what the engine must be told. adapter: as in `wire.Sequence`."""
        first = len(self.sequences)
        self.sequences += [Growing(adapter) for _ in range(n)]
        return Order(self.id, self.points, first, self.tokens)

    @property
    def ran(self) -> bool:
        """Whether the engine ran, or may have run, any of its sequences."""
        return not all(growing.refused for growing in self.sequences)

    @property
    def known(self) -> list[wire.Sequence]:
        """The sequences whose tokens are known, whatever became of their rows."""
        return [growing.sequence(i) for i, growing in enumerate(self.sequences) if growing.prompt_token_ids]

    def note(self, first: int, output: Any, delta: bool) -> None:
        """Take in one of vLLM's RequestOutputs; `delta` if it brings only what is new."""
        for part in output.outputs:
            sequence = self.sequences[first + part.index]
            if output.prompt_token_ids and not sequence.prompt_token_ids:
                sequence.prompt_token_ids = list(output.prompt_token_ids)
            if delta:
                sequence.completion_token_ids.extend(part.token_ids)
            else:
                sequence.completion_token_ids = list(part.token_ids)
            sequence.finish_reason = part.finish_reason or sequence.finish_reason
            # The server finds a stop string, and tells the engine.
            by_string = part.finish_reason == "stop" and isinstance(part.stop_reason, str)
            sequence.ended = part.finish_reason in RAN and not by_string
            sequence.n_cached = output.num_cached_tokens or sequence.n_cached


class Ledger:
    """The captured calls of one API server, oldest first; the oldest ended one goes when there are too many. What lies
    in the spool of a call that is not here is nobody's.

    Calls are forgotten on threads beside the event loop, so nothing here walks a collection while it can change.
    """

    def __init__(self, spool: Path) -> None:
        self.spool = spool
        self._calls: dict[str, Call] = {}
        self._secret = uuid.uuid4().hex
        self._swept = 0.0

    def open(self, call_id: str, points: list[str], tokens: wire.Tokens, salt: str = "") -> Call:
        if len(self._calls) >= CALL_LIMIT:
            oldest = next((c for c in list(self._calls.values()) if c.ended.is_set()), None)
            if oldest is not None:
                self.forget(oldest.id)
        self._sweep()
        self._calls[call_id] = call = Call(call_id, points, tokens, salt)
        return call

    def ticket(self, call_id: str) -> str:
        """What marks a request as a captured call's: nothing that a client could have written into it."""
        return f"{self._secret}/{call_id}"

    def close(self, call: Call) -> None:
        call.ended_at = time.monotonic()
        call.ended.set()

    def find(self, call_id: str) -> Call | None:
        return self._calls.get(call_id)

    def forget(self, call_id: str) -> bool:
        """Drop a call and its files, also those that are still to come; False if there was none."""
        call = self._calls.pop(call_id, None)
        if call is None:
            return False
        for choice in range(len(call.sequences)):
            for suffix in (WHOLE, FAILED):
                spooled(self.spool, call.id, choice, suffix).unlink(missing_ok=True)
        return True

    def _sweep(self) -> None:
        """Delete what the engine has spooled of calls since they were forgotten: the step that it was at may have taken
        any time.
        """
        if time.monotonic() < self._swept + SWEEP_S:
            return
        self._swept = time.monotonic()
        for path in self.spool.iterdir():
            if path.suffix in (WHOLE, FAILED) and path.name.rsplit(".", 2)[0] not in self._calls:
                path.unlink(missing_ok=True)

    def _growing(self, call: Call) -> bool:
        """Whether the engine is writing a sequence of this call."""
        return any(spooled(self.spool, call.id, choice, PART).exists() for choice in range(len(call.sequences)))

    @staticmethod
    def _abandoned(call: Call) -> bool:
        """Whether a sequence without a file will never have one."""
        return time.monotonic() - call.ended_at > ABORT_GRACE_S

    async def wait_for(self, call: Call, wait_s: float) -> list[wire.Extent] | None:
        """The call file's stretches once they are there, None after `wait_s`; CaptureLost if they never will be."""
        deadline = time.monotonic() + wait_s
        if not call.ended.is_set():
            try:
                await asyncio.wait_for(call.ended.wait(), wait_s)
            except TimeoutError:
                return None
        while True:  # the engine spools the last rows with its next step
            if call.extents is None:
                call.extents = await asyncio.to_thread(self._collect, call)
            if call.extents is not None or time.monotonic() >= deadline:
                return call.extents
            await asyncio.sleep(POLL_S)

    def _collect(self, call: Call) -> list[wire.Extent] | None:
        """The call file's stretches, None while they are not all there. Only of a call that has ended."""
        if not call.ran:
            raise CaptureLost("the engine ran no sequence of this call that could be captured")
        abandoned = self._abandoned(call) and not self._growing(call)
        found: list[tuple[wire.Sequence, Path]] = []
        for choice, growing in enumerate(call.sequences):
            failed = spooled(self.spool, call.id, choice, FAILED)
            if failed.exists():
                raise CaptureLost(failed.read_text() or "the spool has no room")
            path = spooled(self.spool, call.id, choice)
            if path.exists():
                found.append((self._sequence(choice, growing, path), path))
            elif growing.finish_reason in RAN or not (abandoned or growing.refused):
                return None
        if not found:
            for growing in call.sequences:
                growing.refused = True
            raise CaptureLost("the request was dropped before the engine ran it")
        return wire.join(call.id, found, call.points, call.tokens)

    @staticmethod
    def _sequence(choice: int, growing: Growing, path: Path) -> wire.Sequence:
        if not growing.ended:
            tensors, _ = wire.read_header(path)
            # The prompt is in it until the file has been handed over.
            growing.learn(*(wire.read_tensor(path, tensors[n]) for n in ("prompt_token_ids", "position", "token_id")))
        return growing.sequence(choice)

    def waiting(self) -> list[dict[str, Any]]:
        """What is running or waits to be claimed, oldest first."""
        return [
            {
                "call": call.id,
                "salt": call.salt,
                "state": "ended" if call.ended.is_set() else "running",
                "bytes": sum(_size(spooled(self.spool, call.id, choice)) for choice in range(len(call.sequences))),
            }
            for call in list(self._calls.values())
        ]

    def follow(self, generate: Callable[..., AsyncGenerator[Any, None]]) -> Callable[..., AsyncGenerator[Any, None]]:
        """vLLM's `generate`, noting what it gives for the captured calls.

        generate: AsyncLLM.generate of vllm 0.26 to 0.32, called once per prompt, in the order of the prompts
        """

        def following(prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
            extra_args = dict(getattr(sampling_params, "extra_args", None) or {})
            secret, _, call_id = str(extra_args.pop(XARG, "")).partition("/")
            call = self._calls.get(call_id) if secret == self._secret else None
            if call is None:
                if getattr(sampling_params, "extra_args", None):  # without what the engine would take for an order
                    sampling_params.extra_args = extra_args
                return generate(prompt, sampling_params, *args, **kwargs)
            lora = kwargs.get("lora_request")
            order = call.order(sampling_params.n, f"{lora.lora_name}@{lora.lora_path}" if lora else "")
            sampling_params.extra_args = extra_args | {XARG: msgspec.to_builtins(order)}
            outputs = generate(prompt, sampling_params, *args, **kwargs)
            own = slice(order.first_choice, order.first_choice + sampling_params.n)
            return self._noting(call, own, sampling_params.output_kind.name == "DELTA", outputs)

        return following

    @staticmethod
    async def _noting(
        call: Call, own: slice, delta: bool, outputs: AsyncGenerator[Any, None]
    ) -> AsyncGenerator[Any, None]:
        taken = False
        try:
            async with aclosing(outputs):
                async for output in outputs:
                    taken = True
                    call.note(own.start, output, delta)
                    yield output
        except Exception as error:
            for growing in call.sequences[own]:
                growing.refused = not taken and bool(NOT_TAKEN & {kind.__name__ for kind in type(error).__mro__})
            raise


def _size(path: Path) -> int:
    """0 for a file that is not there, or not any more."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
