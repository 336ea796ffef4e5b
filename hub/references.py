"""What a person types to name a model: `name`, `owner/repo`, `…@revision`, `…:int4`, a path, or a web address.

A path (it starts with `/`, `./`, `../` or `~`, or something of that name exists) is never looked up on a hub.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

from glmchat.core.engine_options import quant_bits
from glmchat.core.errors import Usage
from glmchat.core.language import tr
from glmchat.core.text import one_line
from glmchat.hub.gguf_choice import LABEL

_PATH_STARTS = ("/", "./", "../", "~", ".\\", "..\\")
_NAME = re.compile(r"\w[\w.+-]{0,95}")
_REPO = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/+-]{0,199}")
_HOSTS = ("hf.co/", "huggingface.co/", "www.huggingface.co/", "modelscope.cn/", "www.modelscope.cn/", "hf-mirror.com/")
_GGUF_PAGE = re.compile(
    r"(https?|hf)://[^/]+/(models/)?(?P<repo>[^/]+/[^/]+)/(blob|resolve|file/view)/(?P<revision>[^/]+)/"
    r"(?P<file>[^?#]+\.gguf)([?#].*)?"
)
_GGUF_FILE = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[^/]+))?/(?P<file>(?:[^/]+/)*[^/]+\.gguf)"
)
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")
LONGEST_PART = 255  # bytes of a name between two slashes, on every usual file system


@dataclass(frozen=True, slots=True)
class Reference:
    """One model as somebody named it. Exactly one of `name`, `repo` and `path` is set."""

    name: str | None = None
    repo: str | None = None  # "owner/repo"
    path: Path | None = None
    revision: str | None = None  # commit, commit prefix, branch, tag, or a label of the catalogue
    quant: str | None = None  # "int4" | "int8"
    file: str | None = None  # one GGUF model of several: its label ("Q6_K") or the name of its (first) file

    def __str__(self) -> str:
        text = str(self.path) if self.path else (self.name or self.repo or "")
        text += f"@{self.revision}" if self.revision else ""
        if self.file:
            text += f":{self.file}" if LABEL.fullmatch(self.file) else f"/{self.file}"
        return text + (f":{self.quant}" if self.quant else "")

    @property
    def base(self) -> Reference:
        """The same model without its quantisation."""
        return replace(self, quant=None)


def parse(text: str, *, revision: str | None = None) -> Reference:
    """Read a reference. `revision` is a --revision flag; it may not contradict an `@revision`. Raises Usage."""
    text = text.strip()
    if not text:
        raise Usage(
            tr("no model was named"),
            hint=tr("for example smollm2, THUDM/chatglm-6b@096f3de6, ./folder"),
            code="model.empty",
        )
    if text.startswith(_HOSTS) and not is_there(text):
        text = f"https://{text}"
    if (of_file := _one_file(text)) is not None:
        reference = of_file
    elif text.startswith(("https://", "http://", "hf://")):
        reference = _from_address(text)
    elif _is_path(text):
        return _path(text, revision)
    else:
        reference = _from_name(text)
    if revision is None:
        return reference
    if reference.revision and reference.revision != revision:
        raise Usage(
            tr("{name} and --revision {revision} conflict", name=text, revision=one_line(revision)),
            hint=tr("give the revision once"),
            code="model.revision",
        )
    return replace(reference, revision=_checked_revision(revision, text))


def is_commit(text: str) -> bool:
    """A full commit: 40 lower-case hexadecimal digits."""
    return re.fullmatch(r"[0-9a-f]{40}", text) is not None


def checked_repo(text: str) -> str:
    """`owner/repo` as a hub allows it, safe to build a folder name from. Raises Usage."""
    if not _REPO.fullmatch(text) or ".." in text or "--" in text:
        raise Usage(
            tr("{name} is not a repository name", name=repr(one_line(text))),
            hint=tr("a repository is owner/name, for example THUDM/chatglm-6b"),
            code="model.name",
        )
    return text


def checked_name(text: str) -> str:
    """A bare name or `owner/repo`, safe to build a folder name from. Raises Usage."""
    return text if _NAME.fullmatch(text) else checked_repo(text)


def _is_path(text: str) -> bool:
    if text.startswith(_PATH_STARTS) or text in (".", "..") or _DRIVE.match(text) or text.endswith((".gguf", "/")):
        return True
    return is_there(text)


def is_there(text: str) -> bool:
    """True for a path at which something is, with `~` as a shell reads it; False for what can be no path."""
    try:
        return Path(text).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # too long for a name, holds NUL, or is the home of nobody
        return False


def _path(text: str, revision: str | None) -> Reference:
    if revision is not None:
        raise Usage(
            tr("{name} is a folder here; it has no revisions", name=one_line(text)),
            hint=tr("leave out --revision"),
            code="model.revision",
        )
    try:
        if "\0" in text or any(len(part) > LONGEST_PART for part in os.fsencode(text).split(b"/")):
            raise ValueError(text)
        path = Path(text).expanduser()
        whole, _, quant = text.rpartition(":")
        bits = quant_bits(quant)
        if bits is not None and whole and not path.exists():
            return Reference(path=Path(whole).expanduser().absolute(), quant=f"int{bits}")
        return Reference(path=path.absolute())
    except (RuntimeError, ValueError):
        raise Usage(
            tr("{name} is not a path", name=repr(one_line(text))),
            hint=tr("write ./folder or /folder"),
            code="model.path",
        ) from None


def _from_name(text: str) -> Reference:
    rest, quant, file = text, None, None
    while ":" in rest:
        rest, _, word = rest.rpartition(":")
        bits = quant_bits(word)
        if bits is None and file is None and LABEL.fullmatch(word):
            file = word.upper()
        elif bits is None or quant is not None or file is not None:
            raise Usage(
                tr("glmchat does not support the quantisation {quant}", quant=repr(one_line(word))),
                hint=tr("after the colon comes int4 or int8, or which GGUF file: Q4_K_M; a revision follows @"),
                code="model.quant",
            )
        else:
            quant = f"int{bits}"
    rest, at, revision = rest.partition("@")
    if at:
        _checked_revision(revision, text)
    chosen = revision or None
    if "/" in rest:
        return Reference(repo=checked_repo(rest), revision=chosen, quant=quant, file=file)
    if not _NAME.fullmatch(rest):
        raise Usage(
            tr("{name} is not a model name", name=repr(one_line(text))),
            hint=tr("a name, owner/repo, or a path that starts with ./ or /"),
            code="model.name",
        )
    return Reference(name=rest, revision=chosen, quant=quant, file=file)


def _one_file(text: str) -> Reference | None:
    """The reference to one GGUF file of a repository, by its page's address or as owner/repo/file; None for others."""
    page, plain = _GGUF_PAGE.fullmatch(text), _GGUF_FILE.fullmatch(text)
    if page is not None:
        revision = unquote(page["revision"])
        _checked_revision(revision, text)
        file = None if revision == "main" else revision
        return Reference(repo=checked_repo(page["repo"]), revision=file, file=unquote(page["file"]))
    if plain is None or is_there(text) or is_there(plain["repo"]):
        return None
    revision = plain["revision"]
    if revision is not None:
        _checked_revision(revision, text)
    return Reference(repo=checked_repo(plain["repo"]), revision=revision, file=plain["file"])


