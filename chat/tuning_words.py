"""What people and programs are told of a run: its state, its steps, its end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from glmchat.core import repetition
from glmchat.core.language import tr
from glmchat.core.run_folder import Run, State
from glmchat.core.run_log import Progress
from glmchat.core.text import duration, human_bytes, one_line

Record = Mapping[str, Any]


def run_words(run: Run) -> str:
    """Its state, for a list."""
    return tr("never began") if run.never_began else state_words(run.state())


def state_words(state: State) -> str:
    words: dict[State, str] = {
        "prepared": "not started",
        "planning": "planning",
        "waiting": "waits for a yes",
        "running": "training",
        "stopping": "saving",
        "done": "done",
        "stopped": "stopped",
        "failed": "failed",
        "dead": "died",
    }
    return tr(words[state])


def _measures() -> tuple[tuple[str, str, Callable[[Any], str]], ...]:
    """Of tokens and of pairs of answers, in a step or an evaluation: title, name in the record, how it is shown."""
    return (
        (tr("token accuracy"), "token_accuracy", lambda share: f"{100 * share:.1f} %"),
        (tr("told apart"), "accuracy", lambda share: f"{100 * share:.0f} %"),
        (tr("margin"), "margin", _reward),
        (tr("better"), "reward_chosen", _reward),
        (tr("worse"), "reward_rejected", _reward),
    )


def _reward(reward: float) -> str:
    return f"{reward:+.3f}"


def figures(now: Record) -> list[tuple[str, str]]:
    """Of a step: what stands beside the curve, as titles and values. What a record does not tell is left out."""
    rows: list[tuple[str, str]] = []

    def add(title: str, name: str, shown: Callable[[Any], str]) -> None:
        if isinstance(value := now.get(name), int | float):
            rows.append((title, shown(value)))

    of = f"/{now['steps']}" if now.get("steps") else ""
    add(tr("step"), "step", lambda step: f"{step}{of}")
    add(tr("loss"), "loss", lambda loss: f"{loss:.4f}")
    for measure in _measures():
        add(*measure)
    add(tr("time left"), "seconds_left", duration)
    add(tr("tokens/s"), "tokens_per_second", lambda speed: f"{speed:,.0f}")
    add(tr("memory"), "memory", human_bytes)
    add(tr("epoch"), "epoch", lambda epoch: f"{epoch:g}")
    add(tr("learning rate"), "lr", lambda lr: f"{lr:.2e}")
    add(tr("gradient"), "grad_norm", lambda norm: f"{norm:.3f}")
    add(tr("fullest pass"), "worst", lambda share: f"{100 * share:.0f} %")
    return rows


def record_lines(record: Record) -> list[str]:
    """What plain lines say of a record; [] where they say nothing."""
    kind, step = record.get("kind"), record.get("step")
    if kind == "page":
        return [str(line) for line in record.get("words", ())]
    if kind == "step":
        return ["  ".join(f"{title} {value}" for title, value in figures(record))]
    if kind == "evaluation" and isinstance(record.get("loss"), int | float):
        told = [tr("step {step}: held-out loss {loss}", step=step, loss=f"{record['loss']:.4f}")]
        told += [f"{title} {shown(record[name])}" for title, name, shown in _measures() if name in record]
        if isinstance(known := record.get("perplexity"), int | float):
            told.append(f"{tr('perplexity')} {known:.2f}")
        return ["  ".join(told)]
    if kind == "sample":
        question, answer = one_line(str(record.get("question")), 200), one_line(str(record.get("answer")), 400)
        mark = "" if record.get("stopped", True) else f" ({tr('did not stop by itself')})"
        return [f"? {question}", f"  {answer}{mark}"]
    if kind == "resumed":
        return [tr("goes on behind step {step}", step=step)]
    if kind == "checkpoint":
        return [tr("step {step}: saved", step=step)]
    return [one_line(str(record["say"]), 400)] if "say" in record else []


def end_lines(end: Record) -> list[str]:
    """How a run ended well: what it became, how far it was moved, what it is worth on rows it has not seen."""
    lines = []
    if model := end.get("model"):
        lines.append(tr("the model {name} is in the store", name=one_line(str(model), 80)))
    if adapter := end.get("adapter"):
        lines.append(tr("the adapter {name} is in the store", name=one_line(str(adapter), 80)))
    moved, positions = end.get("delta"), end.get("positions")
    if isinstance(moved, int | float) and isinstance(positions, int):
        lines.append(tr("{count} learned positions stand before each text", count=positions))
    elif isinstance(moved, int | float):
        lines.append(tr("it moves the weights by {norm} (Frobenius norm)", norm=f"{moved:.4g}"))
    if isinstance(off := end.get("read_back"), int | float):
        lines.append(
            tr("read back in a fresh process: its logits are within {off} of the trained ones", off=f"{off:.2g}")
        )
    if isinstance(again := end.get("again"), dict):
        lines += repetition.words(again)
    return lines


def run_facts(run: Run, progress: Progress) -> dict[str, Any]:
    """A row of `glmchat tune --list --json`."""
    recipe = run.recipe()
    return {
        "run": run.id,
        "state": run.state(),
        "never_began": run.never_began,
        "base": recipe.get("base"),
        "name": recipe.get("name"),
        "folder": str(run.folder),
        "created": run.created,
        "step": progress.now.get("step"),
        "steps": progress.now.get("steps"),
        "loss": progress.losses[-1][1] if progress.losses else None,
        "checkpoint": progress.checkpoint,
        "seconds_left": progress.now.get("seconds_left") if run.at_work else None,
    }
