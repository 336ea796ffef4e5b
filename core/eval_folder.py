"""An evaluation is a folder: what was asked, which rows, how far it is or how it ended, and the table.

    evaluations/ID/recipe.json   the request of jobs/evaluate.py, and "keys": where each candidate's answers stand
                   state.json    the process that works on it, or how it ended
                   rows.jsonl    number, place and question of each row that counts; at the end their worth
                   table.json    the result
                   log.jsonl     what ended it, where that was no table
    evals/KEY/answers.jsonl      the answers of one candidate (jobs/answers.py), which several evaluations may use

The program writes, everybody else reads.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from glmchat.core import locations
from glmchat.core.errors import GlmchatError, Usage
from glmchat.core.files import files_below, open_file
from glmchat.core.fingerprints import of_text
from glmchat.core.json_files import read_json
from glmchat.core.language import tr
from glmchat.core.run_folder import Run, beginning, last_record
from glmchat.core.run_log import LogReader
from glmchat.core.text import one_line

_ID = re.compile(r"\w[\w.+-]{0,95}")
_KEY = re.compile(r"[0-9a-f]{24}")


class Evaluation(Run):
    """Its state is a run's: running, done, stopped, failed or dead."""

    __slots__ = ()

    @property
    def candidates(self) -> list[str]:
        """As a person named them."""
        return [str(one.get("text")) for one in self.recipe().get("candidates", ()) if isinstance(one, dict)]

    @property
    def data(self) -> list[str]:
        return [str(path) for path in self.recipe().get("data", ())]

    @property
    def keys(self) -> list[str]:
        """Of each candidate the folder of its answers."""
        return [key for key in map(str, self.recipe().get("keys", ())) if _KEY.fullmatch(key)]

    def request(self) -> dict[str, Any]:
        """What the job was asked, to be asked again."""
        return {name: value for name, value in self.recipe().items() if name != "keys"}

    def table(self) -> dict[str, Any] | None:
        """What it found out; None before its end."""
        try:
            return read_json(self.folder / "table.json")
        except GlmchatError:
            return None

    def rows(self) -> list[dict[str, Any]]:
        return [row for row in LogReader(self.folder / "rows.jsonl").read() if isinstance(row.get("number"), int)]

    def answers(self, key: str) -> LogReader:
        """What a candidate writes, an answer each: "row" is its row's number, and the last answer to a row counts."""
        return LogReader(locations.evals_dir() / key / "answers.jsonl")

    def end(self) -> dict[str, Any] | None:
        """What went wrong; None where nothing did."""
        return last_record(self, "end")

    def begin(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Called by the program when it knows its rows. Raises OSError."""
        for name in ("table.json", "log.jsonl"):
            (self.folder / name).unlink(missing_ok=True)
        self.write_rows(rows)
        self.note("running")

    def write_rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.write("rows.jsonl", "".join(json.dumps(row, ensure_ascii=True) + "\n" for row in rows))

    def size(self) -> int:
        """Bytes, without those of the answers."""
        return size_below(self.folder)


def evaluations_dir() -> Path:
    return locations.data_dir() / "evaluations"


def open_evaluation(recipe: Mapping[str, Any]) -> Evaluation:
    """The folder of this question: the same one for the same candidates, rows and way of counting. Raises OSError."""
    asked = [recipe["keys"], [recipe.get(name) for name in ("limit", "bleu", "seed")]]
    stem = re.sub(r"[^\w.+-]+|\.\.", "-", Path(str(recipe["data"][0]).partition("#")[0]).stem).strip("-.+")[:48]
    locations.private_dir(locations.data_dir())
    parent = locations.private_dir(evaluations_dir())
    found = Evaluation(parent / f"{stem or 'data'}-{of_text(json.dumps(asked))[:6]}")
    found.folder.mkdir(mode=0o700, exist_ok=True)
    found.write("recipe.json", json.dumps(recipe, ensure_ascii=False, indent=1))
    return found


def evaluations() -> list[Evaluation]:
    """The one that was asked for last first."""
    try:
        folders = [entry.path for entry in os.scandir(evaluations_dir()) if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []
    found = [Evaluation(Path(path)) for path in folders]
    there = [one for one in found if _ID.fullmatch(one.id) and (one.folder / "recipe.json").is_file()]
    return sorted(there, key=lambda one: (-one.created, one.id))


def find_evaluation(name: str) -> Evaluation:
    """By its id, or by how that begins where only one does. Raises Usage with those there are."""
    known = {one.id: one for one in evaluations()}
    found = [name] if name in known else beginning(name, known)
    if len(found) == 1:
        return known[found[0]]
    names = one_line(", ".join(found or known), 200)
    raise Usage(
        tr("several evaluations begin with {name}", name=repr(name))
        if found
        else tr("there is no evaluation {name}", name=repr(one_line(name, 80))),
        hint=tr("there are {names}", names=names)
        if names
        else tr("for example glmchat eval smollm2 smollm2+poet dev.jsonl"),
        code="eval.unknown",
    )


def evaluations_of(name: str) -> Iterator[tuple[Evaluation, int]]:
    """Those in which a model or an adapter of that name took part, the newest first, and which candidate it is."""
    for one in evaluations():
        for number, candidate in enumerate(one.recipe().get("candidates", ())):
            if isinstance(candidate, dict) and name in _names(candidate):
                yield one, number


def _names(candidate: Mapping[str, Any]) -> set[str]:
    """The model and the adapters of a candidate, as the store names them."""
    names = {str(adapter[0]) for adapter in candidate.get("adapters", ()) if isinstance(adapter, list) and adapter}
    if isinstance(model := candidate.get("model"), str):
        names |= {model, model.removesuffix(":int4").removesuffix(":int8")}
    return names


def unused_answers() -> Iterator[tuple[Path, int]]:
    """Folders of answers that nobody is writing, and their bytes."""
    try:
        entries = list(os.scandir(locations.evals_dir()))
    except OSError:
        return
    at_work = {key for one in evaluations() if one.at_work for key in one.keys}
    for folder in sorted(Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)):
        if folder.name not in at_work and not _is_held(folder / "answers.jsonl"):
            yield folder, size_below(folder)


def _is_held(path: Path) -> bool:
    """Whether a program is writing it (jobs/answers.py)."""
    try:
        with open_file(path) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def size_below(folder: Path) -> int:
    """Bytes of all files below one."""
    total = 0
    with suppress(OSError):
        for path in files_below(folder):
            with suppress(OSError):
                total += path.lstat().st_size
    return total
