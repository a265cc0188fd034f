"""A task of twenty questions for Inspect AI, with a scorer of its own; `python -m tests.inspect_task MODEL LOGS`.

The server is the one that TAUTAP_BASE_URL names, as for every provider that is compatible with OpenAI.
"""

import json
import sys

from inspect_ai import Task, eval
from inspect_ai.dataset import Sample
from inspect_ai.scorer import Score, Target, accuracy, scorer
from inspect_ai.solver import TaskState, generate


@scorer(metrics=[accuracy()])
def answered():
    async def score(state: TaskState, target: Target) -> Score:
        return Score(value=1 if state.output.completion else 0, answer=state.output.completion)

    return score


def questions() -> Task:
    samples = [Sample(input=f"What is {n} + {n}?", target=str(2 * n)) for n in range(20)]
    return Task(dataset=samples, solver=generate(), scorer=answered())


if __name__ == "__main__":
    (log,) = eval(
        questions(), model=f"openai-api/tautap/{sys.argv[1]}", log_dir=sys.argv[2], display="none", max_connections=8
    )
    assert log.status == "success" and log.samples is not None, log.error
    print(json.dumps({sample.input: sample.output.completion for sample in log.samples}))
