"""Finding a folder's vocabulary file, and the sentence for when it is not there or is another model's."""

from __future__ import annotations

from pathlib import Path

from glmchat.core.errors import Damaged
from glmchat.core.text import one_line


def vocabulary_file(folder: Path, name: str, model: str) -> Path:
    """The path of `name` in `folder`. Raises Damaged if it is absent, and names a stranger's file that is there."""
    path = folder / name
    if path.is_file():
        return path
    others = {"ice_text.model", "tokenizer.model", "tokenizer.json", "vocab.json"} - {name}
    found = sorted(other for other in others if (folder / other).is_file())
    beside = f" (there is {', '.join(found)}, which belongs to other models)" if found else ""
    raise Damaged(
        f"{one_line(str(folder))} has no {name}, the vocabulary of {model}{beside}",
        hint=f"fetch {name} from the repository that the weights are from",
        code="tokenizer.missing",
    )


def check_rows(path: Path, tokens: int, rows: int) -> None:
    """Raise Damaged if the vocabulary holds ids that the network has no rows for."""
    if tokens > rows:
        raise Damaged(
            f"{one_line(path.name)} has {tokens:,} tokens, but config.json gives the network {rows:,} rows",
            hint="the vocabulary and the weights are of different models: fetch both from one repository",
            code="tokenizer.generation",
        )
