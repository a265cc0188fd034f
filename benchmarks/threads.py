"""What finding a call's thread, turn and episode costs: CPU ms per call, and whether it stays so as a run grows.

python benchmarks/threads.py [CALLS]

Plays tau-bench's two sides, 16 tasks at once, of a warm-up and 60 messages each, without a network; a task's threads
are closed 64 tasks later, as a proxy does when they have been quiet. Pairing everything that is open, which a proxy
does when it looks for episodes to seal, is timed apart.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

from episodes.cast import Cast
from episodes.taubench import TauBench

N_MESSAGES = 60
AT_ONCE = 16
OPEN = 64
POLICY = "# Retail agent policy\n\n" + "A customer may return what was delivered within 30 days, once. " * 100
TEXT = (
    "I have looked at order {} and can offer you the following, if you agree to it: " + "a refund to your card. " * 12
)
JSON = dict[str, Any]


class Meter:
    """CPU seconds of this process spent in the cast, and calls counted."""

    def __init__(self) -> None:
        self.cast = Cast(TauBench())
        self.n_calls = 0
        self.seconds = 0.0
        self.longest: list[float] = []

    def call(self, messages: list[JSON], reply: JSON) -> str:
        # A proxy's messages are parsed anew with every request, so no string's hash is known before.
        messages = copy.deepcopy([{**m, "content": m["content"].encode().decode()} for m in messages])
        self.n_calls += 1
        begun = time.process_time()
        part = self.cast.dialect.part(messages)
        place = self.cast.place(f"c{self.n_calls}", messages, part)
        self.cast.replied(place, [reply])
        spent = time.process_time() - begun
        self.seconds += spent
        if len(messages) >= N_MESSAGES:
            self.longest.append(spent)
        return place.thread


def task(meter: Meter, number: int) -> Iterator[str]:
    """One task, a call at a time; yields threads."""
    begin, rules = "You are a user interacting with an agent.", "\nRules:\n- Be brief."
    warm_up, user = (
        [{"role": "system", "content": f"{begin}{told}{rules}"}, {"role": "user", "content": "Hi!"}]
        for told in ("", f"\n\nInstruction: You are {number}.\n")
    )
    yield meter.call(warm_up, {"role": "assistant", "content": "Hello!"})
    agent: list[JSON] = [{"role": "system", "content": POLICY}]
    while len(agent) < N_MESSAGES + 2:
        said = {"role": "assistant", "content": f"Message {len(user)} of {number}."}
        yield meter.call(user, said)
        agent.append({"role": "user", "content": said["content"]})
        function = {"name": "get_order", "arguments": json.dumps({"order_id": f"#W{len(agent)}", "full": True})}
        use = {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "1", "type": "function", "function": function}],
        }
        yield meter.call(agent, use)
        agent += [use, {"role": "tool", "tool_call_id": "1", "content": TEXT.format(len(agent)) * 2}]
        answer = {"role": "assistant", "content": TEXT.format(number)}
        yield meter.call(agent, answer)
        agent.append(answer)
        user += [said, {"role": "user", "content": answer["content"]}]


def main(n_calls: int) -> None:
    meter = Meter()
    number = 0
    playing: list[tuple[Iterator[str], set[str]]] = []
    over: list[set[str]] = []
    print(f"{'calls':>9} {'ms per call':>12} {'at 60 messages':>15} {'pairing all ms':>15} {'open threads':>13}")
    at, seconds = 0, 0.0
    while meter.n_calls < n_calls:
        while len(playing) < AT_ONCE:
            number += 1
            playing.append((task(meter, number), set()))
        for steps, threads in list(playing):
            thread = next(steps, None)
            if thread is None:
                playing.remove((steps, threads))
                over.append(threads)
            else:
                threads.add(thread)
        while len(over) > OPEN:
            meter.cast.close(over.pop(0))
        if meter.n_calls - at >= n_calls / 10:
            begun = time.process_time()
            meter.cast.groups()
            pairing = time.process_time() - begun
            each = (meter.seconds - seconds) / (meter.n_calls - at)
            longest = sum(meter.longest) / max(len(meter.longest), 1)
            print(
                f"{meter.n_calls:>9,} {each * 1e3:>12.3f} {longest * 1e3:>15.3f} {pairing * 1e3:>15.1f} "
                f"{len(meter.cast):>13,}",
                flush=True,
            )
            at, seconds = meter.n_calls, meter.seconds
            meter.longest.clear()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100_000)
