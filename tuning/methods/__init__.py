"""The ways to learn: what of a model learns, by which loss, and what is left of it; here, which is called what."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from glmchat.core.errors import Usage
from glmchat.core.language import tr
from glmchat.engine.families import Checkpoint
from glmchat.engine.models.base import LanguageModel
from glmchat.tuning.methods.base import Method
from glmchat.tuning.methods.dpo import Dpo
from glmchat.tuning.methods.full import Full
from glmchat.tuning.methods.lora import Lora
from glmchat.tuning.methods.prefix import Prefix, Prompt
from glmchat.tuning.settings import Settings

METHODS: Mapping[str, Callable[[Checkpoint, LanguageModel, Settings], Method]] = {
    "lora": Lora,
    "prefix": Prefix,
    "prompt": Prompt,
    "dpo": Dpo,
    "full": Full,
    "scratch": Full,  # of a base that has learned nothing yet (tuning/scratch.py)
}


def method_of(checkpoint: Checkpoint, model: LanguageModel, settings: Settings) -> Method:
    """Make a loaded model ready to learn. Raises Usage for a method that is none, or that this model cannot take."""
    make = METHODS.get(settings.method)
    if make is None:
        raise Usage(
            tr("{name} is no method of tuning", name=settings.method),
            hint=tr("there are: {names}", names=", ".join(METHODS)),
            code="tune.method",
        )
    return make(checkpoint, model, settings)
