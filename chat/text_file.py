"""The file that `/file PATH` names, for the window and for plain lines: its text, or why no model can have it."""

from __future__ import annotations

from dataclasses import dataclass

from glmchat.core.errors import Usage
from glmchat.core.files import TooLarge, read_file
from glmchat.core.language import tr
from glmchat.core.locations import user_path
from glmchat.core.text import human_bytes, one_line

LIMIT = 1_000_000  # bytes; about what the longest contexts hold, and what a prompt can show while one types


@dataclass(frozen=True, slots=True)
class TextFile:
    name: str
    text: str  # without a byte order mark
    size: int  # bytes


def read_text_file(argument: str) -> TextFile:
    """Read the file of that path, which may stand in quotes. Raises Usage unless it is a text of at most `LIMIT`."""
    if not argument:
        raise Usage(tr("/file needs a path"), hint=tr("/file notes.txt"), code="file.unnamed")
    path, shown = user_path(argument.strip("'\"")), one_line(argument)
    try:
        data = read_file(path, LIMIT)
    except TooLarge:
        raise Usage(
            tr("{path} is larger than {limit}, the most that /file takes", path=shown, limit=human_bytes(LIMIT)),
            hint=tr("give the path of a text file"),
            code="file.size",
        ) from None
    except OSError as error:
        raise Usage(
            tr("{path} cannot be read: {reason}", path=shown, reason=error.strerror or str(error)),
            hint=tr("give the path of a text file"),
            code="file.unreadable",
        ) from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise Usage(
            tr("{path} is not UTF-8 text", path=shown),
            hint=tr("convert it first, for example: iconv -f GB18030 -t UTF-8"),
            code="file.binary",
        ) from None
    if not text.strip():
        raise Usage(
            tr("{path} contains no text to send", path=shown),
            hint=tr("give the path of a text file"),
            code="file.no_text",
        )
    return TextFile(path.name, text, len(data))
