"""What the shell completes: names of models and adapters, fast, without any hub."""

from __future__ import annotations


def complete_models(incomplete: str) -> list[str]:
    """Names that begin with what was typed: models here, aliases, the catalogue's."""
    from glmchat.hub.installed import complete_names

    return complete_names(incomplete)


def complete_columns(incomplete: str) -> list[str]:
    """A column of a comparison: models here, `+` adapters, `,` settings."""
    from glmchat.chat.comparison_columns import completions
    from glmchat.core.errors import GlmchatError

    try:
        return completions(incomplete)
    except GlmchatError:  # completion has no place for a message
        return []
