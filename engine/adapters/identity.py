"""Is this the model that the adapter was trained on? Asked before the model is touched."""

from __future__ import annotations

from glmchat.checkpoints.model_names import names_of, other_model
from glmchat.core.errors import Usage
from glmchat.core.language import tr
from glmchat.engine.adapters.adapter import Adapter
from glmchat.engine.families import Checkpoint


def refuse_other_base(adapter: Adapter, checkpoint: Checkpoint) -> None:
    """Raise Usage if the adapter names the model it was trained on, and that is another one."""
    if adapter.base is None or adapter.forced:
        return
    said = checkpoint.gguf.metadata.get("general.name") if checkpoint.gguf is not None else None
    here = other_model(adapter.base, names_of(checkpoint.path, checkpoint.config, said))
    if here is None:
        return
    raise Usage(
        tr(
            "this adapter was trained on {base}, and the model here is {here}: the same shapes, other weights",
            base=adapter.base,
            here=here,
        ),
        hint=tr("use it with its own base, or attach it all the same with --force"),
        code="adapter.other_base",
    )
