"""Holds one answer to what its request asks beside `Sampling`, between the model's row of logits and the sampler.

The order is vLLM's: log probabilities are read from the model's own row; then the form, biases, the least length and
the penalties change it; temperature and the filters of `Sampling` come last. A request that asks for none of this has
no decoder, and its bits are what they were.

Which tokens a form allows is reckoned by llguidance (github.com/guidance-ai/llguidance), which knows JSON schemas,
regular expressions and context-free grammars. It works on the bytes of tokens, so half a character or half a word is no
trouble. Control tokens have no bytes: under a form none may come but the end.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch

from glmchat.core.decoding import PLAIN, Decoding, Grammar, TokenLogprob
from glmchat.core.errors import FieldError
from glmchat.core.language import tr
from glmchat.core.text import one_line
from glmchat.engine.decoding import form
from glmchat.engine.decoding.sequences import ReadRows
from glmchat.engine.sampling import Sampler
from glmchat.engine.tokenizers.base import Tokenizer


class Vocabulary:
    """The bytes of every id in the middle of a text. size: of the model's row, which may be longer than the vocabulary.

    Built once a model: a second for 150,000 ids, when the first form is asked for.
    """

    def __init__(self, tokenizer: Tokenizer, stop_ids: Sequence[int], size: int) -> None:
        self.eos_token_id = stop_ids[0]
        self.bos_token_id = None
        self.size = size
        self.tokens = [tokenizer.piece_bytes(token) for token in range(size)]
        self.special_token_ids: list[int] = []
        self._encode: Callable[[str], list[int]] = tokenizer.encode
        self._by_bytes = {piece: token for token, piece in enumerate(self.tokens) if piece}
        self._longest = max(map(len, self._by_bytes), default=0)
        from llguidance import LLTokenizer, TokenizerWrapper

        self.compiled = LLTokenizer(TokenizerWrapper(self), eos_token=list(stop_ids))

    def __call__(self, text: str) -> list[int]:
        """Ids of a text in the middle of another. A vocabulary that puts a blank before its first word has others."""
        ids = self._encode(text)
        return ids if b"".join(self.tokens[token] for token in ids) == text.encode() else self._cut(text.encode())

    def _cut(self, text: bytes) -> list[int]:
        """The longest pieces from the front; what has no piece is left out."""
        ids: list[int] = []
        while text:
            size = next((n for n in range(min(self._longest, len(text)), 0, -1) if text[:n] in self._by_bytes), 0)
            ids += [self._by_bytes[text[:size]]] if size else []
            text = text[size or 1 :]
        return ids


class Matcher:
    """Where an answer stands in its form.

    Raises FieldError for a form that llguidance cannot read or that no text has, and in the middle of an answer for one
    that goes over its limits: a step takes a second and some 250 MB at most.
    """

    def __init__(self, grammar: Grammar, vocabulary: Vocabulary) -> None:
        from llguidance import LLMatcher

        form.check(grammar)
        self._size, self._param = vocabulary.size, grammar.param
        self._matcher = LLMatcher(vocabulary.compiled, form.source(grammar), log_level=0)
        self._matcher.compute_bitmask()
        if self._matcher.is_error():  # with this vocabulary it is over the limits
            raise form.refusal(grammar, self._matcher.get_error())

    def allowed(self) -> torch.Tensor:
        """Bool [size]: the ids that may come next, ends among them where the answer may be over."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():  # it would allow an end, and half an answer would pass for a whole one
            raise FieldError(
                tr("the form of the answer was lost: {problem}", problem=one_line(self._matcher.get_error(), 200)),
                hint=tr("leave the field out"),
                code="decoding.failed",
                param=self._param,
            )
        return torch.from_numpy(np.unpackbits(bits, bitorder="little")[: self._size].astype(bool))

    def take(self, token: int) -> None:
        self._matcher.consume_token(token)


_TAIL = 64  # ids at the end of a prompt in which a template may have opened a thought


