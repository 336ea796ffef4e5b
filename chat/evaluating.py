"""Evaluations as the faces see them: what is asked of jobs/evaluate.py, and the words of what came of it."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from glmchat.chat.compare.columns import launches, parse_columns
from glmchat.chat.jobs import run_job
from glmchat.chat.launch import LaunchOptions
from glmchat.core.errors import Failed, GlmchatError, Usage
from glmchat.core.eval_folder import Evaluation, find_evaluation
from glmchat.core.language import tr
from glmchat.core.locations import name_beside, user_path
from glmchat.core.run_folder import State
from glmchat.core.text import one_line
from glmchat.hub import adapters

# Of both, the length of an answer is another setting.
SAMPLINGS: Mapping[str, Mapping[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "original": {"temperature": 0.95, "top_p": 0.7},  # ChatGLM-6B's ptuning/main.py
}
MAX_TOKENS = 512


def candidates_of(texts: Sequence[str], base: LaunchOptions) -> list[dict[str, Any]]:
    """Candidates as the job wants them. base: what all have in common, its sampling whole.

    Raises what `launches` does, and Usage for settings that change the question.
    """
    parsed = parse_columns(texts)
    if any("template_variables" in settings for settings in (base.sampling, *(column.sampling for column in parsed))):
        raise Usage(
            tr("template variables cannot be set here: data are read without them"),
            hint=tr("for example glmchat eval smollm2,temp=0.5 dev.jsonl"),
            code="eval.variables",
        )
    found = []
    for column, launch in zip(parsed, launches(parsed, base), strict=True):
        brought = [(name, str(adapters.find_adapter(name).path), weight) for name, weight in column.adapters]
        text = column.text if column.text[:1] not in ("", "+", ",") else column.name + column.text
        found.append(
            {"text": text, "model": launch.engine.model, "engine": launch.engine.to_arguments(), "adapters": brought,
             "sampling": launch.sampling}
        )  # fmt: skip
    return found


def data_of(word: str) -> str:
    """The data's place, which the job is told absolutely. Raises Usage where nothing is."""
    name, mark, entry = word.partition(".json#")
    path = user_path(name + ".json" if mark else word)
    if not path.exists():
        raise Usage(
            tr("there is no file {path}", path=one_line(str(path))),
            hint=name_beside(name + ".json" if mark else word)
            or tr("the data stand last: glmchat eval smollm2 dev.jsonl"),
            code="data.missing",
        )
    return f"{path}#{entry}" if mark else str(path)


def names_data(word: str) -> bool:
    """Whether it is a file, a folder or an entry of a dataset_info.json."""
    try:
        data_of(word)
    except (Usage, OSError):
        return False
    return True


def request_in_chat(words: str, launch: LaunchOptions, chosen: Sequence[tuple[str, float]]) -> dict[str, Any] | None:
    """What the job is asked for in a conversation: data, alone or behind candidates; alone the data are answered by the
    model of the conversation, and by it with its adapters. None where the words name no data.

    chosen: the adapters of the conversation. Raises what makes candidates no good, and Usage for a server's model.
    """
    *texts, data = [words] if names_data(words) else words.split()
    if not names_data(data):
        if texts:
            data_of(data)
        return None
    if launch.server is not None or launch.engine.model is None:
        raise Usage(
            tr("an evaluation needs a model that runs here"),
            hint=tr("for example glmchat eval smollm2 smollm2+poet dev.jsonl"),
            code="eval.server",
        )
    if not texts:
        adapted = "".join(f"+{name}" if weight == 1 else f"+{name}:{weight:g}" for name, weight in chosen)
        texts = [launch.engine.model, *([adapted] if adapted else [])]
    elif texts[0][:1] in ("+", ","):
        texts[0] = launch.engine.model + texts[0]
    sampling = {**SAMPLINGS["greedy"], "max_tokens": MAX_TOKENS, "seed": 0}
    base = replace(launch, sampling=sampling, adapters=None, keep_copy=False)
    return {"candidates": candidates_of(texts, base), "data": [data_of(data)], "rows": 1, "seed": 0}


# Read along


@dataclass(slots=True)
class Look:
    """An evaluation at a moment. counts: answers of each candidate; of: rows. table: None before its end. problem: what
    ended it instead."""

    state: State
    counts: list[int]
    of: int
    table: dict[str, Any] | None = None
    problem: GlmchatError | None = None