def _from_address(text: str) -> Reference:
    """`https://huggingface.co/owner/repo/tree/REV`, as people copy it from the browser."""
    head, colon, label = text.rpartition(":")
    if colon and not head.endswith(("https", "http", "hf")) and LABEL.fullmatch(label):
        return replace(_from_address(head), file=label.upper())
    try:
        address = urlsplit(text)
    except ValueError:  # https://[
        raise _no_address(text) from None
    parts = [unquote(p) for p in (address.netloc + "/" * bool(address.netloc) + address.path).split("/") if p]
    if address.scheme != "hf":
        parts = parts[1:]
        if parts[:1] == ["models"]:  # modelscope.cn/models/owner/name
            parts = parts[1:]
    if len(parts) < 2:
        raise _no_address(text)
    owner, _, name = parts[0], "", parts[1]
    name, _, revision = name.partition("@")
    if len(parts) >= 4 and parts[2] in ("tree", "blob", "resolve", "commit"):
        revision = parts[3]
    if revision:
        _checked_revision(revision, text)
    return Reference(repo=checked_repo(f"{owner}/{name}"), revision=revision or None)


def _no_address(text: str) -> Usage:
    return Usage(
        tr("{name} is not the address of a model", name=one_line(text)),
        hint=tr("for example https://huggingface.co/THUDM/chatglm-6b"),
        code="model.name",
    )


def _checked_revision(revision: str, text: str) -> str:
    if not _REVISION.fullmatch(revision) or ".." in revision or "//" in revision or revision.endswith(("/", ".lock")):
        raise Usage(
            tr("{name} does not contain a valid revision", name=repr(one_line(text))),
            hint=tr("after @ comes a commit, a branch or a tag"),
            code="model.revision",
        )
    return revision
