"""A run: one loop from the first step to the adapter, which any stop leaves whole and any start takes up again."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from glmchat.core.errors import Failed, Usage
from glmchat.core.language import tr
from glmchat.tuning import faults, predict, state
from glmchat.tuning.effects import NEAR
from glmchat.tuning.examples import Example
from glmchat.tuning.forward import flatten, learned_of
from glmchat.tuning.order import Step, rate_at
from glmchat.tuning.planning import PROBED, Within, plan
from glmchat.tuning.samples import Question
from glmchat.tuning.settings import Settings
from glmchat.tuning.setup import Setup

Tell = Callable[[dict[str, Any]], None]
ADAPTER = "adapter"


@dataclass(frozen=True, slots=True)
class Probe:
    """What the trained model makes of some ids, float32 logits behind the last, and what was learned as a few numbers
    (tuning/effects.py): to be compared by who reads it back. near: how far off the numbers may be."""

    ids: tuple[int, ...]
    logits: torch.Tensor
    effects: Mapping[str, list[float]] = field(default_factory=dict)
    near: float = NEAR


@dataclass(frozen=True, slots=True)
class Result:
    """adapter: the folder of what was learned. stopped: before the last step, at a checkpoint. change: the length of
    what was added to the weights. evaluation: the last loss of the evaluation rows, None without any."""

    adapter: Path
    step: int
    steps: int
    stopped: bool
    loss: float
    evaluation: float | None
    change: float
    learning: int
    numbers: int
    tokens: int
    seconds: float
    facts: Mapping[str, Any] = field(default_factory=dict)
    probe: Probe | None = None  # None where it was stopped, and in processes that only help

    def to_json(self) -> dict[str, Any]:
        facts = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "probe"}
        return {**facts, "adapter": str(self.adapter)}


def train(
    model_folder: Path,
    dataset: Sequence[Example],
    settings: Settings,
    folder: Path,
    tell: Tell,
    stop: Callable[[], bool],
    *,
    evaluation: Sequence[Example] = (),
    questions: Sequence[Question] = (),
    within: Within | None = None,
    beginning: float = 0.0,
) -> Result:
    """Teach the model `dataset` by the method of the settings; everything written is below `folder`.

    A folder that holds a whole checkpoint of this very run is gone on with. tell: hears every event as a plain dict.
    stop: asked before each step; True saves and stops. within: minutes
    that a new run may take, and the settings of a run of so many steps. beginning: seconds that a process which reads
    the result back needs before it loads the base. Raises Usage, Damaged, DoesNotFit or Failed.
    """
    return _Run(model_folder, dataset, settings, folder, tell, evaluation, questions, within, beginning).go(stop)


class _Run(Setup):
    def __init__(
        self,
        model_folder: Path,
        dataset: Sequence[Example],
        settings: Settings,
        folder: Path,
        tell: Tell,
        evaluation: Sequence[Example],
        questions: Sequence[Question],
        within: Within | None = None,
        beginning: float = 0.0,
    ) -> None:
        super().__init__(model_folder, dataset, settings, evaluation, questions)
        self.folder, self.within, self.beginning = folder, within, beginning
        self.tell: Tell = tell if self.main else lambda event: None
        self.done, self.tokens, self.loss = 0, 0, math.nan
        self.evaluated: float | None = None
        self.guard = faults.Guard(far=self.method.far)
        self.saved: int | None = None  # the step of the last checkpoint

    def go(self, stop: Callable[[], bool]) -> Result:
        try:
            return self._go(stop)
        except RuntimeError as error:
            if (lost := self.sharing.lost(error, self.saved)) is None:
                raise
            raise lost from None

    def _go(self, stop: Callable[[], bool]) -> Result:
        started = time.perf_counter()
        planned = plan(self, self.folder, self.within, self.beginning)
        self.tell(planned)
        self._resume()
        self.sharing.join()
        stopped, begun = False, time.perf_counter()
        for step in self.steps[self.done :]:
            if stopped := self._agreed(stop()):
                break
            self._step(step)
            self._look(step)
        if stopped:
            self._save()
        change = self._finish(writes=not stopped)
        learned_in = time.perf_counter() - begun
        probe = None if stopped else self._probe()
        self.sharing.accelerator.wait_for_everyone()
        learning, numbers = self.method.count()
        return Result(
            self.folder / ADAPTER,
            self.done,
            len(self.steps),
            stopped,
            self.loss,
            self.evaluated,
            change,
            learning,
            numbers,
            self.tokens,
            time.perf_counter() - started,
            {
                "dtype": str(self.model.dtype).removeprefix("torch."),
                "quant": self.settings.quant,
                "device": self.device,
                "threads": self.threads,
                "processes": self.sharing.processes,
                "sharing": self.sharing.kind,
                "computed": str(self.method.dtype).removeprefix("torch."),
                "makes": self.method.makes,
                "stored": str(self.method.stored).removeprefix("torch."),
                "prediction": planned["prediction"],
                "peak": predict.peak_bytes(self.device),
                "seconds": learned_in,
                "data": self.fingerprint,
            },
            probe if self.main else None,
        )

    @torch.no_grad()
    def _probe(self) -> Probe | None:
        """Of the beginning of the first row."""
        if not self.main and not self.sharing.in_step:
            return None
        ids = self.dataset[0].ids[: min(PROBED, self.dataset[0].lengths[0])]
        self.model.eval()
        self.method.settle()
        with self.sharing.reading(), self.method.in_force():
            logits = self.model(torch.tensor(ids, device=self.device))[-1].float().cpu()
        everything = self.settings.dora or self.method.makes == "model"  # the lengths of a DoRA come of the base, too
        with self.sharing.whole(everything=everything):
            return Probe(ids, logits, self.method.effects(), self.method.near) if self.main else None

    def _record(self) -> dict[str, Any]:
        """What a checkpoint must agree with to be gone on with."""
        settings = self.settings.to_json()
        for free in ("memory", "checkpointing", "save_every", "evaluate_every", "sample_every", "sample_tokens", "keep",
                     "extra"):  # fmt: skip
            settings.pop(free)
        return {
            "settings": json.loads(json.dumps(settings)),
            "data": self.fingerprint,
            "learns": hashlib.sha256("\n".join(self.method.parameters).encode()).hexdigest(),
            "processes": self.sharing.processes,
            **({"sharing": self.sharing.kind} if self.sharing.kind else {}),
        }

    def _resume(self) -> None:
        saved = state.newest(self.folder / state.CHECKPOINTS)
        if saved is None:
            return
        record, own = saved.position.get("run"), self._record()
        if record != own:
            differs = next(
                (k for k in (*own, "sharing") if not isinstance(record, Mapping) or record.get(k) != own[k]), "settings"
            )
            raise Usage(
                tr("this folder holds a run with other {what}", what=differs),
                hint=tr("resume it as it was begun, or begin a new run"),
                code="tune.resume",
            )
        with self.sharing.whole(changes=True):
            self.method.read(saved.folder)
        self.sharing.restore(saved.tensors(state.OPTIMISER))
        torch.set_rng_state(saved.tensors(state.GENERATOR)["generator"])
        self.done, self.tokens = saved.step, int(saved.position["tokens"])
        self.loss, self.evaluated = float(saved.position["loss"]), saved.position["evaluation"]
        self.guard, self.saved = faults.Guard(saved.position.get("guard"), far=self.method.far), saved.step
        self.tell({"kind": "resumed", "step": self.done, "steps": len(self.steps)})

    # Steps

    def _step(self, step: Step) -> None:
        begun = time.perf_counter()
        sharing, own = self.sharing, self.sharing.passes_of(step)
        rate = rate_at(step.number, len(self.steps), self.settings)
        for group in sharing.optimiser.param_groups:
            group["lr"] = rate
        weight = max(1, sum(self.weights[number] for number in step.documents))
        self.seed(step.number)
        total, measured = torch.zeros((), dtype=torch.float64), torch.zeros_like(self.method.measured)
        for index, numbers in enumerate(own):
            self.method.measured.zero_()
            with sharing.between(last=index == len(own) - 1):
                loss = sharing.call(self.flat(numbers or step.passes[-1]))
                sharing.backward(loss * (sharing.processes / weight if numbers else 0.0))
            if numbers:
                total += loss.detach().double().cpu()
                measured += self.method.measured
        if sharing.processes > 1:
            sums = torch.cat([total[None], measured]).float()
            sums = sharing.summed(sums).double()
            total, measured = sums[0], sums[1:]
        before, self.loss = self.loss, float(total) / weight
        norm = sharing.norm(self.settings.clip)
        # Types that do not go together give a loss of exactly 0; what is known by heart comes to it by degrees.
        is_zero = self.loss == 0 and not before < 1e-3 and not self.method.learns_pairs
        if not math.isfinite(self.loss) or not math.isfinite(norm) or is_zero:
            with sharing.reading():
                raise faults.bad_step(self.method, self.dataset, step, self.loss, self.saved)
        self.guard.hear(step.number, self.loss, self.saved)
        if self.done == 0:
            sharing.check_gradients()
        sharing.step()
        seconds = time.perf_counter() - begun
        tokens = sum(self.lengths[number] for number in step.documents)
        self.done, self.tokens = step.number, self.tokens + tokens
        self._told(step, rate, norm, tokens, seconds, self._means(measured, weight))

    def _means(self, sums: torch.Tensor, weight: int) -> dict[str, float]:
        """What the method measures besides its loss, by its names."""
        return dict(zip(self.method.measures, (sums / weight).tolist(), strict=True))

    def _told(
        self, step: Step, rate: float, norm: float, tokens: int, seconds: float, measures: Mapping[str, float]
    ) -> None:
        speed = tokens / max(seconds, 1e-9)
        left = sum(self.lengths[number] for each in self.steps[self.done :] for number in each.documents)
        widest = max(sum(self.lengths[n] for n in numbers) for numbers in step.passes)
        self.tell(
            {
                "kind": "step",
                "step": step.number,
                "steps": len(self.steps),
                "epoch": step.epoch,
                "loss": self.loss,
                **measures,
                "lr": rate,
                "grad_norm": norm,
                "tokens": tokens,
                "tokens_per_second": speed,
                "memory": predict.resident_bytes(self.device),
                "seconds_left": left / speed,
                "worst": widest / max(1, self.settings.row_tokens),
            }
        )

    def _look(self, step: Step) -> None:
        """What is due after a step: an evaluation, samples, a checkpoint."""
        settings, last = self.settings, step.number == len(self.steps)
        if self.evaluation and (last or _due(step.number, settings.evaluate_every)):
            self.evaluated, measures = self._evaluate()
            self.tell({"kind": "evaluation", "step": step.number, "loss": self.evaluated, **measures})
        if self.sampler is not None and (last or _due(step.number, settings.sample_every)):
            with self.sharing.reading(), self.method.in_force():
                for sample in self.sampler.answers():
                    self.tell({"kind": "sample", "step": step.number, **sample})
        if last or (_due(step.number, settings.save_every) and not self.guard.is_high):
            self._save()

    @torch.no_grad()
    def _evaluate(self) -> tuple[float, dict[str, float]]:
        """Mean loss of the evaluation rows, one after the other: nothing is stacked; and what else tells of them."""
        self.model.eval()
        self.method.measured.zero_()
        try:
            total = sum(float(self.learner(flatten([example], self.device))) for example in self.evaluation)
        finally:
            self.model.train()
        of_tokens = not self.method.learns_pairs
        weight = max(1, sum(map(learned_of, self.evaluation))) if of_tokens else len(self.evaluation)
        loss, measures = total / weight, self._means(self.method.measured, weight)
        return loss, {**measures, **({"perplexity": math.exp(min(loss, 700.0))} if of_tokens else {})}

    def _agreed(self, wanted: bool) -> bool:
        """Whether any process was asked to stop: all stop at one step, or none."""
        return bool(self.sharing.summed(torch.tensor(float(wanted))) > 0)

    # What is written

    def _save(self) -> None:
        moments = self.sharing.moments()
        with self.sharing.whole():
            if self.main:
                self._write(moments)

    def _write(self, moments: Mapping[str, torch.Tensor]) -> None:
        position = {
            "run": self._record(),
            "tokens": self.tokens,
            "loss": self.loss,
            "evaluation": self.evaluated,
            "guard": self.guard.to_json(),
            "epoch": self.steps[self.done - 1].epoch if self.done else 0,
        }
        places, generator = self.folder / state.CHECKPOINTS, torch.get_rng_state()
        state.save(places, self.done, position, moments, generator, self.method.save, self.settings.keep)
        self.saved = self.done
        self.tell({"kind": "checkpoint", "step": self.done})

    def _finish(self, *, writes: bool) -> float:
        """How far the model was moved. writes: and the adapter in its folder, whole or not there."""
        with self.sharing.whole(everything=writes and self.method.makes == "model"):
            if not self.main:
                return 0.0
            if writes:
                self._write_result()
            return self.method.change()

    def _write_result(self) -> None:
        wrong = [name for name, value in self.method.parameters.items() if not bool(value.isfinite().all())]
        if wrong:
            raise Failed(
                tr("{name} holds numbers that are not finite (NaN or infinity)", name=wrong[0]),
                hint=tr("take an earlier checkpoint, and a lower learning rate"),
                code="tune.not_finite",
            )
        beside = self.folder / f".{ADAPTER}"
        state.replace_folder(self.folder / ADAPTER, beside, self.method.write)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
