"""What adapters were trained with: a conversation is put to the model as the rows were, or it is said what differs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from glmchat.checkpoints.chat_template import template_of
from glmchat.core.errors import GlmchatError
from glmchat.core.fingerprints import of_text
from glmchat.core.language import tr
from glmchat.core.text import one_line
from glmchat.hub import adapters

_OTHER_PROMPTS = ("lora-guide", "chatglm-tuning")  # recipes whose prompts are not the model's own
Weighted = tuple[str, float]  # name in the store, weight


def trained_system(chosen: Iterable[Weighted]) -> str | None:
    """The system text before the rows that these adapters learned, "" for none; None where none of them tells, or two
    tell otherwise. Looks at their folders alone."""
    systems = {record["system"] for record in map(_record, chosen) if isinstance(record.get("system"), str)}
    return systems.pop() if len(systems) == 1 else None


def trained_words(chosen: Iterable[Weighted], folder: Path | None, system: str | None) -> list[str]:
    """Sentences on what these adapters learned with, for a conversation with the model in `folder` and this system
    text: what is used of it, and what differs."""
    told = []
    for name, weight in chosen:
        record = _record((name, weight))
        shown = one_line(name, 60)
        learned = record.get("system")
        if isinstance(learned, str) and learned != (system or ""):
            before = repr(one_line(learned, 80)) if learned else tr("none")
            told.append(tr("{name} was trained with another system prompt: {text}", name=shown, text=before))
        elif learned:
            text = repr(one_line(learned, 80))
            told.append(tr("the system prompt is the one that {name} was trained with: {text}", name=shown, text=text))
        if record.get("like") in _OTHER_PROMPTS:
            told.append(tr("{name} was trained with the prompts of {like}, and the chat writes others", name=shown,
                           like=record["like"]))  # fmt: skip
        if folder is not None and _has_changed(record.get("template"), folder):
            told.append(tr("{name} was trained with another chat template than the model has now", name=shown))
    return told


def _has_changed(template: Any, folder: Path) -> bool:
    """template: as a prompt format names itself, a hash where the checkpoint's own template writes the prompts."""
    if not isinstance(template, str) or not template.startswith("sha256:"):
        return False
    try:
        now = template_of(folder)
    except GlmchatError:
        return False
    return now is not None and template != "sha256:" + of_text(now)


def _record(one: Weighted) -> dict[str, Any]:
    """What `glmchat tune` noted of an adapter; {} for all others, and for one that is gone."""
    row = adapters.by_name(one[0])
    record = adapters.facts_of(row).get("trained") if row is not None else None
    return record if isinstance(record, dict) else {}
