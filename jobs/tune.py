"""Learns an adapter or a model: a program of its own session, so that no lost terminal and no killed view ends it.

    python -P -m glmchat.jobs.tune RUN [--go]
    python -P -m torch.distributed.run --standalone --nproc_per_node N -m glmchat.jobs.tune RUN --go

RUN is a run's folder (core/run_folder.py), which says what is to be learned and takes all that comes of it. Without
--go the plan is told and "go" awaited on stdin; at the end of stdin instead, nobody wants it, and the folder goes.
SIGTERM and SIGINT save and stop, a second one stops at once; SIGHUP is nothing to it.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from glmchat.checkpoints.adapter_files import weight_files
from glmchat.core import repetition
from glmchat.core.errors import Damaged, Failed, GlmchatError, Interrupted, refusal
from glmchat.core.fingerprints import fingerprint, whole
from glmchat.core.language import tr
from glmchat.core.messages import Message
from glmchat.core.run_folder import Run
from glmchat.core.run_log import LogReader, LogWriter, Progress, curve_svg
from glmchat.core.text import duration, human_bytes, one_line
from glmchat.engine import identity
from glmchat.engine.adapters.attach import check_numbers
from glmchat.engine.adapters.files import read_adapter
from glmchat.engine.prompts.base import NoChat
from glmchat.engine.prompts.template import CPMPrompt
from glmchat.hub import adapters, trained_models
from glmchat.hub.adapters import Origin
from glmchat.jobs.add_adapter import digest_of
from glmchat.tuning.dataset import Dataset, read_dataset
from glmchat.tuning.lora import ALL_LINEAR, write_bare
from glmchat.tuning.methods import refuse_family
from glmchat.tuning.options import DataOptions, PromptSide, load_prompt_side
from glmchat.tuning.order import enough, steps_of
from glmchat.tuning.page import Facts, lines
from glmchat.tuning.recipes import Recipe
from glmchat.tuning.samples import Question
from glmchat.tuning.scratch import make_start
from glmchat.tuning.settings import Settings, usual
from glmchat.tuning.sources import find_sources, form_of
from glmchat.tuning.trainer import Result, train

_SETTINGS = (
    "method", "rank", "alpha", "dropout", "targets", "rslora", "dora", "prefix_length", "prefix_projection", "beta",
    "loss", "last_layers", "quant", "dtype", "device", "threads", "epochs", "steps", "tokens_per_step", "row_tokens",
    "checkpointing", "save_every", "seed",
)  # fmt: skip
_MOST_OFF = 0.1  # of what the adapter moves the logits by; or so many roundings of the largest
_ROUNDINGS = 16
_DRAWN = ("evaluation", "checkpoint", "end")  # records behind which the curve is drawn anew
_WEIGHTS = (".safetensors", ".bin")
IS_MAIN = os.environ.get("RANK", "0") == "0"  # of several processes that accelerate started, one tells and writes


class NotWanted(Exception):
    """The plan was looked at, and nobody said go."""


class Teller:
    """Writes what happens into the folder; hears signals.

    A record that the disk does not take ends the run: its last checkpoint is whole.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.told = 0  # signals
        self.learning = False
        self._progress = Progress()
        self._progress.add(LogReader(run.log).read())
        self._log = LogWriter(run.log) if IS_MAIN else None

    def __call__(self, record: Mapping[str, Any]) -> None:
        if self._log is None:
            return
        self._log(record)
        self._progress.add([record])
        if record["kind"] == "sample":
            lines = f"step {record['step']}\n? {record['question']}\n{record['answer']}\n\n"
            with _appending(self.run.folder / "samples.txt") as file:
                file.write(lines)
        if record["kind"] in _DRAWN:
            self.run.write("curve.svg", curve_svg(self._progress))

    def hear(self, number: int, frame: object) -> None:
        """A signal: before it learns there is nothing to save."""
        self.told += 1
        if not self.learning or self.told > 1:
            with suppress(OSError):
                self.end("stopped", _stopped())
            os._exit(Interrupted.exit)
        with suppress(OSError):
            self.note("stopping")

    def note(self, state: Any) -> None:
        if IS_MAIN:
            self.run.note(state)

    def end(self, state: Any, problem: GlmchatError | None = None, **facts: Any) -> None:
        """The last record, and the last word of state.json. What the full disk does not take is told by its absence."""
        told = {} if problem is None else problem.to_json()
        try:
            self({"kind": "end", "state": state, **told, **facts})
        finally:
            self.note(state)


