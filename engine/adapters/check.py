"""An adapter against a model that is not loaded: the same checks as when it is attached, from headers alone."""

from __future__ import annotations

from pathlib import Path

import torch

from glmchat.checkpoints.peft_kinds import KINDS
from glmchat.checkpoints.weight_files import PREFIX_ENCODER
from glmchat.core.errors import Usage
from glmchat.core.language import tr
from glmchat.core.text import one_line
from glmchat.engine.adapters.attach import modules_of, refuse_other_base
from glmchat.engine.adapters.files import Adapter
from glmchat.engine.adapters.lora import match, require_finite
from glmchat.engine.adapters.peft_layers import require_transformers
from glmchat.engine.adapters.prefix_tuning import check_prefix
from glmchat.engine.families import Checkpoint, identify
from glmchat.engine.models.base import LanguageModel


def check_against(adapter: Adapter, base: Path) -> Checkpoint:
    """Raise what attaching would raise. Reads no weights, neither the adapter's nor the model's. Returns the model's
    description."""
    checkpoint = identify(base)
    model = outline(checkpoint)
    if adapter.kind in KINDS:
        require_transformers(adapter, model)
    elif adapter.kind == "lora":
        match(adapter, modules_of(model))
    else:
        check_prefix(adapter, checkpoint.spec, model)
    refuse_other_base(adapter, checkpoint)
    return checkpoint


def check_numbers(adapter: Adapter) -> None:
    """Raise Damaged for a tensor of the adapter that is not finite: reads them all, one at a time."""
    for name in adapter.tensors.shapes():
        if adapter.form == "thudm" and not name.startswith(PREFIX_ENCODER):
            continue  # the rest of an older full checkpoint
        stored = adapter.tensors.read(name)
        if isinstance(stored, torch.Tensor):
            require_finite(name, stored)


def outline(checkpoint: Checkpoint) -> LanguageModel:
    """The network without numbers. Raises Usage for a family that builds itself through transformers."""
    if checkpoint.family.load is not None:
        raise Usage(
            tr(
                "models of the family {family} can only be checked while they run",
                family=one_line(checkpoint.spec.family),
            ),
            hint=tr("leave out --base, and attach the adapter in the chat"),
            code="adapter.family",
        )
    with torch.device("meta"):
        return checkpoint.family.build(checkpoint.spec)
