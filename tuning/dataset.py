"""From files to examples: everything that a run learns from, and the facts of its first page.

Only the tokenizer and the chat format of a checkpoint are loaded. Examples lie on disk, in the run's folder or in a
file without a name; those of a folder are used again only if data, tokenizer, format, options and this program are the
same by their hashes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from glmchat.core.errors import GlmchatError
from glmchat.core.json_files import read_json
from glmchat.tuning.gathering import Gathering
from glmchat.tuning.options import DataOptions
from glmchat.tuning.page import Facts
from glmchat.tuning.prompt_side import PromptSide, fingerprint
from glmchat.tuning.sources import find_sources, form_of
from glmchat.tuning.store import Examples, Store

_TOKENS, _RECORD = "tokens.bin", "tokens.json"


@dataclass(frozen=True, slots=True)
class Dataset:
    """examples: to learn from, in the order of the files. evaluation: held out. facts: of the first page."""

    examples: Examples
    evaluation: Examples
    facts: Facts
    store: Store

    @property
    def fingerprint(self) -> str:
        """Of everything that the tokens were made of."""
        return self.facts.fingerprint

    def close(self) -> None:
        self.store.close()


def read_dataset(
    data: Sequence[str],
    options: DataOptions,
    side: PromptSide,
    *,
    folder: Path | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Dataset:
    """Read, check and tokenise all of it.

    folder: of the run, where tokens are kept; None: nothing stays. on_progress: bytes read, of all.
    Raises Usage for data that are none, or of which more than one row in a hundred is too long and nobody said what
    then; Damaged for a file that cannot be read.
    """
    form = form_of(options.format, options.columns)
    sources = find_sources(data, mixes=options.mixes, evaluation=options.evaluation, form=form)
    print_ = fingerprint(sources, options, side)
    known = None if folder is None else _kept(folder, print_)
    if known is not None:
        return known
    part = None if folder is None else folder / f"{_TOKENS}.part"
    gathering = Gathering(options, side, sources, part, on_progress)
    store = gathering.store
    try:
        facts = gathering.read()
        train, held = gathering.chosen()
        gathering.tell(train, held)
    except BaseException:
        store.close()
        raise
    facts.fingerprint = print_
    if folder is not None and part is not None:
        store.finish()
        part.replace(folder / _TOKENS)
        _write(folder / _RECORD, {"train": train, "held": held, "files": store.files, "facts": facts.to_json()})
    return Dataset(Examples(store, train), Examples(store, held), facts, store)


def _write(path: Path, record: dict[str, object]) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8", errors="replace")
    part.replace(path)


def _kept(folder: Path, print_: str) -> Dataset | None:
    """What was read before, if nothing that it was made of has changed."""
    try:
        record = read_json(folder / _RECORD)
        facts = Facts.from_json(record["facts"])
        if facts.fingerprint != print_:
            return None
        store = Store.opened(folder / _TOKENS, record["files"])
        return Dataset(Examples(store, record["train"]), Examples(store, record["held"]), facts, store)
    except (GlmchatError, OSError, KeyError, TypeError, ValueError):
        return None


__all__ = ["DataOptions", "Dataset", "PromptSide", "read_dataset"]