def _appending(path: Path) -> Any:
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
    return os.fdopen(os.open(path, flags, 0o600), "a", encoding="utf-8", errors="replace")


def _stopped() -> Interrupted:
    return Interrupted(tr("stopped"), hint=tr("resume it as it was begun, or begin a new run"), code="tune.stopped")


def work(run: Run, teller: Teller, *, goes: bool) -> None:
    """From the rows to the adapter or the model in the store."""
    recipe = run.recipe()
    teller({"kind": "stage", "say": tr("reading the rows")})
    if "words" in recipe:
        recipe = _start(run, recipe)
    side = load_prompt_side(Path(recipe["folder"]))
    try:
        original = data_options(recipe).recipe(side.checkpoint.spec.family)
        refuse_family(side.checkpoint, recipe.get("method", ""))
        kept = run.folder if IS_MAIN else None  # each reads for itself; one writes
        dataset = read_dataset(recipe["data"], data_options(recipe), side, folder=kept)
        questions = _questions(recipe.get("samples", ()), recipe.get("system"), side)
        conditions = _conditions(recipe, side)
    finally:
        side.close()
    earlier = None
    if asked := recipe.get("again"):
        if (earlier := repetition.original_of(run, asked)) is None:
            teller({"kind": "stage", "say": tr("the run {name} is gone, so there is nothing to compare this one with",
                                               name=asked)})  # fmt: skip
        else:
            repetition.require_same_files(earlier, conditions)
    width = side.checkpoint.spec.hidden_size
    if (result := _learn(run, teller, dataset, questions, original, width, conditions, goes=goes)) is None:
        return
    if result.stopped:
        teller.end("stopped", _stopped())
        return
    teller({"kind": "stage", "say": tr("reading it back in a fresh process")})
    trained = {
        "recipe": {name: value for name, value in recipe.items() if name not in ("folder", "data")},
        "data": [one_line(str(path), 400) for path in recipe["data"]],
        "data_hash": dataset.fingerprint,
        "template": side.prompt.identity,
        "like": recipe.get("like"),
        "system": dataset.facts.systems[0] if len(dataset.facts.systems) == 1 else None,
        "loss": result.loss,
        "evaluation": result.evaluation,
        "steps": result.step,
        "tokens": result.tokens,
        "delta": result.change,
        "run": run.id,
        "facts": dict(result.facts),
    }
    hashes = {path.name: whole(path) for path in sorted(result.adapter.iterdir()) if path.suffix in _WEIGHTS}
    told: dict[str, Any] = {} if earlier is None else {"again": repetition.compared(earlier, run, hashes)}
    teller.end("done", **register(run, recipe, trained, result), hashes=hashes, **told)


def _conditions(recipe: Mapping[str, Any], side: PromptSide) -> dict[str, Any]:
    """What a repetition has to share (core/repetition.py), as far as it is known before the model is loaded."""
    options, path = data_options(recipe), side.checkpoint.path
    form = form_of(options.format, options.columns)
    sources = find_sources(recipe["data"], mixes=options.mixes, evaluation=options.evaluation, form=form)
    return {
        "data": {str(source.path): whole(source.path) for source in sources},
        "base": {file.name: file.digest for file in fingerprint(identity.weight_files(path))},
        "template": side.prompt.identity,
        **identity.versions(),
    }


