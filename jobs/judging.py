"""Candidates and the rows that they are judged by: what of jobs/evaluate.py loads torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from glmchat.core import locations
from glmchat.core.engine_options import EngineOptions
from glmchat.core.errors import GlmchatError, Interrupted
from glmchat.core.eval_folder import Evaluation as Folder
from glmchat.core.eval_folder import open_evaluation
from glmchat.core.fingerprints import fingerprint, of_adapter, of_text, whole
from glmchat.core.language import tr
from glmchat.core.messages import Sampling
from glmchat.core.run_folder import State
from glmchat.core.text import one_line
from glmchat.engine.identity import settings_of, versions, weight_files
from glmchat.engine.prompts.adapted import Formats
from glmchat.engine.prompts.base import PromptFormat
from glmchat.hub.file_request import Meter
from glmchat.jobs.answers import Candidate, Record, answer
from glmchat.jobs.lines import Request, Tell
from glmchat.tuning.metrics import Answer, compare, extremes, worth
from glmchat.tuning.options import DataOptions
from glmchat.tuning.prompt_side import PromptSide, load_prompt_side
from glmchat.tuning.questions import Questions, Reader, read_questions
from glmchat.tuning.sources import Source, find_sources, form_of

LENGTH = 2048  # tokens of a row, where nobody says another number and the model takes as many


class Prompts:
    """Of each candidate how it reads and writes; no weights. Closed by its stack."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._sides: dict[Path, tuple[PromptSide, Formats]] = {}

    def of(self, given: Mapping[str, Any]) -> tuple[PromptSide, PromptFormat]:
        folder = EngineOptions.from_arguments(given["engine"]).require_folder()
        if folder not in self._sides:
            side = load_prompt_side(folder)
            self._stack.callback(side.close)
            self._sides[folder] = side, Formats(side.prompt, side.checkpoint.spec)
            self._stack.callback(self._sides[folder][1].close)
        side, formats = self._sides[folder]
        prompt = formats.of([Path(path) for _, path, weight in given["adapters"] if weight])
        assert prompt is not None
        return side, prompt


