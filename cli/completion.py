"""What the shell completes: names of models, fast, without any hub."""

from __future__ import annotations


def complete_models(incomplete: str) -> list[str]:
    """Names that begin with what was typed: models here, aliases, the catalogue's."""
    from glmchat.hub.installed import complete_names

    return complete_names(incomplete)