class Watch:
    """Reads an evaluation along: its rows once, and of the answers what is new."""

    def __init__(self, evaluation: Evaluation) -> None:
        self.evaluation = evaluation
        self.answers: list[dict[int, dict[str, Any]]] = []  # of each candidate, by the number of the row
        self._rows: dict[int, dict[str, Any]] = {}
        self._readers = [evaluation.answers(key) for key in evaluation.keys]
        self._by_key: list[dict[int, dict[str, Any]]] = [{} for _ in self._readers]

    @property
    def rows(self) -> list[dict[str, Any]]:
        return list(self._rows.values())

    def look(self) -> Look:
        evaluation = self.evaluation
        state = evaluation.state()
        if not self._rows or state == "done":
            self._rows = {row["number"]: row for row in evaluation.rows()}
        for reader, mine in zip(self._readers, self._by_key, strict=True):
            mine.update({row: answer for answer in reader.read() if (row := answer.get("row")) in self._rows})
        self.answers = self._by_key
        found = Look(state, [len(mine) for mine in self._by_key], len(self._rows))
        if state == "done":
            found.table = evaluation.table()
            if found.table is None:
                hint = tr("run it again: its answers are kept")
                found.problem = Failed(tr("its table cannot be read"), hint=hint, code="eval.table")
        elif state == "failed" and (end := evaluation.end()) is not None:
            found.problem = GlmchatError.from_json(end)
        return found


class Asked:
    """An evaluation that this process has asked for. Its job ends with this process; the same question goes on."""

    def __init__(self, request: Mapping[str, Any]) -> None:
        self.request = dict(request)
        self.evaluation: Evaluation | None = None  # as soon as its rows are read
        self.stage = ""  # what it does, for people
        self.problem: GlmchatError | None = None
        self.is_begun = self.is_over = False
        self._stopped = threading.Event()

    def start(self) -> None:
        self.is_begun = True
        threading.Thread(target=self._run, name="evaluation", daemon=True).start()

    @property
    def is_at_work(self) -> bool:
        return self.is_begun and not self.is_over

    def stop(self) -> None:
        self._stopped.set()

    def _run(self) -> None:
        try:
            for event in run_job("evaluate", self.request, cancelled=self._stopped.is_set):
                self._hear(event)
        except GlmchatError as error:
            self.problem = error
        finally:
            self.is_over = True

    def _hear(self, event: Mapping[str, Any]) -> None:
        if event["event"] == "plan":
            self.evaluation = find_evaluation(str(event["id"]))
        elif event["event"] == "meter":
            self.stage = f"{one_line(str(event['label']), 60)} {event['done']}/{event['total'] or '?'}"


# Words


def state_words(state: State) -> str:
    words = {"running": "answering", "done": "done", "stopped": "interrupted", "dead": "interrupted"}
    return tr(words.get(state, "failed"))


def measures(bleu: str) -> dict[str, tuple[str, int, str]]:
    """Of each measure: what it is called, its decimals and its unit."""
    unit = tr("characters") if bleu == "characters" else tr("words")
    return {
        "loss": (tr("loss per learned token"), 4, ""),
        "perplexity": (tr("perplexity"), 3, ""),
        "exact": (tr("exact match"), 1, " %"),
        "rouge-1": ("ROUGE-1", 2, ""),
        "rouge-2": ("ROUGE-2", 2, ""),
        "rouge-l": ("ROUGE-L", 2, ""),
        "bleu-4": (tr("BLEU-4 of {unit}", unit=unit), 2, ""),
        "stopped": (tr("ended by itself"), 1, " %"),
        "tokens": (tr("length in tokens"), 1, ""),
        "preferred": (tr("better answer likelier"), 1, " %"),
        "preferred-mean": (tr("the same per token"), 1, " %"),
        "margin": (tr("log probability ahead"), 3, ""),
        "loss-worse": (tr("loss of worse answers"), 4, ""),
        "gained": (tr("pairs that gained"), 1, " %"),
    }