class Thought:
    """The ids that open and close a model's thoughts, and how many tokens one may take.

    The thought is open at once if the prompt ends in one. When the budget is used up, `close` is what must be said.
    """

    def __init__(self, opens: int, close: Sequence[int], ends: int, budget: int, prompt: Sequence[int]) -> None:
        """opens, ends: the two marks; close: what is said in place of the rest of the thought, `ends` in it."""
        self._opens, self._close, self._ends, self._left = opens, list(close), ends, budget
        tail = prompt[-_TAIL:]
        self._open = opens in tail and ends not in tail[tail.index(opens) :]
        self._due: list[int] = []

    def must(self) -> int | None:
        """The only id that may come next; None while the model is free."""
        if self._open and self._left <= 0 and not self._due:
            self._due = list(self._close)
        return self._due[0] if self._due else None

    def take(self, token: int) -> None:
        if self._due:
            self._due.pop(0)
            self._open = bool(self._due)
        elif self._open:
            self._left -= 1
            self._open = token != self._ends
        elif token == self._opens:
            self._open = True


class Decoder:
    """One answer's. ends: ids that end it beside the model's own. told(): what the tokens since the last call were."""

    def __init__(
        self,
        decoding: Decoding,
        stop_ids: Sequence[int],
        piece: Callable[[int], bytes],
        matcher: Matcher | None = None,
        thought: Thought | None = None,
    ) -> None:
        self._asked = decoding
        self.ends = decoding.stop_token_ids
        self.only_reads = decoding.only_reads
        self._all_ends = torch.tensor([*dict.fromkeys((*stop_ids, *decoding.stop_token_ids))], dtype=torch.long)
        self._piece = piece
        self._matcher, self._thought = matcher, thought
        self._bias = (torch.tensor([*decoding.logit_bias]), torch.tensor([*decoding.logit_bias.values()]))
        self._said: Counter[int] = Counter()
        self._count = 0
        self._told: list[TokenLogprob] = []

    def told(self, *, ended: bool = False) -> tuple[TokenLogprob, ...]:
        """Log probabilities of the tokens since the last call; of one that ended the answer nothing is shown, but where
        those of the prompt are: that there is one for each id is how a client finds their end.
        """
        told, self._told = self._told, []
        return tuple(told[:-1] if ended and not self._asked.of_prompt else told)

    def reader(self, ids: Sequence[int]) -> ReadRows | None:
        """What is shown the logits behind each of `ids`, a prompt, to tell its tokens' log probabilities too."""
        if not self._asked.of_prompt:
            return None
        self._told = [TokenLogprob(self._piece(ids[0]), None)]

        def read(start: int, logits: torch.Tensor) -> None:
            following = ids[start + 1 : start + 1 + len(logits)]
            if following:
                self._told += self._rate(logits[: len(following)], following)

        return read

    def _rate(self, logits: torch.Tensor, tokens: Sequence[int]) -> list[TokenLogprob]:
        """Of each token under its row of logits [n, vocab]."""
        logprobs = torch.log_softmax(logits.float(), -1)
        told = logprobs.gather(1, torch.tensor(tokens, device=logprobs.device)[:, None])[:, 0].tolist()
        values, ids = logprobs.topk(min(self._asked.top_logprobs or 0, logprobs.shape[1]))
        best = [
            tuple((self._piece(i), v) for i, v in zip(*row, strict=True))
            for row in zip(ids.tolist(), values.tolist(), strict=True)
        ]
        return [TokenLogprob(self._piece(t), p, top) for t, p, top in zip(tokens, told, best, strict=True)]

    def sampler(self, choose: Sampler) -> Sampler:
        """`choose` from the row as the request wants it. It needs the whole row: a card's best candidates are those
        of the model's own.
        """

        def sample(logits: torch.Tensor) -> int:
            row = logits.float().cpu()
            token = choose(self._shaped(row))
            self._take(token, row)
            return token

        return sample

    def _shaped(self, row: torch.Tensor) -> torch.Tensor:
        asked = self._asked
        row = row.clone()  # also without the best candidates that a card's step brings along with its row
        if asked.logit_bias:
            row[self._bias[0]] += self._bias[1]
        if self._said and (asked.frequency_penalty or asked.presence_penalty):
            ids = torch.tensor([*self._said])
            counts = torch.tensor([*self._said.values()], dtype=row.dtype)
            row[ids] -= asked.frequency_penalty * counts + asked.presence_penalty
        must = self._thought.must() if self._thought is not None else None
        if must is not None:
            return torch.full_like(row, -math.inf).index_fill_(0, torch.tensor([must]), 0.0)
        if self._count < asked.min_tokens:
            row[self._all_ends] = -math.inf
        if self._matcher is not None:
            allowed = self._matcher.allowed()
            formed = row.masked_fill(~allowed, -math.inf)
            if bool(torch.isneginf(formed).all()):  # it has its form, and may not end yet: the form comes first
                formed = torch.zeros_like(row).masked_fill_(~allowed, -math.inf)
            row = formed
        return row

    def _take(self, token: int, row: torch.Tensor) -> None:
        self._said[token] += 1
        self._count += 1
        if self._matcher is not None:
            self._matcher.take(token)
        if self._thought is not None:
            self._thought.take(token)
        if self._asked.top_logprobs is not None:
            self._told += self._rate(row[None], [token])


