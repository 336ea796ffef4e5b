"""`/export [md|json|txt] [PATH]`: a conversation into a new file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from glmchat.chat.history.rows import Tree
from glmchat.chat.history.transcript import Format, export, file_name
from glmchat.core.errors import Usage
from glmchat.core.language import tr

_FORMS: Mapping[str, Format] = {
    "md": "markdown",
    "markdown": "markdown",
    "json": "json",
    "txt": "text",
    "text": "text",
}


def write_export(tree: Tree, argument: str) -> Path:
    """The file that was written, named after the title unless a path was given. Raises Usage; replaces nothing."""
    word, _, rest = argument.partition(" ")
    form = _FORMS.get(word, "markdown")
    name = rest.strip() if word in _FORMS else argument
    path = Path(name).expanduser() if name else Path.cwd() / file_name(tree, form)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(export(tree, form))
    except FileExistsError:
        raise Usage(
            tr("{path} is there already", path=str(path)), hint=tr("give another path"), code="export.exists"
        ) from None
    except OSError as error:
        raise Usage(
            tr("{path} cannot be written: {reason}", path=str(path), reason=str(error.strerror)),
            hint=tr("give another path"),
            code="export.unwritable",
        ) from None
    return path
