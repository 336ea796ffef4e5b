"""Adapters as a person names them: `NAME`, `NAME:0.5`, and for one that is not in the store yet its folder."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from glmchat.checkpoints.adapter_files import brings_text
from glmchat.checkpoints.adapter_fit import CHATGLM, Base, Misfit, misfit
from glmchat.checkpoints.adapter_settings import formats_of_two, weighted_words, words_of_two
from glmchat.checkpoints.chat_template import template_of
from glmchat.checkpoints.peft_kinds import refuse_together
from glmchat.core.errors import GlmchatError, Usage
from glmchat.core.language import tr
from glmchat.core.locations import user_path
from glmchat.core.shell import shell_word
from glmchat.core.text import one_line
from glmchat.hub import adapters
from glmchat.hub.installed import Installed
from glmchat.hub.references import is_there

if TYPE_CHECKING:
    from glmchat.chat.launch import LaunchOptions
    from glmchat.chat.session import ChatSession

Weighted = tuple[str, float]  # name in the store, weight


def parse_adapter(text: str) -> tuple[str, float]:
    """`NAME[:WEIGHT]` (or `NAME=WEIGHT`) -> name, weight. Raises Usage without a name, and for what is no weight."""
    name, weight = text, 1.0
    for sign in (":", "="):
        before, is_weighted, after = text.rpartition(sign)
        if is_weighted:
            name, weight = before, parse_weight(after)
            break
    if not name:
        raise Usage(
            tr("{text} does not name an adapter", text=repr(one_line(text, 40))),
            hint=tr("NAME or NAME:WEIGHT, for example poet:0.8"),
            code="adapter.unnamed",
        )
    return name, weight


def parse_path(text: str) -> tuple[Path, float] | None:
    """`FOLDER[:WEIGHT]` (or a file) -> path, weight; None for a name.

    For the command line of a person at this machine only: a path never goes through the API. What has no slash is a
    name of the store first, and a folder only if the store has no such name.
    """
    name, weight = (text, 1.0) if is_there(text) else parse_adapter(text)
    if name.startswith((".", "/", "~")) or "/" in name:
        return user_path(name), weight
    return (Path(name), weight) if is_there(name) and adapters.by_name(name) is None else None


def parse_weight(text: str) -> float:
    """Raises Usage unless it is a number between -100 and 100."""
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not -100 <= weight <= 100:
        raise Usage(
            tr("{text} is not a valid weight", text=repr(one_line(text, 40))),
            hint=tr("a number, for example NAME:0.8"),
            code="adapter.scale",
        )
    return weight


def require_known(chosen: Iterable[Weighted]) -> tuple[Weighted, ...]:
    """The same, every name in the store.

    Raises UnknownModel with the names there are, and Usage for a path, with the command that brings it in.
    """
    adapters_named = tuple(chosen)
    for name, _ in adapters_named:
        if name.startswith((".", "/", "~")) or "/" in name:
            raise Usage(
                tr("adapters are named as in the store, but {path} is a path", path=one_line(name, 120)),
                hint=f"glmchat adapters add {one_line(name, 120)}",
                code="adapter.path",
            )
        adapters.find_adapter(name)
    return adapters_named


def require_usable(
    chosen: Sequence[Weighted], folder: Path | None, *, force: bool = False, forced: Collection[str] = ()
) -> None:
    """Raise Usage or UnknownModel unless these can be used together, with the model in `folder` if that is known.

    force: take those that name another base too, and note in the store that their answers have to say so. forced: names
    that this conversation has taken so already; another conversation is asked anew.
    """
    names = [name for name, _ in require_known(chosen)]
    if len(set(names)) < len(names):
        raise Usage(
            tr("an adapter is named twice"), hint=tr("name each one once, as NAME:WEIGHT"), code="adapter.twice"
        )
    require_fit(chosen, folder, force=force, forced=forced)
    for name in names if force else ():
        row = adapters.find_adapter(name)
        if not adapters.facts_of(row).get("forced"):
            adapters.change_force(row, True)


def require_fit(
    weighted: Iterable[tuple[str, float]],
    folder: Path | None,
    *,
    force: bool = False,
    forced: Collection[str] = (),
) -> None:
    """Raise Usage with the reason if these adapters of the store cannot be right for the model in `folder`.

    weighted: (name, weight). folder: None for a model that is not known yet. force: names prove nothing, measures do.
    Raises UnknownModel for a name that is not in the store.
    """
    rows = [(adapters.find_adapter(name), weight) for name, weight in weighted]
    base = Base.of(folder) if folder is not None and rows else None
    for row, _ in rows:
        problem = unfit(row, base)
        if problem is not None and not ((force or row.name in forced) and problem.forceable):
            raise problem.error(row.name)
    if base is not None:
        _require_one_text(rows, base)
    facts = [(adapters.facts_of(row), weight) for row, weight in rows]
    refuse_together((str(fact.get("kind")), fact.get("takes_weight") is not False, weight) for fact, weight in facts)
    prefixes = [weight for row, weight in rows if adapters.facts_of(row).get("kind") in ("prefix", "prompt")]
    if prefixes and abs(sum(prefixes) - 1) > 1e-6:
        raise Usage(
            tr("the weights of the prefixes add up to {sum}", sum=f"{sum(prefixes):g}"),
            hint=tr("a prefix is either there or not, so its weight is 1; the weights of a mixture add up to 1"),
            code="adapter.prefixes",
        )


def _require_one_text(rows: Sequence[tuple[Installed, float]], base: Base) -> None:
    """Raise Usage for adapters that bring different chat templates, or words that no other may touch."""
    if base.spec is None or base.spec.family in CHATGLM:  # whose code writes the prompts
        return
    templates = {row.name: template for row, _ in rows if (template := own_template(row)) is not None}
    if len(set(templates.values())) > 1:
        raise formats_of_two(list(templates))
    words = {row.name: int(n) for row, _ in rows if (n := adapters.facts_of(row).get("vocabulary")) is not None}
    here = base.spec.vocab_size
    for row, weight in rows:
        if words.get(row.name, here) != here and weight != 1:
            raise weighted_words(row.name)
    if len(words) > 1 and set(words.values()) != {here}:
        raise words_of_two(words)


def own_template(row: Installed) -> str | None:
    """The chat template that an adapter brings."""
    return template_of(row.path) if brings_text(row.path) else None


def brings_template(name: str) -> bool:
    """Whether the adapter of this name brings a chat template."""
    row = adapters.by_name(name)
    return row is not None and own_template(row) is not None


def folder_of_template(chosen: Iterable[Weighted], folder: Path) -> Path:
    """Where the chat template lies that these adapters and the model in `folder` are spoken to with."""
    if (spec := Base.of(folder).spec) is not None and spec.family in CHATGLM:
        return folder
    return next((adapters.find_adapter(name).path for name, _ in chosen if brings_template(name)), folder)


def own_texts(chosen: Iterable[Weighted], folder: Path | None) -> list[str]:
    """Sentences that say which of these adapters changes how the conversation is put to the model in `folder`."""
    base = Base.of(folder) if folder is not None else None
    if folder is None or base is None or base.spec is None or base.spec.family in CHATGLM:
        return []
    told = []
    for name, _ in chosen:
        row = adapters.find_adapter(name)
        words = adapters.facts_of(row).get("vocabulary")
        template = own_template(row)
        if template is not None and template != template_of(folder):
            told.append(tr("{name} brings a chat template of its own, which is used while it is active", name=name))
        if words is not None and words != base.spec.vocab_size:
            told.append(tr("{name} brings a vocabulary of its own: {words} words", name=name, words=words))
    return told


def unfit(row: Installed, base: Base | None) -> Misfit | None:
    """Why this adapter of the store cannot be used, with this model if one is known.

    That it was forced once counts for nothing here: it was so in another conversation.
    """
    if not row.complete:
        return Misfit(
            tr("some of its files are missing"), tr("glmchat verify {name} shows which", name=shell_word(row.name))
        )
    facts = {**adapters.facts_of(row), "forced": False}
    return misfit(facts, row.base, base) if base is not None else None


def change(session: ChatSession, words: Sequence[str], launch: LaunchOptions) -> None:
    """What `/adapter WORDS` asks for: `NAME[:WEIGHT] …` (with `--force`), `weight W`, `off`.

    Raises Usage or UnknownModel, and then nothing has changed: an adapter that does not fit is refused here, before
    the next question is asked. On a server the names are the server's, which knows them.
    """
    if words[0].lower() in ("none", "off"):
        session.use_adapters(())
        return
    if words[0].lower() == "weight" and len(words) == 2:
        weight = parse_weight(words[1])
        if not session.adapters:
            raise Usage(tr("no adapter is in use"), hint="/adapter NAME", code="adapter.none")
        chosen = tuple((name, weight) for name, _ in session.adapters)
    else:
        chosen = tuple(parse_adapter(word) for word in words if word != "--force")
    use(session, chosen, launch, force="--force" in words)


def use(session: ChatSession, chosen: Sequence[Weighted], launch: LaunchOptions, *, force: bool = False) -> None:
    """Exactly these from the next answer on. Raises Usage or UnknownModel; what was in use then stays."""
    if launch.server is None:
        forced = [name for name, _ in session.adapters if adapters.is_forced(name)]
        try:
            require_usable(chosen, launch.engine.folder, force=force, forced=forced)
        except Usage as problem:
            if problem.code != "adapter.other_base":
                raise
            words = " ".join(name if weight == 1 else f"{name}:{weight:g}" for name, weight in chosen)
            hint = tr("use it with its own base, or attach it anyway: /adapter {names} --force", names=words)
            raise Usage(problem.message, hint=hint, code=problem.code) from None
    session.use_adapters(chosen)


def keep_fitting(session: ChatSession, launch: LaunchOptions) -> tuple[str, ...]:
    """The conversation goes on with another model: adapters that are not for it are put away. Returns their names."""
    fitting: list[Weighted] = []
    lost: list[str] = []
    for one in session.adapters:
        try:
            require_known((one,))
            require_fit((one,), launch.engine.folder)
            fitting.append(one)
        except GlmchatError:
            lost.append(one[0])
    if lost:
        session.use_adapters(fitting)
    return tuple(lost)


def shown(name: str, scale: float, *, forced: bool) -> str:
    """As status line and answers name it: "poet", "poet:0.5", "medical (forced)"."""
    text = one_line(name, 30) + ("" if scale == 1 else f":{scale:g}")
    return f"{text} ({tr('forced')})" if forced else text