def _start(run: Run, recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe of a model from scratch with its first numbers as the base: made once, in the run's folder."""
    folder = run.folder / "base"
    if IS_MAIN and not folder.exists():
        make_start(recipe["words"], Path(recipe["config"]), recipe["data"], recipe.get("seed", 0), folder)
    if recipe.get("folder") != str(folder) and IS_MAIN:
        run.write("recipe.json", json.dumps({**recipe, "folder": str(folder)}, ensure_ascii=False, indent=1))
    while not folder.exists() or "folder" not in run.recipe():  # the other processes wait for the main one
        time.sleep(0.1)
    return run.recipe()


def _learn(
    run: Run,
    teller: Teller,
    dataset: Dataset,
    questions: list[Any],
    original: Recipe | None,
    width: int,
    conditions: Mapping[str, Any],
    *,
    goes: bool,
) -> Result | None:
    """None in a process that only helps the main one."""
    asked = run.recipe()
    settings, minutes = settings_of(asked, dataset, original, width), asked.get("minutes")
    timeless = {name: value for name, value in asked.items() if name not in ("minutes", "epochs")}
    teller({"kind": "stage", "say": tr("loading the model, and measuring two passes over the longest rows")})
    result = train(
        Path(asked["folder"]),
        dataset.examples,
        settings,
        run.folder,
        _Plan(run, teller, dataset.facts, conditions, goes=goes),
        lambda: teller.told > 0,
        evaluation=dataset.evaluation,
        questions=questions,
        within=None
        if minutes is None
        else (minutes, lambda steps: settings_of({**timeless, "steps": steps}, dataset, original, width)),
    )
    return result if IS_MAIN else None


class _Plan:
    """Hears what the trainer tells. Behind its plan the page is told, and what was read of the data with it; where a
    person is asked, this waits."""

    def __init__(self, run: Run, teller: Teller, facts: Facts, conditions: Mapping[str, Any], *, goes: bool) -> None:
        self._run, self._teller, self._facts, self._conditions, self._goes = run, teller, facts, conditions, goes

    def __call__(self, record: Mapping[str, Any]) -> None:
        if record["kind"] == "plan":
            self._tell_page(record)
        else:
            self._teller(record)

    def _tell_page(self, plan: Mapping[str, Any]) -> None:
        recipe = self._run.recipe()
        if "minutes" in recipe and IS_MAIN:  # so many steps fit into them: they are the run's, also where it goes on
            recipe = {name: value for name, value in recipe.items() if name not in ("minutes", "epochs")}
            text = json.dumps({**recipe, "steps": plan["steps"]}, ensure_ascii=False, indent=1)
            self._run.write("recipe.json", text)
        words = [*lines(self._facts), "", *plan_lines(plan)]
        self._teller({"kind": "page", "words": words, "facts": self._facts.to_json(), "plan": dict(plan)})
        if not self._goes:
            self._teller.note("waiting")
            if sys.stdin.readline().strip() != "go":
                raise NotWanted
        self._teller.learning = True
        self._teller.note("running")
        computed = {name: plan[name] for name in ("threads", "dtype")}
        self._teller({"kind": "start", "conditions": {**self._conditions, **computed}})


def data_options(recipe: Mapping[str, Any]) -> DataOptions:
    """What reads the data is told; what was not asked for is its own to choose."""
    names = {"on": "on", "like": "like", "over_length": "over_length", "max_length": "max_length", "format": "format",
             "columns": "columns", "eval": "evaluation", "system": "system", "seed": "seed",
             "stride": "stride"}  # fmt: skip
    asked = {field: recipe[name] for name, field in names.items() if name in recipe}
    return DataOptions(**asked, pairs=recipe.get("method") == "dpo", mixes=tuple(recipe.get("mix", ())))


def settings_of(recipe: Mapping[str, Any], dataset: Dataset, original: Recipe | None, width: int = 4096) -> Settings:
    """What learns is told: what was asked for, else what the original does, else our own.

    width: the model's hidden size. Where nobody says how often a checkpoint is written: ten times, and then it also
    judges and answers.
    """
    names = {"lr": "learning_rate", "optimiser_dtype": "moments", **{name: name for name in _SETTINGS}}
    asked = {field: recipe[name] for name, field in names.items() if name in recipe}
    if (
        isinstance(targets := asked.get("targets"), str)
        and re.fullmatch(r"[\w.,-]+", targets)
        and targets != ALL_LINEAR
    ):
        asked["targets"] = tuple(targets.split(","))
    if "device" not in asked and torch.cuda.is_available():
        asked["device"] = "cuda"
    if original is not None:
        given = {"method": original.method, **original.settings}
    else:
        given = dict(usual(asked.get("method", "lora"), width))
    settings = Settings.from_json({**given, **asked})
    if original is None and "tokens_per_step" not in asked:
        settings = enough(dataset.examples.lengths, settings)
    steps = len(steps_of(dataset.examples.lengths, settings))
    if original is None and settings.warmup * steps < 1:  # the first step of a warm-up learns nothing
        settings = replace(settings, warmup=0.0)
    if settings.method == "scratch" and not settings.save_every and settings.epochs:  # as the original: each epoch
        settings = replace(settings, save_every=max(1, steps // settings.epochs))
    every = settings.save_every or max(5, min(200, steps // 10))
    return replace(settings, save_every=every, evaluate_every=settings.evaluate_every or every, sample_every=every)


def _questions(texts: Sequence[str], system: str | None, side: PromptSide) -> list[Question]:
    """Each as a row of the data would have it."""
    if isinstance(side.prompt, NoChat | CPMPrompt):  # it goes on with a text
        return [Question(text, tuple(side.prompt.complete(text))) for text in texts]
    before = [Message("system", system)] if system else []
    return [Question(text, tuple(side.prompt.render([*before, Message("user", text)]))) for text in texts]


def plan_lines(plan: Mapping[str, Any]) -> list[str]:
    """The trainer's part of the page: steps, what learns, and what it will take."""
    found = plan["prediction"]
    told = []
    if plan["makes"] == "model":
        told.append(
            tr(
                "weights learn in float32, moments in {moments}; the model is written in {stored}, as its base",
                moments=plan["moments"],
                stored=plan["stored"],
            )
        )
    return [
        tr(
            "{steps:,} steps; {learning:,} of {numbers:,} parameters are trained, in {layers} layers ({dtype})",
            steps=plan["steps"],
            learning=plan["learning"],
            numbers=plan["numbers"],
            layers=plan["layers"],
            dtype=plan["dtype"],
        ),
        tr(
            "memory {memory}{twice}; disk {disk}; about {time} at {speed:,.0f} tokens/s (measured on the longest rows)",
            memory=human_bytes(found["peak"]),
            twice=tr(", layers computed twice") if plan["checkpointing"] else "",
            disk=human_bytes(plan["disk"]),
            time=duration(found["seconds"]),
            speed=found["tokens_per_second"],
        ),
        *told,
    ]


def register(run: Run, recipe: Mapping[str, Any], trained: Mapping[str, Any], result: Result) -> dict[str, Any]:
    """Read what was learned back in a fresh process, compare it with what was trained, and bring it into the store.

    Raises Damaged where it answers otherwise: then nothing is in the store.
    """
    base = recipe.get("base_note") or {"name": recipe["base"]}
    told = {"delta": result.change, "loss": result.loss, "evaluation": result.evaluation}
    name, place = recipe["name"], result.adapter
    if result.facts["makes"] == "model":
        off = read_back(recipe, result, place)
        trained = {**trained, "read_back": off, "base": base}
        row = trained_models.keep(place, trained_models.unused_name(name), recipe["base"], trained)
        return {"model": row.name, "read_back": off, **told}
    if recipe.get("output") == "pt":
        place = run.folder / "bare" / f"{name}.pt"
        place.parent.mkdir(exist_ok=True)
        write_bare(place, result.adapter)
    off = read_back(recipe, result, place)
    adapter = read_adapter(place)
    check_numbers(adapter)
    facts = {**adapter.to_json(), "digest": digest_of(place), "checked_against": base}
    facts["trained"] = {**trained, "read_back": off}
    files = [*adapters.companions(place), *weight_files(place)]
    if adapters.by_name(name) is not None:  # it came while this one learned
        name = adapters.unused_name(name)
    origin = Origin(f"glmchat tune {run.id}")
    row = adapters.keep(name, list(dict.fromkeys(files)), facts, origin, base=adapter.base)
    return {"adapter": row.name, "read_back": off, **told, **({"positions": adapter.length} if adapter.length else {})}


def _fresh(request: Mapping[str, Any]) -> dict[str, Any]:
    """The last that jobs/read_back.py tells. Its stdin stays open: at its end it would stop."""
    command = [sys.executable, "-P", "-m", "glmchat.jobs.read_back"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/") as child:
        assert child.stdin is not None and child.stdout is not None
        child.stdin.write(json.dumps(request) + "\n")
        child.stdin.flush()
        lines = child.stdout.readlines()
    told: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    return told


def read_back(recipe: Mapping[str, Any], result: Result, place: Path) -> float:
    """How far at most the logits of a fresh process that reads `place` are from those of the trained model.

    Raises Damaged where that is no rounding: more than a tenth of what the adapter moves them by.
    """
    settings, probe = result.facts, result.probe
    assert probe is not None
    request = {
        "base": recipe["folder"],
        settings.get("makes", "adapter"): str(place),
        "ids": list(probe.ids),
        "quant": settings["quant"],
        "dtype": settings["dtype"],
        "device": settings["device"],
        "threads": settings["threads"],
    }
    told = _fresh(request)
    if told.get("event") == "error":
        raise GlmchatError.from_json(told)
    if told.get("event") != "result":
        raise Failed(
            tr("it could not be read back in a fresh process"),
            hint=tr("its log is {path}", path=str(result.adapter.parent / "job.log")),
            code="tune.not_read",
        )
    base, fresh = torch.tensor(told["base"]), torch.tensor(told["learned"])
    off, moved = float((fresh - probe.logits).abs().max()), float((fresh - base).abs().max())
    epsilon = torch.finfo(getattr(torch, settings.get("stored", settings["dtype"]))).eps
    if not off <= max(_MOST_OFF * moved, _ROUNDINGS * epsilon * float(fresh.abs().max())):
        raise Damaged(
            tr("read back in a fresh process it answers otherwise: logits off by {off}, moved by {moved}",
               off=f"{off:.3g}", moved=f"{moved:.3g}"),
            hint=tr("nothing was put into the store; the run's folder keeps it: {path}", path=str(place)),
            code="tune.read_back",
        )  # fmt: skip
    return off


def _forget(run: Run) -> None:
    """Of a plan that failed nothing stays, once whoever asked for it has heard why, or is gone."""
    sys.stdin.readline()
    run.remove()


def main() -> int:
    """Returns the exit code; what failed stands in the log."""
    run = Run(Path(sys.argv[1]).absolute())
    goes = "--go" in sys.argv[2:]
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    os.umask(0o077)
    teller = Teller(run)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, teller.hear)
    try:
        teller.note("planning")
        work(run, teller, goes=goes)
    except NotWanted:
        run.remove()
        return 0
    except GlmchatError as problem:
        teller.end("failed", problem)
        if not goes and not teller.learning:
            _forget(run)
        return problem.exit
    except OSError as error:
        if (refused := refusal(error)) is None:
            raise
        with suppress(OSError):
            teller.end("failed", refused)
        return refused.exit
    except Exception as error:  # noqa: BLE001 (nobody else would hear of it)
        traceback.print_exc()
        wrong = Failed(
            tr("the run failed by a mistake of glmchat: {error}", error=one_line(f"{error!r}", 300)),
            hint=tr("its log is {path}", path=str(run.folder / "job.log")),
            code="tune.bug",
        )
        teller.end("failed", wrong)
        return wrong.exit
    return Interrupted.exit if teller.told else 0


if __name__ == "__main__":
    sys.exit(main())
