"""Labels are the ids where they are learned, and -100 elsewhere."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from glmchat.tuning.examples import Example, Place


@given(st.lists(st.tuples(st.integers(0, 1 << 20), st.booleans()), max_size=50))
def test_labels_are_the_ids_that_are_learned(tokens: list[tuple[int, bool]]) -> None:
    example = Example(tuple(t for t, _ in tokens), tuple(learned for _, learned in tokens), (), Place("a.json", 3))
    for (token, learned), label in zip(tokens, example.labels, strict=True):
        assert label == (token if learned else -100)
    assert str(example.place) == "a.json:3"
