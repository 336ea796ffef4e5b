"""What is said about an answer: how it ended, and the facts under it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from glmchat.core.language import tr

if TYPE_CHECKING:
    from glmchat.chat.history.rows import StoredMessage


def cut_note(facts: Mapping[str, Any]) -> str:
    """For an answer whose finish reason is "length": what the engine said of the limit it met."""
    match facts.get("stopped_by"):
        case "loop":
            return tr("the answer kept repeating itself and was stopped")
        case "context":
            return tr("the context is full")
        case _:
            return tr("the token limit was reached; raise it with --max-tokens or /set max_tokens")


def system_note(facts: Mapping[str, Any]) -> str:
    """For the first answer of a family that knows no system prompt; "" for all others."""
    if facts.get("system_prepended") is not True:
        return ""
    return tr("this model has no system prompt: it was put before the first question")


def details_of(message: StoredMessage) -> list[tuple[str, str]]:
    """Titles and values, for /stats. What the server did not send is left out."""
    d: Mapping[str, Any] = message.details
    table: list[tuple[str, str]] = []

    def row(title: str, name: str, form: str = "{}") -> None:
        if d.get(name) is not None:
            table.append((title, form.format(d[name])))

    row(tr("model"), "model")
    row(tr("revision"), "revision")
    row(tr("weights"), "quant")
    row(tr("prompt tokens"), "prompt_tokens", "{:,}")
    row(tr("of these from the cache"), "cached_tokens", "{:,}")
    row(tr("answer tokens"), "completion_tokens", "{:,}")
    row(tr("first token"), "ttft_seconds", "{:.2f} s")
    row(tr("reading"), "prefill_tokens_per_second", "{:,.0f} tok/s")
    row(tr("writing"), "decode_tokens_per_second", "{:,.1f} tok/s")
    row(tr("end reason"), "finish_reason")
    row(tr("seed"), "seed")
    sampling = d.get("sampling") or {}
    if sampling:
        shown = [f"{k} {v:g}" for k, v in sampling.items() if isinstance(v, int | float) and not isinstance(v, bool)]
        table.append((tr("sampling"), ", ".join(s for s in shown if not s.startswith("seed"))))
    for name, value in (d.get("facts") or {}).items():
        if name in ("threads", "kernel", "device", "dtype") and value is not None:
            table.append((str(name), str(value)))
    if d.get("stretches"):
        table.append((tr("replay"), f"glmchat replay m{message.id}"))
    return table
