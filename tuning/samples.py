"""Answers of the model as it is while it learns, greedily, so that one sees from step to step what changes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from glmchat.engine.families import Checkpoint
from glmchat.engine.models.base import LanguageModel
from glmchat.tuning.prompt_side import load_prompt_side


@dataclass(frozen=True, slots=True)
class Question:
    """ids: the question as a row of the data would have it, up to where the answer begins."""

    text: str
    ids: tuple[int, ...]


class Sampler:
    def __init__(
        self,
        checkpoint: Checkpoint,
        model: LanguageModel,
        questions: Sequence[Question],
        most: int,
        agreed: Callable[[int], int] = int,
    ) -> None:
        """most: tokens of an answer. agreed: the token that all processes that answer together go on with."""
        self._model, self._questions, self._most, self._agreed = model, questions, most, agreed
        side = load_prompt_side(checkpoint.path)
        self._tokenizer, self._stops = side.tokenizer, frozenset(side.prompt.stop_ids)
        side.close()

    def answers(self) -> Iterator[dict[str, Any]]:
        """{"question", "answer", "stopped": it ended by itself} of each question."""
        was = self._model.training
        self._model.eval()
        try:
            for question in self._questions:
                ids, stopped = self._answer(question.ids, self._most)
                yield {"question": question.text, "answer": self._tokenizer.decode(ids), "stopped": stopped}
        finally:
            self._model.train(was)

    def seconds(self, tokens: int) -> float:
        """What the answers will take where each has so many tokens, from a few of the first one."""
        ids, few = self._questions[0].ids, 5
        was = self._model.training
        self._model.eval()
        ends = [time.perf_counter()]
        for most in (1, 1, few):  # the first warms up
            self._answer(ids, most)
            ends.append(time.perf_counter())
        self._model.train(was)
        first, all_ = ends[2] - ends[1], ends[3] - ends[2]
        return len(self._questions) * (first + max(0.0, all_ - first) / (few - 1) * min(tokens, self._most))

    @torch.no_grad()
    def _answer(self, ids: Sequence[int], most: int) -> tuple[list[int], bool]:
        device = next(self._model.parameters()).device
        most = min(most, self._model.spec.context - len(ids))  # GPT-2 has learned no positions behind
        cache = self._model.new_cache(len(ids) + most, self._model.dtype)
        answer: list[int] = []
        following = torch.tensor(ids, device=device)
        while len(answer) < most:
            token = self._agreed(int(self._model(following, cache, last_only=True)[-1].argmax()))
            if token in self._stops:
                return answer, True
            answer.append(token)
            following = torch.tensor([token], device=device)
        return answer, False
