"""The one error tree. Every error a user can meet carries a sentence, a hint and an exit code.

    GlmchatError
    ├── Failed        exit 1   network, server, engine died
    │   ├── NetworkFailed  ServerFailed  EngineDied  NotInstalled
    ├── Usage         exit 2   unknown name or option, contradiction, a question without a terminal
    │   ├── UnknownModel
    │   └── FieldError  a field of a request to the server
    ├── Damaged       exit 3   a file is damaged, is not what it claims, or is hostile
    │   └── Hostile
    ├── DoesNotFit    exit 4   disk, memory, context
    └── Interrupted   exit 130

`code` is the stable machine-readable name ("pull.network"); it goes into JSON and over the wire.
"""

from __future__ import annotations

import errno
from typing import Any, ClassVar

from glmchat.core.language import tr
from glmchat.core.text import one_line

# What a file system says to a user and not about a mistake of ours: no room, no right, read only, a bad disk, a
# folder or a loop in the place of a file.
_REFUSALS = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE),
    *(errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EMFILE, errno.ENFILE),
)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a disk that takes no more


class GlmchatError(Exception):
    """Base of everything that is put into words for a user.

    message: one sentence, no trailing full stop needed, no traceback, no secrets.
    hint:    what to do next; every error has one.
    code:    dotted, stable: "<area>.<what>".
    """

    exit: ClassVar[int] = 1
    default_code: ClassVar[str] = "failed"

    def __init__(self, message: str, *, hint: str, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.code = code or self.default_code

    def to_json(self) -> dict[str, Any]:
        """What stands on the wire and, with `event: "error"`, in the last line of `--json`."""
        return {"code": self.code, "message": self.message, "hint": self.hint, "exit": self.exit}

    @staticmethod
    def from_json(data: dict[str, Any]) -> GlmchatError:
        """The inverse of `to_json`: the class is found again by its exit code."""
        kind = next((c for c in (Usage, Damaged, DoesNotFit, Interrupted) if c.exit == data.get("exit")), Failed)
        return kind(
            str(data.get("message", "the engine failed")),
            hint=str(data.get("hint", "")),
            code=str(data.get("code", kind.default_code)),
        )


class Failed(GlmchatError):
    """Something that may work another time: network, server, engine."""


class NetworkFailed(Failed):
    default_code = "network"


class ServerFailed(Failed):
    default_code = "server"


class EngineDied(Failed):
    default_code = "engine.died"


class NotInstalled(Failed):
    """A known model that is not on this machine."""

    default_code = "model.not_installed"


class Usage(GlmchatError):
    exit = 2
    default_code = "usage"


class UnknownModel(Usage):
    default_code = "model.unknown"


class FieldError(Usage):
    """A field of a request that is wrong or not done. `param` is its name: OpenAI's error object has a place for it.

    names: what in it is at fault, where the field is an object.
    """

    default_code = "request.invalid"

    def __init__(
        self,
        message: str,
        *,
        hint: str,
        code: str | None = None,
        param: str | None = None,
        names: tuple[str, ...] = (),
    ) -> None:
        super().__init__(message, hint=hint, code=code)
        self.param = param
        self.names = names


class Damaged(GlmchatError):
    """A file is damaged or is not what it claims to be."""

    exit = 3
    default_code = "file.damaged"


class Hostile(Damaged):
    """A file or a server tries something that no honest one does."""

    default_code = "file.hostile"


class DoesNotFit(GlmchatError):
    exit = 4
    default_code = "does_not_fit"


class Interrupted(GlmchatError):
    exit = 130
    default_code = "interrupted"


def refusal(error: OSError) -> GlmchatError | None:
    """What a file system refuses, in words, wherever that is met; None for an OSError that may be a mistake of ours."""
    if error.errno not in _REFUSALS:
        return None
    kind = DoesNotFit if error.errno in FULL else Failed
    where = f"{one_line(str(error.filename))}: " if error.filename else ""
    hint = tr("check its owner and permissions, and the disk")
    if kind is DoesNotFit:
        hint = tr("free some space, or make the folder writable")
    return kind(f"{where}{error.strerror}", hint=hint, code="file.refused")
