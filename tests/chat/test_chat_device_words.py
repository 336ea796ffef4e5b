"""The words that --device takes."""

from __future__ import annotations

import pytest

from glmchat.chat.launch import device_word
from glmchat.core.errors import Usage


@pytest.mark.parametrize("word", ["auto", "cpu", "mps", "cuda", "cuda:1", " CUDA:0 "])
def test_known_devices_are_taken_in_small_letters(word: str) -> None:
    assert device_word(word) == word.strip().lower()


@pytest.mark.parametrize("word", ["gpu", "cuda:", "cuda:x", "cuda:-1", "cpu:0", "", "cuda:0;\x1b[31m"])
def test_any_other_word_is_refused_with_those_there_are(word: str) -> None:
    with pytest.raises(Usage) as refused:
        device_word(word)
    assert "cuda:N" in refused.value.hint and "\x1b" not in refused.value.message
