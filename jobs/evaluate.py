"""Has candidates answer the rows of some data, and compares what they wrote, for `glmchat eval`.

request: candidates: [{text, engine: arguments of EngineOptions, adapters: [[name, folder, weight]], sampling}]; data;
format, columns, system, max_length, limit, bleu, seed; again: answer anew what was answered; rows: how many are shown
on each side; out: where the predictions go, None for nowhere.

Each answer is on the disk before the next one is counted, so a run that was stopped or killed goes on where it was.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from glmchat.core import locations
from glmchat.core.engine_options import EngineOptions
from glmchat.core.errors import Interrupted
from glmchat.core.fingerprints import fingerprint, of_adapter, of_text, whole
from glmchat.core.language import tr
from glmchat.core.messages import Sampling
from glmchat.core.text import one_line
from glmchat.engine.engine import Engine
from glmchat.engine.identity import settings_of, versions, weight_files
from glmchat.engine.prompts.adapted import Formats
from glmchat.hub.file_request import Meter
from glmchat.jobs.answers import Record, Writing
from glmchat.jobs.lines import Request, Tell, run
from glmchat.tuning.metrics import Answer, compare, extremes
from glmchat.tuning.options import DataOptions, PromptSide, load_prompt_side
from glmchat.tuning.questions import Questions, Reader, Row, read_questions
from glmchat.tuning.sources import Source, find_sources, form_of

LENGTH = 2048  # tokens of a row, where nobody says another number and the model takes as many


@dataclass(slots=True)
class Candidate:
    """reader: the number of the way in which it reads rows."""

    text: str
    options: EngineOptions
    adapters: tuple[tuple[str, Path, float], ...]
    sampling: Sampling
    reader: int
    side: PromptSide
    record: Record

    def missing(self, rows: Sequence[Row]) -> list[Row]:
        return [row for row in rows if row.number not in self.record.answers]


class Evaluation:
    """One run: `read`, `answer`, `result`. Closed by its stack."""

    def __init__(self, request: Request, tell: Tell, stack: ExitStack) -> None:
        self._request, self._tell, self._stack = request, tell, stack
        self._meter = Meter(tell)
        self.readers: list[Reader] = []
        self.candidates: list[Candidate] = []
        self._records: dict[str, Record] = {}
        self.questions = Questions()

    # What is asked

    def read(self) -> None:
        """Rows, and what was answered before. No weights are loaded yet."""
        request = self._request
        form = form_of(request.get("format"), request.get("columns") or {})
        sources = find_sources(request["data"], form=form)
        sides: dict[Path, PromptSide] = {}
        formats: dict[Path, Formats] = {}
        prompts: list[Any] = []
        read_by = []
        for given in request["candidates"]:
            folder = EngineOptions.from_arguments(given["engine"]).require_folder()
            if folder not in sides:
                sides[folder] = side = load_prompt_side(folder)
                self._stack.callback(side.close)
                formats[folder] = Formats(side.prompt, side.checkpoint.spec)
                self._stack.callback(formats[folder].close)
            prompt = formats[folder].of([Path(path) for _, path, weight in given["adapters"] if weight])
            assert prompt is not None
            if prompt not in prompts:
                prompts.append(prompt)
                limit = min(request.get("max_length") or LENGTH, sides[folder].checkpoint.spec.context)
                self.readers.append(Reader(prompt, limit))
                self._stack.callback(self.readers[-1].store.close)
            read_by.append((sides[folder], prompts.index(prompt)))
        self.questions = read_questions(
            sources,
            self.readers,
            most=request.get("limit"),
            system=request.get("system"),
            on_progress=lambda done, total: self._meter(tr("reading rows"), done * 100 // max(total, 1), 100),
        )
        for given, (side, reader) in zip(request["candidates"], read_by, strict=True):
            self.candidates.append(self._candidate(given, side, reader, sources))

    def _candidate(
        self, given: Mapping[str, Any], side: PromptSide, reader: int, sources: Sequence[Source]
    ) -> Candidate:
        options = EngineOptions.from_arguments(given["engine"])
        adapters = tuple((str(name), Path(path), float(weight)) for name, path, weight in given["adapters"])
        sampling = Sampling(**{**given["sampling"], "stop": tuple(given["sampling"].get("stop", ()))})
        request = self._request
        read = DataOptions(
            on="last",
            over_length="cut-question",
            max_length=self.readers[reader].limit,
            format=request.get("format"),
            columns=request.get("columns") or {},
            system=request.get("system"),
        )
        key = [
            [(p.name, p.digest) for p in fingerprint(weight_files(side.checkpoint.path))],
            [options.quant, options.dtype, options.device],
            [(of_adapter(path), weight) for _, path, weight in adapters],
            self.readers[reader].prompt.identity,
            sampling.to_json(),
            [whole(source.path) for source in sources],
            read.to_json(),
            settings_of(side.checkpoint.path),
            versions(),
        ]
        name = of_text(json.dumps(key, default=str))[:24]
        about = {"candidate": given["text"], "data": [str(source.path) for source in sources], "key": name}
        if name not in self._records:
            record = Record(locations.evals_dir() / name, about, again=bool(request.get("again")))
            self._records[name] = record
            self._stack.callback(record.close)
        return Candidate(given["text"], options, adapters, sampling, reader, side, self._records[name])

    @property
    def total(self) -> int:
        return len(self.questions.rows) * len(self.candidates)

    @property
    def done(self) -> int:
        return self.total - sum(len(one.missing(self.questions.rows)) for one in self.candidates)

    def plan(self) -> dict[str, Any]:
        found = self.questions
        words = [tr("rows to judge by: {count:,}", count=len(found.rows))]
        if found.refused:
            words.append(tr("rows not used: {count:,}", count=found.refused))
            words += [f"  {one_line(line, 240)}" for line in found.first]
        if self.done:
            words.append(tr("{done:,} of {total:,} answers are here already", done=self.done, total=self.total))
        facts = {"rows": len(found.rows), "refused": found.refused, "first": found.first}
        return {"event": "plan", **facts, "done": self.done, "total": self.total, "words": words}

    # Answering

    def answer(self) -> None:
        """What is missing, of one model after the other."""
        groups: dict[tuple[Path | None, int | None], list[Candidate]] = {}
        for one in self.candidates:
            groups.setdefault((one.options.folder, one.options.quant), []).append(one)
        for group in groups.values():
            waiting = [one for one in group if one.missing(self.questions.rows)]
            if waiting:
                self._answer_by_one(waiting)

    def _answer_by_one(self, group: Sequence[Candidate]) -> None:
        """Candidates of one model, whose adapters are exchanged without loading it again."""
        known = next((one.record.computed for one in group if one.record.computed), {})
        options = self._with_room(group)
        label = one_line(options.model or group[0].text, 40)
        asked = {**options.for_load(), "threads": options.threads or known.get("threads")}

        def loading(stage: str, done: float) -> None:
            if stage == "weights":
                self._meter(tr("loading {name}", name=label), round(100 * done), 100)

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
                self._answer_rows(engine, one)

    def _with_room(self, group: Sequence[Candidate]) -> EngineOptions:
        """The options of the group, with a context that its longest question and answer fit in."""
        options, most = group[0].options, 16
        for one in group:
            reader = self.readers[one.reader]
            for row in one.missing(self.questions.rows):
                answer = 0 if row.is_text else len(reader.question(row, one.reader)) + (one.sampling.max_tokens or 0)
                most = max(most, answer + 1, *(reader.store.lengths[at] for at in row.documents[one.reader]))
        return replace(options, context=min(most, group[0].side.checkpoint.spec.context))

    def _answer_rows(self, engine: Engine, one: Candidate) -> None:
        reader, total = self.readers[one.reader], len(self.questions.rows)
        waiting = iter(one.missing(self.questions.rows))
        writing: list[Writing] = []
        label, has_more = one_line(one.text, 40), True
        self._meter(label, total - len(one.missing(self.questions.rows)), total)
        try:
            while has_more or writing:
                while has_more and len(writing) < engine.parallel:
                    if has_more := (row := next(waiting, None)) is not None:
                        writing.append(Writing(engine, reader, one.reader, row, one.sampling))
                if len(writing) > 1:
                    engine.step()
                for each in list(writing):
                    if (answer := each.advance()) is None:
                        continue
                    writing.remove(each)
                    one.record.add(answer, each.row.place)
                    told = {"event": "answer", "candidate": one.text, "place": each.row.place, **answer.to_json()}
                    self._tell(told)
                    self._meter(label, total - len(one.missing(self.questions.rows)), total)
        finally:
            for each in writing:
                each.close()

    # What came of it

    def result(self) -> dict[str, Any]:
        rows = self.questions.rows
        answers = [[one.record.answers[row.number] for row in rows] for one in self.candidates]
        table = compare(answers, self._request.get("bleu", "characters"), int(self._request.get("seed") or 0))
        for values, one in zip(table["candidates"], self.candidates, strict=True):
            values.update(text=one.text, computed=one.record.computed, sampling=one.sampling.to_json())
        worst, best = extremes(answers, int(self._request.get("rows", 0)))
        shown = {
            side: [
                {"place": rows[at].place, "asked": rows[at].asked, "answers": [a[at].to_json() for a in answers]}
                for at in places
            ]
            for side, places in (("worst", worst), ("best", best))
        }
        files = self._write(answers) if self._request.get("out") else []
        return {**table, "refused": self.questions.refused, "shown": shown, "files": files}

    def _write(self, answers: Sequence[Sequence[Answer]]) -> list[str]:
        """The predictions in the file of the ChatGLM scripts, one file for each candidate."""
        out, files = Path(self._request["out"]), []
        for number, mine in enumerate(answers, 1):
            place = out if len(answers) == 1 else out.with_name(f"{out.stem}-{number}{out.suffix}")
            part = place.with_name(place.name + ".part")
            with part.open("w", encoding="utf-8", errors="replace") as file:
                for answer in mine:
                    row = {"labels": answer.labels, "predict": answer.predict or ""}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
            part.replace(place)
            files.append(str(place))
        return files


def work(request: Request, tell: Tell) -> dict[str, Any]:
    """The result: the table of `metrics.compare`, the rows that are shown, and the files that were written."""
    with ExitStack() as stack:
        evaluation = Evaluation(request, tell, stack)
        evaluation.read()
        tell(evaluation.plan())
        try:
            evaluation.answer()
        except KeyboardInterrupt:
            for one in evaluation.candidates:
                one.record.read_again()
            raise Interrupted(
                tr("stopped: {done:,} of {total:,} answers are kept", done=evaluation.done, total=evaluation.total),
                hint=tr("the same command goes on with the next one; --again begins anew"),
                code="eval.stopped",
            ) from None
        return evaluation.result()


if __name__ == "__main__":
    sys.exit(run(work))
