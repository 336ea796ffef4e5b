"""Which model a `run` means: the one that was named, the one last used, one picked from a list, one still to pull."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from glmchat.checkpoints.fit import check_weights
from glmchat.checkpoints.readers import usual_readers
from glmchat.cli import output
from glmchat.core import locations
from glmchat.core.errors import GlmchatError, NotInstalled, Usage
from glmchat.core.language import tr
from glmchat.core.text import human_bytes, one_line

if TYPE_CHECKING:
    from glmchat.chat.launch import LaunchOptions, ModelWanted
    from glmchat.core.settings import Settings


def choose_model(
    launch: LaunchOptions,
    name: str | None,
    settings: Settings,
    spoken_with: str | None,
    bits: int | None,
    revision: str | None,
    mode: str,
) -> LaunchOptions:
    """The options with the model in them; the choice is named on stderr where the user did not name it."""
    if launch.server is not None:
        return replace(launch, engine=replace(launch.engine, model=name))
    from glmchat.chat.launch import choice_note, launch_installed, locate, unfinished, wanted_model
    from glmchat.hub import lookup

    choice = wanted_model(name, settings, conversation=spoken_with)
    if choice is not None and choice.origin == "conversation":
        try:
            locate(choice.text, revision=revision, quant=bits)
        except GlmchatError:  # a server's model, or one that was removed
            choice = wanted_model(None, settings)
    if choice is None:
        if mode == "window":
            return launch  # the window has its own picker
        choice = _pick()
    elif choice.origin != "argument":
        output.say(tr("model: {name} ({origin})", name=one_line(choice.text), origin=tr(choice.origin)))
    try:
        row, quantised = locate(choice.text, revision=revision, quant=bits)
    except NotInstalled:
        _offer_pull(choice.text, revision)
        row, quantised = locate(choice.text, revision=revision, quant=bits)
    if not row.complete:
        raise unfinished(row)
    with suppress(GlmchatError, OSError):  # a home that takes no files is told where the history is opened
        lookup.remember(row)
    launch = launch_installed(launch, row, quantised)
    if (note := choice_note(choice.text, row)) is not None:
        output.say(note)
    if quantised is not None and launch.engine.quant is None:
        output.say(tr("{name} already has {bits} bits: nothing to do", name=one_line(row.name), bits=quantised))
    elif launch.engine.copy is not None:
        check_weights(row.path)
        output.say(tr("quantising once; the copy is kept in {path}", path=one_line(str(launch.engine.copy["out"]))))
        if (note := usual_readers(row.family or "", launch.engine.quant or 4).words()) is not None:
            output.say(note)
    elif launch.engine.quant is not None and launch.keep_copy:
        folder = one_line(str(locations.models_dir()))
        output.say(tr("quantising in memory only: {path} cannot be written, so no copy is kept", path=folder))
    return launch


def _pick() -> ModelWanted:
    from glmchat.chat.launch import ModelWanted, pickable

    rows = pickable()
    if not rows:
        raise Usage(
            tr("no model was named, and there are none on this machine"),
            hint=tr("glmchat pull smollm2 fetches a small one (98 MB)"),
            code="model.none",
        )
    labels = [f"{row.name}  {human_bytes(row.size_bytes)}" for row in rows]
    return ModelWanted(rows[output.choose(tr("Which model?"), labels)].name, "picker")


def _offer_pull(text: str, revision: str | None) -> None:
    """On a terminal the plan is shown and asked for; otherwise NotInstalled (exit 1) with the line to type."""
    from glmchat.chat.launch import not_installed
    from glmchat.hub import references

    reference = references.parse(text, revision=revision)
    if not output.interactive():
        raise not_installed(reference)
    from glmchat.cli.pull import fetch
    from glmchat.hub.plan import plan_pull

    for line in plan_pull(reference.base, wait=output.wait).lines():
        output.say(line)
    if not output.confirm(tr("Pull it now?")):
        raise not_installed(reference)
    fetch(reference.base)
