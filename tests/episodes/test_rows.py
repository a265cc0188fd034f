"""The radix tree against the plainest thing that could be right: a dictionary of prefixes."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from episodes.rows import Owner, Rows, runs

TOKENS = st.lists(st.integers(0, 2), max_size=12)


@st.composite
def sequences(draw):
    """A few token lists over a tiny alphabet, so that they share prefixes, and the ranges each one computed."""
    found = []
    for tokens in draw(st.lists(TOKENS, max_size=8)):
        edges = sorted(draw(st.lists(st.integers(0, len(tokens)), min_size=2, max_size=4)))
        found.append((tokens, list(zip(edges[::2], edges[1::2], strict=False))))
    return found


@given(sequences(), TOKENS)
def test_every_prefix_belongs_to_the_first_that_computed_it(given_sequences, asked):
    """Whatever is stored in whatever order, no row is stored twice and every lookup names the first owner."""
    rows, owners = Rows(), {}
    for number, (tokens, computed) in enumerate(given_sequences):
        owner = Owner(f"c{number}", 0)
        kept = rows.store(owner, np.array(tokens, np.int32), computed)
        new = []
        for start, stop in computed:
            for position in range(start, stop):
                prefix = tuple(tokens[: position + 1])
                if owners.setdefault(prefix, owner) == owner and position not in new:
                    new.append(position)
        assert [p for a, b in kept for p in range(a, b)] == sorted(new)
    for tokens in [asked, *(tokens for tokens, _ in given_sequences)]:
        spans = rows.spans(np.array(tokens, np.int32))
        flat = [span.owner for span in spans for _ in range(span.start, span.stop)]
        assert flat == [owners.get(tuple(tokens[: p + 1])) for p in range(len(tokens))]
        assert all(a.owner != b.owner for a, b in itertools.pairwise(spans))


@given(st.lists(st.booleans(), max_size=20))
def test_runs_are_where_the_mask_is_true(mask):
    """The ranges cover exactly the true places, and none touches the next."""
    found = runs(np.array(mask, bool))
    assert [i for a, b in found for i in range(a, b)] == [i for i, on in enumerate(mask) if on]
    assert all(a[1] < b[0] for a, b in itertools.pairwise(found))


@given(sequences())
def test_what_is_forgotten_was_never_there(given_sequences):
    """Undoing the last of several stores leaves what the others alone would have left."""
    kept, undone = Rows(), Rows()
    for rows, last in ((kept, 0), (undone, 1)):
        for number, (tokens, computed) in enumerate(given_sequences[: len(given_sequences) - 1 + last]):
            rows.store(Owner(f"c{number}", 0), np.array(tokens, np.int32), computed)
    if given_sequences:
        undone.forget(Owner(f"c{len(given_sequences) - 1}", 0), np.array(given_sequences[-1][0], np.int32))
    for tokens, _ in given_sequences:
        assert undone.spans(np.array(tokens, np.int32)) == kept.spans(np.array(tokens, np.int32))
