"""What a chat is started with: the flags of `glmchat run`, and which model they mean.

Which model: the one named, else $GLMCHAT_MODEL, else the config's, else the last one, else a person picks.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from glmchat.checkpoints.families import refuse_quantising
from glmchat.checkpoints.fit import check_chat, check_folder, config_at
from glmchat.checkpoints.weight_choice import listed
from glmchat.core import locations
from glmchat.core.engine_options import EngineOptions, quant_bits
from glmchat.core.errors import GlmchatError, NotInstalled, Usage
from glmchat.core.language import tr
from glmchat.core.servers import Server
from glmchat.core.settings import Settings
from glmchat.core.shell import shell_word
from glmchat.core.text import human_bytes, one_line
from glmchat.hub import catalogue, gguf_choice, lookup, references
from glmchat.hub.installed import Installed, copy_folder, copy_manifest
from glmchat.hub.lookup import find_installed
from glmchat.hub.references import Reference


@dataclass(frozen=True, slots=True)
class LaunchOptions:
    """One of three says what to talk to: `server`; the engine's `folder` (installed, or a path the user gave); or
    neither, then the window opens its picker. `chat/connect.py` turns it into a running engine and a session.

    engine:     its model is the reference as the user knows it ("smollm2", "chatglm3-6b:int4"), or the server's name;
                its sampling the catalogue's for this model. generation_config.json is read from its folder.
    sampling:   only what flags set, field of core.messages.Sampling -> value. The ranks below are merged later.
    """

    engine: EngineOptions = field(default_factory=EngineOptions)
    family: str | None = None
    keep_copy: bool = True  # a model quantised at load is kept in the store; False: only in memory
    server: str | None = None  # base URL of an OpenAI-compatible server, ".../v1"
    api_key: str | None = field(default=None, repr=False)
    # (name in the store, scale); None: as the conversation has it
    adapters: tuple[tuple[str, float], ...] | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    system: str | None = None
    resume: int | None = None  # conversation to open
    history: bool = True
    prompt: str | None = None  # what already stands in the prompt
    theme: str | None = None
    language: str | None = None
    finish_on_hangup: bool = False
    note: str | None = None  # to be told once by the window, which covers what was printed before it


Origin = Literal["argument", "GLMCHAT_MODEL", "config", "conversation", "last used", "picker"]


@dataclass(frozen=True, slots=True)
class ModelWanted:
    """A name and who said it."""

    text: str
    origin: Origin


def wanted_model(
    name: str | None, settings: Settings, *, conversation: str | None = None, environ: Mapping[str, str] | None = None
) -> ModelWanted | None:
    """The reference to run; None if nobody says, then the picker must. conversation: the model it was last run with."""
    if name:
        return ModelWanted(name, "argument")
    if conversation:
        return ModelWanted(conversation, "conversation")
    if settings.default_model:
        environ = os.environ if environ is None else environ
        named = environ.get("GLMCHAT_MODEL") or environ.get("GLMCHAT_DEFAULT_MODEL")
        return ModelWanted(settings.default_model, "GLMCHAT_MODEL" if named else "config")
    if (last := lookup.last_used()) is not None:
        return ModelWanted(last.name, "last used")
    return None


def locate(text: str, *, revision: str | None = None, quant: int | None = None) -> tuple[Installed, int | None]:
    """The model on this machine, and the bits it must be quantised to at load (None: as it is).

    Raises Usage for a bad reference, UnknownModel, and NotInstalled with the `pull` line for a known model that is not
    here.
    """
    reference = references.parse(text, revision=revision)
    if quant is not None and reference.quant and quant_bits(reference.quant) != quant:
        raise Usage(
            tr("{name} and --quant {quant} conflict", name=one_line(text), quant=quant),
            hint=tr("give one of them"),
            code="model.quant",
        )
    bits = quant or quant_bits(reference.quant or "")
    if bits is not None:
        made = find_installed(replace(reference, quant=f"int{bits}"))
        if made is not None and made.quant.startswith(f"int{bits}"):
            return made, None
    row = find_installed(reference.base)
    if row is None:
        raise not_installed(reference)
    return row, bits


def installed_row(name: str, *, incomplete: bool = False) -> Installed:
    """The model of that name, or NotInstalled (exit 1) with the line to type."""
    reference = references.parse(name)
    row = find_installed(reference, incomplete=incomplete)
    if row is None:
        raise not_installed(reference)
    return row


def launch_source(text: str) -> Installed:
    """The model that is to be tuned: whole, and readable. Raises as `locate`, and what makes it unfit to run."""
    row, bits = locate(text)
    if bits is not None:
        raise NotInstalled(
            tr("{name} is not on this machine", name=one_line(text)),
            hint=f"glmchat quantize {shell_word(row.name)} --bits {bits}",
        )
    if row.kind != "adapter" and not row.complete:
        raise unfinished(row)
    check_folder(row.path)
    return row


def not_installed(reference: Reference) -> GlmchatError:
    """Why a known model cannot be run from here: none of it is on this machine, or only a part."""
    row = find_installed(reference.base, incomplete=True)
    if row is not None and not row.complete:
        return unfinished(row)
    name = one_line(str(reference))
    return NotInstalled(
        tr("{name} is not on this machine", name=name), hint=f"glmchat pull {shell_word(str(reference.base))}"
    )


def choice_note(text: str, row: Installed) -> str | None:
    """Which of several GGUF models `text` means, and how the others are named; None where there is no choice."""
    reference = references.parse(text)
    if reference.file is not None or reference.path is not None or row.path.suffix != ".gguf":
        return None
    return gguf_choice.others_note(row.name, [f.path for f in row.files], row.path.name)


def unfinished(row: Installed) -> GlmchatError:
    """What an incomplete model lacks, and what brings it."""
    root = row.manifest.root if row.manifest is not None else row.path
    lacking = [f.path for f in row.files if not (root / f.path).is_file() or (root / f.path).stat().st_size != f.size]
    lacking += [p.name for p in sorted(root.glob("*")) if p.is_symlink() and not p.exists() and p.name not in lacking]
    total = sum(f.size for f in row.files)
    if not lacking:  # what is listed is here, and it is no model: the folder itself says why
        try:
            check_folder(row.path)
        except GlmchatError as problem:
            return problem
    name, hint = one_line(row.name), f"glmchat pull {shell_word(row.name)}"
    if row.source in ("path", "made"):
        hint = tr("put the missing files there: {names}", names=listed(lacking))
    if 0 < row.size_bytes < total:
        missing = tr(
            "{missing} of {total} are missing",
            missing=human_bytes(total - row.size_bytes),
            total=human_bytes(total),
        )
    else:
        missing = tr("missing: {names}", names=listed(lacking) or "?")
    return NotInstalled(tr("{name} is only partly here; {missing}", name=name, missing=missing), hint=hint)


def problem_of(row: Installed) -> GlmchatError | None:
    """Why `glmchat run` would refuse it, as far as a look at the files tells."""
    if row.kind == "adapter":
        return None
    return unfinished(row) if not row.complete else problem_at(row.path)


def problem_at(path: Path) -> GlmchatError | None:
    """As `problem_of`, for a folder or a GGUF file that has no name yet."""
    try:
        check_folder(path)
        check_chat(path)
    except GlmchatError as error:
        return error
    return None


def launch_installed(options: LaunchOptions, row: Installed, bits: int | None) -> LaunchOptions:
    """The same options with everything that is known of an installed model."""
    stored = _stored_bits(row.quant)
    if bits is not None and stored is not None:
        if bits != stored:
            raise Usage(
                tr(
                    "{name} already has {stored} bits and cannot be converted to {bits}",
                    name=row.name,
                    stored=stored,
                    bits=bits,
                ),
                hint=tr("leave out --quant, or quantise the original weights"),
                code="quant.already",
            )
        bits = None
    name = row.name if bits is None else f"{row.name}:int{bits}"
    quantised = row.quant if row.quant != "none" else None
    copy = None
    config = config_at(row.path) if bits is not None else {}
    if bits is not None:
        refuse_quantising(config)
    if bits is not None and options.keep_copy and locations.can_write(locations.models_dir()):
        copy = {"out": str(copy_folder(row, bits)), "manifest": copy_manifest(row, bits)}
    engine = replace(
        options.engine,
        model=name,
        folder=row.path,
        revision=row.revision,
        quant=bits,
        copy=copy,
        quant_label=f"int{bits}" if bits else quantised,
        sampling=dict(defaults_of(row)),
    )
    return replace(options, engine=engine, family=row.family)


def launch_server(options: LaunchOptions, server: Server, model: str | None) -> LaunchOptions:
    """The same options with a server of the config. model: None for its usual one. Raises Usage for its key's file."""
    plain = replace(options.engine, folder=None, revision=None, quant=None, copy=None, quant_label=None, sampling={})
    engine = replace(plain, model=model or server.model)
    return replace(options, server=server.url, api_key=server.read_key(), engine=engine, family=None)


