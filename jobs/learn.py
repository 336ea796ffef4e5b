"""From the rows of a run to the adapter or the model in the store: what of jobs/tune.py loads torch."""

from __future__ import annotations

import gc
import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from glmchat.checkpoints.adapter_files import weight_files
from glmchat.core import repetition
from glmchat.core.errors import Damaged, Failed, GlmchatError
from glmchat.core.fingerprints import fingerprint, whole
from glmchat.core.language import tr
from glmchat.core.messages import Message
from glmchat.core.run_folder import Run
from glmchat.core.text import one_line
from glmchat.engine import identity
from glmchat.engine.adapters.attach import check_numbers
from glmchat.engine.adapters.files import read_adapter
from glmchat.engine.formats.weights import trim
from glmchat.engine.prompts.base import NoChat
from glmchat.engine.prompts.template import CPMPrompt
from glmchat.hub import adapters, trained_models
from glmchat.hub.adapters import Origin
from glmchat.jobs.telling import IS_MAIN, Plan, Teller, stopped
from glmchat.tuning.dataset import Dataset, read_dataset
from glmchat.tuning.effects import first_other
from glmchat.tuning.lora import write_bare
from glmchat.tuning.options import DataOptions
from glmchat.tuning.order import enough, steps_of
from glmchat.tuning.prompt_side import PromptSide, load_prompt_side
from glmchat.tuning.recipes import Recipe
from glmchat.tuning.samples import Question
from glmchat.tuning.scratch import make_start
from glmchat.tuning.settings import Settings, targets_of, usual
from glmchat.tuning.sources import find_sources, form_of
from glmchat.tuning.trainer import Result, train

_SETTINGS = (
    "method", "rank", "alpha", "dropout", "targets", "rslora", "dora", "prefix_length", "prefix_projection", "beta",
    "loss", "last_layers", "quant", "dtype", "device", "threads", "epochs", "steps", "tokens_per_step", "row_tokens",
    "checkpointing", "save_every", "seed",
)  # fmt: skip
_MOST_OFF = 0.1  # of what the adapter moves the logits by; or so many roundings of the largest
_ROUNDINGS = 16
_WEIGHTS = (".safetensors", ".bin")


def work(run: Run, teller: Teller, *, goes: bool, beginning: float = 0.0) -> None:
    """From the rows to the adapter or the model in the store. beginning: seconds that it took to import this."""
    recipe = run.recipe()
    if "words" in recipe:
        recipe = _start(run, recipe)
    side = load_prompt_side(Path(recipe["folder"]))
    try:
        original = DataOptions.of(recipe).recipe(side.checkpoint.spec.family)
        kept = run.folder if IS_MAIN else None  # each reads for itself; one writes
        dataset = read_dataset(recipe["data"], DataOptions.of(recipe), side, folder=kept)
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
    if (result := _learn(run, teller, dataset, questions, original, width, conditions, beginning, goes=goes)) is None:
        return
    if result.stopped:
        teller.end("stopped", stopped())
        return
    gc.collect()  # weights, gradients and moments of the run, that the fresh process may need the room of
    trim()
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
    options, path = DataOptions.of(recipe), side.checkpoint.path
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
    beginning: float,
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
        Plan(run, teller, dataset.facts, conditions, goes=goes),
        teller.asked,
        evaluation=dataset.evaluation,
        questions=questions,
        beginning=beginning,
        within=None
        if minutes is None
        else (minutes, lambda steps: settings_of({**timeless, "steps": steps}, dataset, original, width)),
    )
    return result if IS_MAIN else None


def settings_of(recipe: Mapping[str, Any], dataset: Dataset, original: Recipe | None, width: int = 4096) -> Settings:
    """What learns is told: what was asked for, else what the original does, else our own.

    width: the model's hidden size. Where nobody says how often a checkpoint is written: ten times, and then it also
    judges and answers.
    """
    names = {"lr": "learning_rate", "optimiser_dtype": "moments", **{name: name for name in _SETTINGS}}
    asked = {field: recipe[name] for name, field in names.items() if name in recipe}
    if "targets" in asked:
        asked["targets"] = targets_of(asked["targets"])
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
    facts = {**adapter.to_json(), "digest": adapters.digest_of(place), "checked_against": base}
    facts["trained"] = {**trained, "read_back": off}
    files = [*adapters.companions(place), *weight_files(place)]
    if adapters.by_name(name) is not None:  # it came while this one learned
        name = adapters.unused_name(name)
    origin = Origin(f"glmchat tune {run.id}")
    row = adapters.keep(name, list(dict.fromkeys(files)), facts, origin, base=adapter.base)
    return {"adapter": row.name, "read_back": off, **told, **({"positions": adapter.length} if adapter.length else {})}


def _fresh(request: Mapping[str, Any]) -> dict[str, Any]:
    """The last that jobs/read_back.py tells. Its stdin stays open: at its end it would stop. Raises Failed where it was
    killed."""
    command = [sys.executable, "-P", "-m", "glmchat.jobs.read_back"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/") as child:
        assert child.stdin is not None and child.stdout is not None
        child.stdin.write(json.dumps(request) + "\n")
        child.stdin.flush()
        lines = child.stdout.readlines()
    if child.returncode == -signal.SIGKILL:
        raise Failed(
            tr("the process that reads it back was killed (signal 9): usually the system was out of memory"),
            hint=tr("close other programs, and resume the run: all its steps are done"),
            code="tune.not_read",
        )
    told: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    return told


def read_back(recipe: Mapping[str, Any], result: Result, place: Path) -> float:
    """How far at most the logits of a fresh process that reads `place` are from those of the trained model.

    Raises Damaged where what a layer adds, a prefix's rows or a model's tensor is another one, whatever the type; or
    where logits differ by more than the kernels round: a tenth of what was learned moves them by. A LoRA is multiplied
    in the base's type while it learns and in float32 by the engine; prefixes and whole models answer by one code.
    """
    settings, probe = result.facts, result.probe
    assert probe is not None
    request = {
        "base": recipe["folder"],
        settings.get("makes", "adapter"): str(place),
        "ids": list(probe.ids),
        "quant": settings["quant"],
        "dtype": settings["dtype"],
        "device": "cpu" if settings.get("sharing") else settings["device"],  # one card may be too small for all of it
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
    other = first_other(probe.effects, told["effects"], probe.near)
    if probe.effects and other is not None:
        raise Damaged(
            tr("read back in a fresh process {layer} is something else than was learned", layer=one_line(other, 120)),
            hint=tr("nothing was put into the store; the run's folder keeps it: {path}", path=str(place)),
            code="tune.read_back",
        )
    base, fresh = torch.tensor(told["base"]), torch.tensor(told["learned"])
    off, moved = float((fresh - probe.logits).abs().max()), float((fresh - base).abs().max())
    epsilon = torch.finfo(getattr(torch, settings["dtype"])).eps
    if not off <= max(_MOST_OFF * moved, _ROUNDINGS * epsilon * float(fresh.abs().max())):
        raise Damaged(
            tr("read back in a fresh process it answers otherwise: logits off by {off}, moved by {moved}",
               off=f"{off:.3g}", moved=f"{moved:.3g}"),
            hint=tr("nothing was put into the store; the run's folder keeps it: {path}", path=str(place)),
            code="tune.read_back",
        )  # fmt: skip
    return off