def value_cells(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Lines of the table: what is measured, then each candidate's."""
    found = result["candidates"]
    return [
        (label, *(f"{one['values'][name]:,.{digits}f}{unit}".replace("-", "−") for one in found))
        for name, (label, digits, unit) in measures(result["bleu"]).items()
        if name in found[0]["values"]
    ]


def difference_cells(result: Mapping[str, Any], number: int) -> list[tuple[str, str, str, str]]:
    """Of candidate `number`, from 0: what is measured, its difference to the first one, the interval, and a note."""
    names = measures(result["bleu"])
    lines = []
    for name, found in result["candidates"][number]["differences"].items():
        label, digits, unit = names[name]
        form = f".{digits}f" if name == "gained" else f"+.{digits}f"  # a share of its own, not a difference
        mean, low, high = (format(found[part], form).replace("-", "−") for part in ("mean", "low", "high"))
        note = "" if found["shown"] else tr("no difference shown")
        lines.append((label, mean + unit, f"{low} … {high}", note))
    return lines


def difference_note(result: Mapping[str, Any], number: int) -> str:
    """Why one difference is missing; "" where none is."""
    if "loss" in result["candidates"][number]["differences"]:
        return ""
    return tr("the losses of 1 and {number} count other tokens, so they have no difference", number=number + 1)


def named(result: Mapping[str, Any], number: int) -> tuple[str, str]:
    """Candidate `number`, from 0, as a person named it, and how it chose its words; "" where it was asked for none."""
    one = result["candidates"][number]
    return one_line(one["text"], 120), f"  ({how(one['sampling'])})" if result["answered"] else ""


def how(sampling: Mapping[str, Any]) -> str:
    """How a candidate chose its words."""
    most = tr("at most {count:,} tokens", count=sampling["max_tokens"])
    if sampling["temperature"] == 0:
        return f"{tr('greedy')}, {most}"
    return f"temperature {sampling['temperature']:g}, top_p {sampling['top_p']:g}, {most}"


def sides(count: int) -> dict[str, str]:
    """What heads the rows that are shown, by their side. count: of candidates."""
    if count == 1:
        return {"worst": tr("worst"), "best": tr("best")}
    return {
        "worst": tr("where {number} is furthest behind 1", number=count),
        "best": tr("where {number} is furthest ahead of 1", number=count),
    }


def value_of(row: Mapping[str, Any], number: int) -> float | None:
    """What the answer of candidate `number` to a row is worth; None before the end."""
    worth = row.get("worth")
    return float(worth[number]) if isinstance(worth, list) and number < len(worth) else None


def ordered(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """First those where the last candidate is furthest behind the first one, or does worst where it is alone; as in the
    data while there is no table."""

    def ahead(row: Mapping[str, Any]) -> float:
        worth = row.get("worth") or [0.0]
        return float(worth[-1] - worth[0] if len(worth) > 1 else worth[0])

    return sorted(rows, key=ahead)


def said(answer: Mapping[str, Any]) -> str:
    """What a candidate wrote; of a text, which is not answered, its loss, and of a pair how far it tells both apart."""
    if answer.get("worse") is not None:
        better, worse = -answer["nats"], -answer["worse_nats"]
        told = tr("log probability {better:.2f}, of the worse {worse:.2f}: {margin:+.2f}", better=better, worse=worse,
                  margin=better - worse)  # fmt: skip
        return told.replace("-", "−")
    if answer.get("predict") is None:
        loss = answer["nats"] / max(answer["learned"], 1)
        return tr("loss per learned token") + f" {loss:.4f}"
    return str(answer["predict"]) or tr("(nothing)")


def wanted(answer: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a row expects, behind its sign: the answer, of a pair the worse one too; of a text nothing."""
    if answer.get("worse") is not None:
        return [("=", str(answer["labels"])), ("≠", str(answer["worse"]))]
    return [("=", str(answer["labels"]))] if answer.get("predict") is not None else []


def facts(evaluation: Evaluation) -> dict[str, Any]:
    """A row of `glmchat eval --list --json`."""
    now = Watch(evaluation).look()
    return {
        "evaluation": evaluation.id,
        "state": now.state,
        "candidates": evaluation.candidates,
        "data": evaluation.data,
        "created": evaluation.created,
        "answers": now.counts,
        "folder": str(evaluation.folder),
    }


def brief(evaluation: Evaluation, number: int) -> list[str]:
    """What an evaluation says of one candidate in a line or two, for what tells of a model or an adapter."""
    now = Watch(evaluation).look()
    head = f"{one_line(evaluation.id, 80)}  {one_line(evaluation.candidates[number], 80)}"
    if now.table is None or number >= len(now.table["candidates"]):
        return [f"{head} ({state_words(now.state)})"]
    values, bleu = now.table["candidates"][number]["values"], now.table["bleu"]
    told = [
        f"{label} {values[name]:,.{digits}f}{unit}".replace("-", "−")
        for name, (label, digits, unit) in measures(bleu).items()
        if name in values and name in ("loss", "exact", "rouge-l", "bleu-4", "preferred", "margin")
    ]
    return [head, "  " + ", ".join([tr("{rows:,} rows", rows=now.table["rows"]), *told])]
