"""Candidates answer rows: one model after the other, each answer a line of a file as soon as it is whole."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch

from glmchat.core import locations
from glmchat.core.engine_options import EngineOptions
from glmchat.core.errors import Failed
from glmchat.core.json_files import small_json
from glmchat.core.language import tr
from glmchat.core.messages import Sampling
from glmchat.core.text import short_name
from glmchat.engine.decoding.answer import Chunk
from glmchat.engine.engine import Engine
from glmchat.hub.file_request import Meter
from glmchat.jobs.lines import Tell
from glmchat.tuning.metrics import Answer
from glmchat.tuning.prompt_side import PromptSide
from glmchat.tuning.questions import Reader, Row

_PIECE = 256  # rows of logits that are held at once


class Record:
    """The answers of one candidate so far: a line of JSON each, in a folder named by all that they depend on."""

    def __init__(self, folder: Path, about: Mapping[str, Any], *, again: bool) -> None:
        """Raises Failed where another program works on it."""
        self.key = folder.name
        locations.private_dir(folder)
        self._about, self._file = folder / "about.json", (folder / "answers.jsonl").open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise Failed(
                tr("another `glmchat eval` is answering the same rows"),
                hint=tr("wait for it, or stop it: what it has answered is kept"),
                code="eval.busy",
            ) from None
        if again:
            self._file.truncate(0)
            self._about.unlink(missing_ok=True)
        self.answers: dict[int, Answer] = {}
        self.read_again()
        self.computed: dict[str, Any] = {}  # in which type and with how many threads; {} before the first answer
        if self.answers:
            self.computed = small_json(self._about).get("computed") or {}
        self._said = dict(about)

    def read_again(self) -> None:
        """An interrupt may have come between a line and the count of it."""
        self._file.flush()
        self.answers = {answer.row: answer for answer in self._read()}

    def _read(self) -> Iterator[Answer]:
        """Whole lines. What a kill left of the last one is cut off, so that the next begins a line."""
        self._file.seek(0)
        end = 0
        for line in self._file:
            if not line.endswith(b"\n"):
                self._file.truncate(end)
                return
            end += len(line)
            try:
                yield Answer.from_json(_object(line))
            except (KeyError, TypeError, ValueError):
                continue  # not ours; that row is answered again

    def begin(self, computed: Mapping[str, Any]) -> None:
        """Before the first answer: how this and all that follow are computed."""
        self.computed = dict(computed)
        part = self._about.with_suffix(".part")
        part.write_text(json.dumps({**self._said, "computed": self.computed}, ensure_ascii=False), encoding="utf-8")
        part.replace(self._about)

    def add(self, answer: Answer, place: str) -> None:
        line = json.dumps(
            {**answer.to_json(), "place": place, "candidate": self._said["candidate"]}, ensure_ascii=False
        )
        self._file.write(line.encode("utf-8", "replace") + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.answers[answer.row] = answer

    def close(self) -> None:
        self._file.close()


def _object(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


@dataclass(slots=True)
class Candidate:
    """number: of its reader, as rows count them."""

    text: str
    options: EngineOptions
    adapters: tuple[tuple[str, Path, float], ...]
    sampling: Sampling
    reader: Reader
    number: int
    side: PromptSide
    rows: Sequence[Row]
    record: Record

    @property
    def missing(self) -> list[Row]:
        return [row for row in self.rows if row.number not in self.record.answers]


def answer(candidates: Sequence[Candidate], tell: Tell, meter: Meter) -> None:
    """What is missing. Each answer is told when it is on the disk."""
    groups: dict[tuple[Path | None, int | None], list[Candidate]] = {}
    for one in candidates:
        groups.setdefault((one.options.folder, one.options.quant), []).append(one)
    for group in groups.values():
        if waiting := [one for one in group if one.missing]:
            _answer_by_one(waiting, tell, meter)


def _answer_by_one(group: Sequence[Candidate], tell: Tell, meter: Meter) -> None:
    """Candidates of one model, whose adapters are exchanged without loading it again."""
    known = next((one.record.computed for one in group if one.record.computed), {})
    options = _with_room(group)
    label = short_name(options.model or group[0].text)
    asked = {**options.for_load(), "threads": options.threads or known.get("threads")}

    def loading(stage: str, done: float) -> None:
        if stage == "weights":
            meter(tr("loading {name}", name=label), round(100 * done), 100)

    with closing(Engine.load(options.require_folder(), **asked, on_progress=loading)) as engine:
        if options.dtype is None and (dtype := known.get("dtype")):
            engine.use_dtype(getattr(torch, dtype))  # as the answers that are here already
        engine.sequences.reads_afresh = True
        computed = {"dtype": str(engine.dtype).removeprefix("torch."), "threads": engine.threads}
        for name, path in dict.fromkeys((name, path) for one in group for name, path, _ in one.adapters):
            engine.attach(path, name)
        for one in group:
            engine.activate({name: weight for name, _, weight in one.adapters})
            if not one.record.answers:
                one.record.begin({**computed, "device": engine.plan.name})
            _answer_rows(engine, one, tell, meter)


def _with_room(group: Sequence[Candidate]) -> EngineOptions:
    """The options of the group, with a context that its longest question and answer fit in."""
    options, most = group[0].options, 16
    for one in group:
        for row in one.missing:
            asked = len(one.reader.question(row, one.number)) + (one.sampling.max_tokens or 0) if row.is_answered else 0
            read = (max(example.lengths) for example in one.reader.documents(row, one.number))
            most = max(most, asked + 1, *read)
    return replace(options, context=min(most, group[0].side.checkpoint.spec.context))


def _answer_rows(engine: Engine, one: Candidate, tell: Tell, meter: Meter) -> None:
    missing = one.missing
    waiting, done = iter(missing), len(one.rows) - len(missing)
    writing: list[Writing] = []
    label, has_more = short_name(one.text), True
    meter(label, done, len(one.rows))
    try:
        while has_more or writing:
            while has_more and len(writing) < engine.parallel:
                if has_more := (row := next(waiting, None)) is not None:
                    writing.append(Writing(engine, one.reader, one.number, row, one.sampling))
            if len(writing) > 1:
                engine.step()
            for each in list(writing):
                if (answer := each.advance()) is None:
                    continue
                writing.remove(each)
                one.record.add(answer, each.row.place)
                done += 1
                tell({"event": "answer", "candidate": one.text, "place": each.row.place, **answer.to_json()})
                meter(label, done, len(one.rows))
    finally:
        for each in writing:
            each.close()


class Writing:
    """A row that is being answered: first its loss, then a token at a time. Texts and pairs are whole at once."""

    def __init__(self, engine: Engine, reader: Reader, number: int, row: Row, sampling: Sampling) -> None:
        """number: of the reader."""
        self.row = row
        self._labels = row.wanted[number]
        documents = [one for example in reader.documents(row, number) for one in example.documents()]
        self._losses = [(loss_of(engine, ids, learned), sum(learned)) for ids, learned in documents]
        self._text: list[str] = []
        self._steps: Generator[Chunk | None, None, None] | None = None
        if row.is_answered:
            sampling = replace(sampling, seed=_seed_of(sampling.seed or 0, row.number))
            self._steps = engine.stream_tokens(reader.question(row, number), sampling)

    def advance(self) -> Answer | None:
        """None until it is whole."""
        row = self.row
        if row.kind == "pair":
            (nats, learned), (worse_nats, worse_learned) = self._losses
            better = Answer(row.number, self._labels, None, nats, learned)
            return replace(better, worse=row.worse, worse_nats=worse_nats, worse_learned=worse_learned)
        nats, learned = sum(nats for nats, _ in self._losses), sum(learned for _, learned in self._losses)
        if self._steps is None:
            return Answer(row.number, self._labels, None, nats, learned)
        chunk = next(self._steps)
        if chunk is None:
            return None
        self._text.append(chunk.text)
        if chunk.finish_reason is None:
            return None
        by = str(chunk.facts["stopped_by"])
        tokens = int(chunk.facts["predicted_n"]) - (by == "eos")
        return Answer(row.number, self._labels, "".join(self._text), nats, learned, tokens, by)

    def close(self) -> None:
        if self._steps is not None:
            self._steps.close()


def loss_of(engine: Engine, ids: Sequence[int], learned: Sequence[bool]) -> float:
    """The cross entropy of the learned tokens, added up; never more than a few rows of logits at once."""
    model, total = engine.model, 0.0
    size = _PIECE if model.spec.causal else len(ids)
    cache = None if len(ids) <= size else model.new_cache(len(ids), model.dtype)
    counts = [at for at in range(1, len(ids)) if learned[at]]
    with torch.inference_mode():
        for start in range(0, len(ids), size):
            logits = model(torch.tensor(ids[start : start + size], device=engine.device), cache)
            here = [at for at in counts if start < at <= start + len(logits)]
            if here:
                rows = logits[[at - 1 - start for at in here]].float()
                target = torch.tensor([ids[at] for at in here], device=rows.device)
                total += float(torch.nn.functional.cross_entropy(rows, target, reduction="sum"))
    return total


def _seed_of(seed: int, row: int) -> int:
    """The same for a row, whatever is answered before it."""
    return int.from_bytes(blake2b(f"{seed} {row}".encode(), digest_size=8).digest(), "big") >> 1
