"""Has an answer begun to say the same thing for ever?"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from glmchat.engine.tokenizers.base import Tokenizer

# An exact repetition this long is no list, no table and no refrain. Asked for 500 zeros, a model may give fewer.
_LENGTH = 512
_LONGEST_PERIOD = 64
_EVERY = 32  # looked at this often


def goes_round(ids: Sequence[int]) -> bool:
    """True if the last 512 ids repeat a run of at most 64 of them exactly."""
    if len(ids) < _LENGTH or len(ids) % _EVERY:
        return False
    tail = list(ids[-_LENGTH:])
    return any(tail[period:] == tail[:-period] for period in range(1, _LONGEST_PERIOD + 1))


_REPLACEMENT = "\ufffd"


class CleanUp(Protocol):
    """A family's clean-up of an answer: `engine/prompts/base.py` says what the two methods do."""

    def clean(self, text: str) -> str: ...
    def settled(self, text: str) -> int: ...


class TextStream:
    """What may be shown of an answer so far.

    `push` takes an id and returns the text that became certain, `finish` the rest. Without stop strings and clean-up
    the pieces join to `tokenizer.decode(ids)`. With stop strings the text ends before the first of them and `stopped`
    is True. With a clean-up they join to `clean(decode(ids))`.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), clean_up: CleanUp | None = None) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(text for text in stop if text)
        self._clean_up = clean_up
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._ids: list[int] = []
        self._text = ""  # everything that is decoded for certain
        self._shown = ""  # what was given out
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
        self._ids.append(token)
        self._decode(final=False)
        return self._release(final=False)

    def finish(self) -> str:
        """What was held back; half a character at the very end becomes U+FFFD, as in `decode`."""
        if self.stopped:
            return ""
        self._decode(final=True)
        return self._release(final=True)

    def _decode(self, final: bool) -> None:
        if self._by_bytes:
            piece = b"" if final else self._tokenizer.token_bytes(self._ids[-1])
            if piece is not None:
                self._text += self._utf8.decode(piece, final)
                return
            self._by_bytes = False
        # This vocabulary only decodes whole sequences: what later ids cannot change is certain.
        whole = self._tokenizer.decode(self._ids)
        if not final:
            whole = whole.rstrip(_REPLACEMENT)
        if whole.startswith(self._text):
            self._text = whole

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
        if self._clean_up is not None:
            if not final:
                certain = certain[: self._clean_up.settled(certain)]
            certain = self._clean_up.clean(certain)
        if not certain.startswith(self._shown):
            # What was given out when the answer was stopped, or a clean-up that changed its mind. Nothing can be taken
            # back; go on behind it.
            certain = self._shown + certain[len(self._shown) :]
        piece, self._shown = certain[len(self._shown) :], certain
        return piece

    def _beginning_of_stop(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string begins."""
        longest = 0
        for stop in self._stop:
            for size in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:size]):
                    longest = size
                    break
        return longest
