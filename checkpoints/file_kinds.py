"""What a file is, by its first bytes: its name is only what somebody called it."""

from __future__ import annotations

from pathlib import Path

from glmchat.checkpoints.weight_files import refuse_pointer
from glmchat.checkpoints.zip_directory import FileBytes, read_directory
from glmchat.core.errors import Damaged, NotInstalled, Usage
from glmchat.core.files import open_file
from glmchat.core.language import tr
from glmchat.core.text import one_line

_ARCHIVES = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"7z\xbc\xaf", b"\x28\xb5\x2f\xfd", b"Rar!")
_HEAD = 512  # bytes; a tar archive says so at byte 257


def kind_of_file(path: Path) -> str:
    """ "gguf", "safetensors", "torch", "json", "archive", "page", "empty", "folder", "nothing" or "unknown"."""
    if path.is_dir():
        return "folder"
    try:
        with open_file(path) as file:
            head = file.read(_HEAD)
    except OSError:
        return "nothing"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if not head:
        return "empty"
    if head.startswith(b"GGUF"):
        return "gguf"
    if head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") < path.stat().st_size:
        return "safetensors"
    if text[:1] in (b"{", b"["):
        return "json"
    if text[:9].lower() in (b"<!doctype", b"<html>\r\n") or text[:5].lower() in (b"<html", b"<?xml"):
        return "page"
    if head.startswith(b"PK"):
        return "torch" if _is_of_torch(path) else "archive"
    if head.startswith(_ARCHIVES) or head[257:262] == b"ustar":
        return "archive"
    if head[:1] == b"\x80" and head[1] <= 5:
        return "torch"  # a pickle, as torch before 1.6 wrote it
    return "unknown"


def _is_of_torch(path: Path) -> bool:
    """A damaged archive counts as one of torch's; its reader then says what is wrong."""
    try:
        with open_file(path) as file:
            return any(name.endswith("data.pkl") for name in read_directory(FileBytes(path, file.fileno())))
    except Damaged:
        return True


def refuse_no_weights(path: Path) -> None:
    """Raise Usage for a file that holds no tensors whatever its name, with what it is instead."""
    kind, name = kind_of_file(path), one_line(path.name)
    if kind == "nothing":
        raise NotInstalled(
            tr("{name} cannot be opened", name=one_line(str(path))),
            hint=tr("look whether it is still there, and whether you may read it"),
            code="file.gone",
        )
    if path.is_file():  # no pipe
        refuse_pointer(path)
    if kind == "json":
        raise Usage(
            tr("{name} is a JSON file, not weights", name=name),
            hint=tr("name the folder that it lies in, or the file with the weights"),
            code="file.kind",
        )
    if kind == "archive":
        raise Usage(
            tr("{name} is an archive", name=name),
            hint=tr("unpack it, and name the folder or the file with the weights"),
            code="file.kind",
        )
    if kind == "page":
        raise Usage(
            tr("{name} is a web page, not weights", name=name),
            hint=tr("the download saved a page instead of the file: download it again, or use `glmchat pull`"),
            code="file.kind",
        )
    if kind == "unknown":
        raise Usage(
            tr("{name} is no file of weights: neither safetensors nor GGUF nor saved by torch", name=name),
            hint=tr("name the file with the weights; if it should be one, download it again"),
            code="file.kind",
        )


def refuse_lone_weights(path: Path) -> None:
    """Raise Usage for tensors in a file of their own: a model is run from its folder, or from a GGUF file."""
    kind, name = kind_of_file(path), one_line(path.name)
    if kind not in ("safetensors", "torch"):
        return
    if path.parent.joinpath("config.json").is_file():
        hint = tr("name the folder that it lies in: {folder}", folder=one_line(str(path.parent)))
    else:
        hint = tr("a model is a folder with config.json, weights and tokenizer, or a GGUF file")
    raise Usage(tr("{name} contains only weights", name=name), hint=hint, code="file.kind")
