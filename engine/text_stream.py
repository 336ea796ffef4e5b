"""Ids to text, piece by piece: never half a character, never a stop string, and the pieces join to the whole."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence

from glmchat.engine.tokenizers.base import Tokenizer

# How much is kept back while a family's clean-up may still rewrite the end of what was said.
_REWRITTEN = 16
_REPLACEMENT = "\ufffd"


class TextStream:
    """What may be shown of an answer so far.

    `push` takes an id and returns the text that became certain, `finish` the rest. Without stop strings and clean-up
    the pieces join to `tokenizer.decode(ids)`. With stop strings the text ends before the first of them and `stopped`
    is True. With a clean-up they join to `clean(decode(ids))`, if the clean-up only rewrites the last characters.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str] = (), clean: Callable[[str], str] | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(text for text in stop if text)
        self._clean = clean
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._ids: list[int] = []
        self._text = ""  # everything that is decoded for certain
        self._shown = ""  # what was given out
        self._by_bytes = True
        self._searched = 0  # stop strings do not begin before this position
        self.stopped = False

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
        if self._clean is not None:
            certain = self._clean(certain)
            if not final:
                certain = certain[: max(0, len(certain) - _REWRITTEN)]
        if not certain.startswith(self._shown):
            # The clean-up changed what was shown already. Nothing can be taken back; go on behind it.
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
