"""What a run is made of, loaded and checked: rows, base, method, the processes that share it, and its steps."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from glmchat.core.errors import Usage
from glmchat.core.language import tr
from glmchat.engine.quantize.linear import kernels_in
from glmchat.tuning.examples import Example
from glmchat.tuning.forward import Flat, flatten, load_base
from glmchat.tuning.methods import method_of
from glmchat.tuning.methods.base import Method
from glmchat.tuning.order import read_through, steps_of
from glmchat.tuning.samples import Question, Sampler
from glmchat.tuning.settings import Settings
from glmchat.tuning.sharing import sharing_of


class Learner(nn.Module):
    """The model as one call from documents to a loss, which is what several processes need to agree on gradients."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.model, self.beside = method.model, method.beside  # so that their parameters are this module's
        self.method = method
        self.by_layer = False

    def forward(self, flat: Flat) -> torch.Tensor:
        return self.method.loss(flat, by_layer=self.by_layer)


class Setup:
    """lengths, learned: tokens of each row, in all and of those that count; weights: what each row counts in the loss
    of a step. loading: seconds that the base took. kernel: what computes its matrices. sampler: None where this process
    answers no questions."""

    def __init__(
        self,
        model_folder: Path,
        dataset: Sequence[Example],
        settings: Settings,
        evaluation: Sequence[Example],
        questions: Sequence[Question],
    ) -> None:
        """Raises Usage or Damaged."""
        self.dataset, self.evaluation = dataset, evaluation
        self.sharing = sharing_of(settings)
        self.device, self.main = self.sharing.device, self.sharing.main
        self.lengths, self.learned, self.fingerprint = read_through(dataset)
        self.plan_steps(settings)
        begun = time.perf_counter()
        self.checkpoint, self.model, self.threads = load_base(model_folder, settings, self.device, self.sharing.home)
        self.loading = time.perf_counter() - begun
        self.sharing.refuse_model(self.model)
        self.kernel = "+".join(kernels_in(self.model)) or "dense"
        self.method = method_of(self.checkpoint, self.model, settings)
        self._refuse_too_long()
        self._refuse_other_rows()
        self.weights = [1] * len(self.lengths) if self.method.learns_pairs else self.learned
        self.model.train()
        self.learner = Learner(self.method)
        self.sampler: Sampler | None = None
        if questions and (self.main or self.sharing.in_step):
            agreed = self.sharing.agreed
            self.sampler = Sampler(self.checkpoint, self.model, questions, settings.sample_tokens, agreed)

    def plan_steps(self, settings: Settings) -> None:
        self.settings, self.steps = settings, steps_of(self.lengths, settings)

    def flat(self, numbers: Sequence[int]) -> Flat:
        return flatten([self.dataset[number] for number in numbers], self.device)

    def seed(self, step: int) -> None:
        """Dropout of a step is a function of the seed and the step: neither samples nor evaluations move it."""
        torch.manual_seed((self.settings.seed * 1_000_003 + step * 8191 + self.sharing.index) % (1 << 63))

    def _refuse_too_long(self) -> None:
        context, virtual = self.checkpoint.spec.context, self.method.virtual
        long = [number for number, length in enumerate(self.lengths) if length + virtual > context]
        longest = max((self.dataset[n] for n in long), key=lambda example: max(example.lengths), default=None)
        if longest is not None and max(longest.lengths) + virtual > context:
            said = {"place": str(longest.place), "length": max(longest.lengths), "context": context}
            raise Usage(
                tr(
                    "{place} has {length:,} tokens, and the model reads {context:,} at most, {virtual:,} of them the "
                    "prefix",
                    **said,
                    virtual=virtual,
                )
                if virtual
                else tr("{place} has {length:,} tokens, and the model reads {context:,} at most", **said),
                hint=tr("cut rows with --max-length {context}", context=context - virtual)
                if context - virtual > 1
                else tr("take a shorter prefix: --prefix-length"),
                code="tune.length",
            )

    def _refuse_other_rows(self) -> None:
        first = (rows[0] for rows in (self.dataset, self.evaluation) if rows)  # a reading of data gives one kind alone
        found = next((each for each in first if bool(each.second) != self.method.learns_pairs), None)
        if found is not None:
            what = tr("a pair of answers") if found.second else tr("a single answer")
            raise Usage(
                tr("{place} is {what}, and the method {method} learns none", place=str(found.place), what=what,
                   method=self.settings.method),
                hint=tr("pairs of a better and a worse answer are learned by --method dpo, and by it alone"),
                code="tune.rows",
            )  # fmt: skip