class Decoders:
    """Makes the decoder of each answer of one model; the vocabulary is read for forms once.

    size: of the model's row of logits.
    """

    def __init__(self, tokenizer: Tokenizer, stop_ids: Sequence[int], size: int) -> None:
        self._tokenizer, self._stop_ids, self._size = tokenizer, tuple(stop_ids), size
        self._vocabulary: Vocabulary | None = None
        self._names = {token: text.encode() for text, token in getattr(tokenizer, "specials", {}).items()}

    def make(self, decoding: Decoding, prompt: Sequence[int] = ()) -> Decoder | None:
        """None for a request that asks for nothing. prompt: the ids before the answer.

        Raises FieldError for an id outside the vocabulary, a form that cannot be kept to, and a budget for thoughts
        that this model does not mark.
        """
        if decoding == PLAIN:
            return None
        for name, ids in (("logit_bias", decoding.logit_bias), ("stop_token_ids", decoding.stop_token_ids)):
            if any(token >= self._size for token in ids):
                raise FieldError(
                    tr("{name} names an id outside the vocabulary of {size}", name=name, size=self._size),
                    hint=tr("the ids were made by another model's tokenizer"),
                    code="decoding.ids",
                    param=name,
                )
        matcher = self._matcher(decoding)
        if matcher is not None and decoding.thinking_budget is not None:
            raise FieldError(
                tr("an answer held to a form has no thoughts, so a budget for them cannot be kept"),
                hint=tr("leave out one of the two"),
                code="decoding.thoughts",
                param=decoding.budget_param,
            )
        thought = self._thought(decoding, prompt)
        return Decoder(decoding, self._stop_ids, self._piece, matcher, thought)

    def _piece(self, token: int) -> bytes:
        return self._tokenizer.piece_bytes(token) or self._names.get(token, b"")

    def _matcher(self, decoding: Decoding) -> Matcher | None:
        if decoding.grammar is None:
            return None
        if not self._stop_ids:
            raise FieldError(
                tr("this model has no token that ends an answer, so it cannot be held to a form"),
                hint=tr("leave the field out"),
                code="decoding.no_end",
                param=decoding.grammar.param,
            )
        if self._vocabulary is None:
            self._vocabulary = Vocabulary(self._tokenizer, self._stop_ids, self._size)
        return Matcher(decoding.grammar, self._vocabulary)

    def _thought(self, decoding: Decoding, prompt: Sequence[int]) -> Thought | None:
        if (budget := decoding.thinking_budget) is None:
            return None
        for opens, closes in _MARKS:
            marks = [self._tokenizer.encode_special(text) for text in (opens, closes)]
            if all(len(ids) == 1 for ids in marks):
                close = self._tokenizer.encode_special(f"\n{closes}\n\n")
                return Thought(marks[0][0], close, marks[1][0], budget, prompt)
        raise FieldError(
            tr("this model does not mark its thoughts, so a budget for them cannot be kept"),
            hint=tr("leave the field out"),
            code="decoding.thoughts",
            param=decoding.budget_param,
        )


_MARKS = (("<think>", "</think>"), ("<seed:think>", "</seed:think>"), ("[THINK]", "[/THINK]"))
