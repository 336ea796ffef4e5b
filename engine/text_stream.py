"""What may be shown of an answer while it grows: whole characters, nothing behind a stop string, cleaned up for good.

And whether it has begun to repeat itself for ever.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from glmchat.engine.tokenizers.base import Tokenizer

_REPLACEMENT = "\ufffd"
_HALF_CHARACTER = 3  # bytes at most, and so many U+FFFD at most that a later id can change
_OVERLAP = 16  # ids that are decoded again beside new ones
_SEGMENT = 64  # characters that are forgotten at once
# An exact repetition this long is no list, no table and no refrain. Asked for 500 zeros, a model may give fewer.
_REPETITION = 512
_LONGEST_PERIOD = 64
_EVERY = 32  # looked at this often


class CleanUp(Protocol):
    """A family's clean-up of an answer: `engine/prompts/base.py` says what the methods do."""

    def clean(self, text: str) -> str: ...
    def settled(self, text: str) -> int: ...
    def separable(self, text: str) -> int: ...


class TextStream:
    """What may be shown of an answer so far.

    `push` takes an id and returns the text that became certain, `finish` the rest. Without stop strings and clean-up
    the pieces join to `tokenizer.decode(ids)`. With stop strings the text ends before the first of them and `stopped`
    is True. With a clean-up they join to `clean(decode(ids))`. The work for one id does not grow with the answer: old
    ids and old text are forgotten.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), clean_up: CleanUp | None = None) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(text for text in stop if text)
        self._clean_up = clean_up
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._window: list[int] = []  # the last ids, where only sequences can be decoded
        self._window_text = ""  # what is certain of the window's text; it stands in `_text` or did so
        self._text = ""  # what is decoded for certain, behind what was forgotten
        self._shown = ""  # what was given out of it, cleaned up
        self._by_bytes = True
        self._searched = 0  # stop strings do not begin before this position
        self.stopped = False

    def resume(self, ids: Sequence[int]) -> None:
        """Go on behind these ids of the same answer, whose text was given out before."""
        for token in ids:
            self.push(token)
        self._shown = self._text if self._clean_up is None else self._clean_up.clean(self._text)

    def push(self, token: int) -> str:
        """Add one id; returns the new text, which is often empty."""
        if self.stopped:
            return ""
        self._decode(token)
        return self._release(final=False)

    def finish(self) -> str:
        """What was held back; half a character at the very end becomes U+FFFD, as in `decode`."""
        if self.stopped:
            return ""
        self._decode(None)
        return self._release(final=True)

    def _decode(self, token: int | None) -> None:
        """Add what is certain with one more id; None: with none any more."""
        if self._by_bytes:
            piece = b"" if token is None else self._tokenizer.token_bytes(token)
            if piece is not None:
                self._text += self._utf8.decode(piece, token is None)
                return
            self._by_bytes = False
        # This vocabulary only decodes sequences: what later ids cannot change is certain.
        if token is not None:
            self._window.append(token)
        whole = self._tokenizer.decode(self._window)
        certain = whole if token is None else _without_half_character(whole)
        if certain.startswith(self._window_text):
            self._text += certain[len(self._window_text) :]
            self._window_text = certain
        if len(self._window) >= 2 * _OVERLAP:
            self._shorten_window(whole, certain)

    def _shorten_window(self, whole: str, certain: str) -> None:
        """Forget all but the last ids if they read by themselves as they do behind the others."""
        last = self._window[-_OVERLAP:]
        text = self._tokenizer.decode(last)
        # A text that is not empty has lost the blank in front, if this vocabulary drops one, so nothing behind it will.
        if text and whole.endswith(text):
            self._text += certain[len(self._window_text) :]  # a vocabulary that changed its mind: go on behind it
            self._window, self._window_text = last, _without_half_character(text)

    def _release(self, final: bool) -> str:
        certain = self._text
        ends = [at for stop in self._stop if (at := certain.find(stop, max(0, self._searched - len(stop)))) >= 0]
        if ends:
            self.stopped, self._text = True, certain[: min(ends)]
        if self.stopped:
            certain, final = self._text, True
        elif self._stop:
            self._searched = len(certain)
            if not final:
                certain = certain[: len(certain) - self._beginning_of_stop(certain)]
        raw = certain
        if self._clean_up is not None:
            if not final:
                raw = certain[: self._clean_up.settled(certain)]
            certain = self._clean_up.clean(raw)
        if not certain.startswith(self._shown):
            # What was given out when the answer was stopped, or a clean-up that changed its mind. Nothing can be taken
            # back; go on behind it.
            certain = self._shown + certain[len(self._shown) :]
        piece, self._shown = certain[len(self._shown) :], certain
        if not final:
            self._forget(raw)
        return piece

    def _forget(self, settled: str) -> None:
        """Drop the text that neither a stop string nor the clean-up will look at again."""
        count = len(settled) if self._clean_up is None else self._clean_up.separable(settled)
        if count >= _SEGMENT:
            head = settled[:count]
            self._shown = self._shown[len(head if self._clean_up is None else self._clean_up.clean(head)) :]
            self._text, self._searched = self._text[count:], max(0, self._searched - count)

    def _beginning_of_stop(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string begins."""
        longest = 0
        for stop in self._stop:
            for size in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:size]):
                    longest = size
                    break
        return longest


def _without_half_character(text: str) -> str:
    """Without the U+FFFD at its end that a later id may turn into a character."""
    held = min(len(text) - len(text.rstrip(_REPLACEMENT)), _HALF_CHARACTER)
    return text[: len(text) - held]


def repeats_itself(ids: Sequence[int]) -> bool:
    """True if the last 512 ids repeat a run of at most 64 of them exactly."""
    if len(ids) < _REPETITION or len(ids) % _EVERY:
        return False
    tail = list(ids[-_REPETITION:])
    return any(tail[period:] == tail[:-period] for period in range(1, _LONGEST_PERIOD + 1))