class Judged:
    """All candidates on one data: `read`, then what is missing is answered, then `result`."""

    def __init__(self, request: Request, data: Sequence[str], meter: Meter, stack: ExitStack) -> None:
        self._request, self._data, self._meter, self._stack = request, list(data), meter, stack
        self.questions = Questions()
        self.candidates: list[Candidate] = []
        self.folder: Folder | None = None

    # What is asked

    def read(self, prompts: Prompts, records: dict[str, Record]) -> None:
        """Rows, and what was answered before."""
        request = self._request
        sources = find_sources(self._data, form=form_of(request.get("format"), request.get("columns") or {}))
        readers: list[Reader] = []
        read_by = []
        for given in request["candidates"]:
            side, prompt = prompts.of(given)
            number = next((n for n, reader in enumerate(readers) if reader.prompt is prompt), len(readers))
            if number == len(readers):
                limit = min(request.get("max_length") or LENGTH, side.checkpoint.spec.context)
                readers.append(Reader(prompt, limit))
                self._stack.callback(readers[-1].store.close)
            read_by.append((side, number))
        self.questions = read_questions(
            sources,
            readers,
            most=request.get("limit"),
            system=request.get("system"),
            on_progress=lambda done, total: self._meter(tr("reading rows"), done * 100 // max(total, 1), 100),
        )
        for given, (side, number) in zip(request["candidates"], read_by, strict=True):
            options = EngineOptions.from_arguments(given["engine"])
            adapters = tuple((str(name), Path(path), float(weight)) for name, path, weight in given["adapters"])
            sampling = Sampling(**{**given["sampling"], "stop": tuple(given["sampling"].get("stop", ()))})
            name = self._key(options, adapters, sampling, side, readers[number], sources)
            if name not in records:
                about = {"candidate": given["text"], "data": [str(source.path) for source in sources], "key": name}
                records[name] = Record(locations.evals_dir() / name, about, again=bool(request.get("again")))
                self._stack.callback(records[name].close)
            self.candidates.append(
                Candidate(given["text"], options, adapters, sampling, readers[number], number, side,
                          self.questions.rows, records[name])
            )  # fmt: skip

    def _key(
        self,
        options: EngineOptions,
        adapters: Sequence[tuple[str, Path, float]],
        sampling: Sampling,
        side: PromptSide,
        reader: Reader,
        sources: Sequence[Source],
    ) -> str:
        """Equal where the same answers would be written."""
        request = self._request
        read = DataOptions(
            on="last",
            over_length="cut-question",
            max_length=reader.limit,
            format=request.get("format"),
            columns=request.get("columns") or {},
            system=request.get("system"),
        )
        cache = [f"cache {options.cache_type}"] if options.cache_type else []
        key = [
            [(p.name, p.digest) for p in fingerprint(weight_files(side.checkpoint.path))],
            [options.quant, options.dtype, options.device, *([options.products] if options.products else []), *cache],
            [(of_adapter(path), weight) for _, path, weight in adapters],
            reader.prompt.identity,
            sampling.to_json(),
            [whole(source.path) for source in sources],
            read.to_json(),
            settings_of(side.checkpoint.path),
            versions(),
        ]
        return of_text(json.dumps(key, default=str))[:24]

    def begin(self) -> None:
        """From now on who looks sees it at work."""
        request = {**self._request, "data": self._data, "again": False, "also": [], "out": None}
        self.folder = open_evaluation({**request, "keys": [one.record.key for one in self.candidates]})
        self.folder.begin(self._rows())

    def _rows(self, worth: Sequence[Sequence[float]] = ()) -> list[dict[str, Any]]:
        return [
            {"number": row.number, "place": row.place, "asked": row.asked, "kind": row.kind,
             **({"worth": [round(one[at], 4) for one in worth]} if worth else {})}
            for at, row in enumerate(self.questions.rows)
        ]  # fmt: skip

    @property
    def total(self) -> int:
        return len(self.questions.rows) * len(self.candidates)

    @property
    def done(self) -> int:
        return self.total - sum(len(one.missing) for one in self.candidates)

    def plan(self) -> dict[str, Any]:
        """What people and programs are told before it is answered."""
        found = self.questions
        words = [tr("rows to judge by: {count:,}", count=len(found.rows))]
        if found.refused:
            words.append(tr("rows not used: {count:,}", count=found.refused))
            words += [f"  {one_line(line, 240)}" for line in found.first]
        if self.done:
            words.append(tr("{done:,} of {total:,} answers are here already", done=self.done, total=self.total))
        assert self.folder is not None
        facts = {"id": self.folder.id, "rows": len(found.rows), "refused": found.refused, "first": found.first}
        return {"event": "plan", "data": self._data[0], **facts, "done": self.done, "total": self.total, "words": words}

    # What came of it

    def result(self) -> dict[str, Any]:
        rows = self.questions.rows
        answers = [[one.record.answers[row.number] for row in rows] for one in self.candidates]
        table = compare(answers, self._request.get("bleu", "characters"), int(self._request.get("seed") or 0))
        for values, one in zip(table["candidates"], self.candidates, strict=True):
            values.update(text=one.text, computed=one.record.computed, sampling=one.sampling.to_json())
        worths = [[worth(answer) for answer in mine] for mine in answers]
        worst, best = extremes(worths, int(self._request.get("rows", 0)))
        shown = {
            side: [
                {"place": rows[at].place, "asked": rows[at].asked, "answers": [a[at].to_json() for a in answers]}
                for at in places
            ]
            for side, places in (("worst", worst), ("best", best))
        }
        out = self._request.get("out") if self._data == self._request["data"] else None
        files = _write(Path(out), answers) if out else []
        told = {"data": self._data[0], **table, "refused": self.questions.refused, "shown": shown}
        assert self.folder is not None
        self.folder.write_rows(self._rows(worths))
        self.folder.write("table.json", json.dumps(told, ensure_ascii=False))
        return {**told, "id": self.folder.id, "files": files}

    def end(self, state: State, problem: GlmchatError | None = None) -> None:
        """The last word on it, also where it could not be finished."""
        if self.folder is None:
            return
        with suppress(OSError):
            if problem is not None:
                self.folder.write("log.jsonl", json.dumps({"kind": "end", **problem.to_json()}) + "\n")
            self.folder.note(state)


def _write(out: Path, answers: Sequence[Sequence[Answer]]) -> list[str]:
    """The predictions in the file of the ChatGLM scripts, one file for each candidate."""
    files = []
    for number, mine in enumerate(answers, 1):
        place = out if len(answers) == 1 else out.with_name(f"{out.stem}-{number}{out.suffix}")
        part = place.with_name(place.name + ".part")
        with part.open("w", encoding="utf-8", errors="replace") as file:
            for answer in mine:
                file.write(json.dumps(_predicted(answer), ensure_ascii=False) + "\n")
        part.replace(place)
        files.append(str(place))
    return files


def _predicted(answer: Answer) -> dict[str, Any]:
    """A line of the predictions; of a pair the log probability of each answer, by trl's names."""
    if answer.worse is None:
        return {"labels": answer.labels, "predict": answer.predict or ""}
    logps = {"logps/chosen": -answer.nats, "logps/rejected": -answer.worse_nats}
    return {"chosen": answer.labels, "rejected": answer.worse, **logps}


def judge(request: Request, tell: Tell) -> dict[str, Any]:
    """The result: of `data` the table of `metrics.compare`, the rows that are shown, and the files that were written;
    "also": the same of each other data."""
    with ExitStack() as stack:
        meter, prompts, records = Meter(tell), Prompts(stack), dict[str, Record]()
        tables = [
            Judged(request, data, meter, stack) for data in (request["data"], *([d] for d in request.get("also", ())))
        ]
        for one in tables:
            one.read(prompts, records)
        for one in tables:
            one.begin()
            tell(one.plan())
        try:
            answer([candidate for one in tables for candidate in one.candidates], tell, meter)
            first, *others = [one.result() for one in tables]
        except KeyboardInterrupt:
            for record in records.values():
                record.read_again()
            done, total = sum(one.done for one in tables), sum(one.total for one in tables)
            for one in tables:
                one.end("stopped")
            raise Interrupted(
                tr("stopped: {done:,} of {total:,} answers are kept", done=done, total=total),
                hint=tr("the same command goes on with the next one; --again begins anew"),
                code="eval.stopped",
            ) from None
        except GlmchatError as problem:
            for one in tables:
                one.end("failed", problem)
            raise
        for one in tables:
            one.end("done")
        return {**first, "also": others}
