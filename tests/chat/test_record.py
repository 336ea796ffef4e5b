"""What a replay names: every recorded fact that is otherwise now, and nothing that is not known of both."""

from __future__ import annotations

from typing import Any

import pytest

from glmchat.chat.replay.record import differences

FACTS: dict[str, Any] = {
    "weights": {"files": [["model.safetensors", 100, 5, "sha256:aa"]]},
    "adapter_hashes": {"poet": "bb"},
    "template": "cc",
    "settings": {"generation_config.json": "dd"},
    "dtype": "float32",
    "device": "cpu",
    "threads": 2,
    "kernel": "native+step",
    "context": 512,
    "versions": {"torch": "2.9"},
}


@pytest.mark.parametrize(
    ("name", "now", "told"),
    [
        ("weights", {"files": [["model.safetensors", 100, 5, "sha256:ab"]]}, "weights model.safetensors"),
        ("adapter_hashes", {"poet": "b0"}, "adapter poet"),
        ("template", "c0", "template"),
        ("settings", {"generation_config.json": "d0"}, "file generation_config.json"),
        ("threads", 1, "threads"),
        ("kernel", "native", "kernel"),  # the compiled step was not there: another computation
        ("versions", {"torch": "2.10"}, "version torch"),
    ],
)
def test_a_fact_that_changed_is_named_with_both_values(name: str, now: Any, told: str) -> None:
    (found,) = differences(FACTS, {**FACTS, name: now})
    assert found.what == told and found.then != found.now
    assert str(told) in found.sentence()


def test_nothing_is_named_where_nothing_changed_or_was_not_recorded() -> None:
    assert differences(FACTS, FACTS) == []
    assert differences({"template": FACTS["template"]}, FACTS) == []