def server_named(text: str, servers: Mapping[str, Server]) -> tuple[Server, str | None] | None:
    """`box` or `box:MODEL` -> a server of the config and the model there; None for what names no server."""
    name, _, model = text.partition(":")
    return (servers[name], model or None) if name in servers else None


def _stored_bits(quant: str) -> int | None:
    """ "int4-g128", "q4_1", "q8_0" -> the bits of the weights as they are; None for weights of 16 bits and more."""
    match = re.match(r"(?:int|i?q)(\d)", quant)
    return int(match[1]) if match else None


def defaults_of(row: Installed) -> Mapping[str, Any]:
    """What models.toml says on sampling for this model, or for the model it was made from.

    A ChatGLM that it does not know (a fine-tuned folder) is sampled as its family's own code did by default.
    """
    entries = catalogue.load()
    entry = entries.of_repo(row.repo, row.revision) if row.repo and row.revision else None
    if entry is None:
        names = {row.name.lower(), (row.base or "").lower()}
        entry = next((e for e in entries if e.reference.lower() in names), None)
    if entry is None and (row.family or "").startswith("chatglm"):
        entry = next((e for e in entries if e.family == row.family), None)
    return entry.sampling if entry else {}


def pickable(*, incomplete: bool = False) -> list[Installed]:
    """What a picker shows: whole models and quantised copies on this machine, and on request half downloads."""
    rows = lookup.told_apart(lookup.list_installed())
    return [row for row in rows if row.kind != "adapter" and (row.complete or incomplete)]
