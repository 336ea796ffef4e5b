"""The networks of engine/models as training runs them: several documents in one pass, no padding, no cache.

The layers are the model's own. What stands here is what their `forward` does around the layers, for documents that lie
behind each other: each has positions of its own and sees itself alone (`engine/models/documents.py`).
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from glmchat.checkpoints.device_plan import DevicePlan
from glmchat.core.errors import Usage
from glmchat.core.language import tr
from glmchat.core.machine import physical_cores
from glmchat.engine.families import Checkpoint, identify
from glmchat.engine.loading import load_model
from glmchat.engine.models import chatglm, chatglm2
from glmchat.engine.models.base import LanguageModel
from glmchat.engine.models.chatglm import ChatGLM
from glmchat.engine.models.chatglm2 import ChatGLM2
from glmchat.engine.models.documents import Documents
from glmchat.engine.models.gpt2 import GPT2
from glmchat.engine.models.layers import tied_head
from glmchat.engine.models.llama import Llama
from glmchat.engine.models.prefix import PrefixedModel
from glmchat.engine.models.transformers_model import Fallback
from glmchat.engine.placement import choose_dtype, multiply_exactly
from glmchat.tuning.checking import no_float16
from glmchat.tuning.examples import Example
from glmchat.tuning.products import head_loss, head_losses, losses_of_logits
from glmchat.tuning.settings import Settings

Layer = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Flat:
    """Documents behind each other.

    ids [n] of all of them; lengths of each; rows [m]: those of the n whose next token is learned; targets [m] these
    tokens.
    """

    ids: torch.Tensor
    lengths: tuple[int, ...]
    rows: torch.Tensor
    targets: torch.Tensor

    def documents(self) -> Iterator[torch.Tensor]:
        return iter(torch.split(self.ids, list(self.lengths)))


@dataclass(frozen=True, slots=True)
class Front:
    """What stands before every document and learns: keys and values of every layer [layers, 2, kv_heads, length,
    head_dim], or virtual tokens [length, hidden]. shifts: whether keys take positions; virtual tokens always do."""

    key_values: torch.Tensor | None = None
    words: torch.Tensor | None = None
    shifts: bool = False


def flatten(examples: Sequence[Example], device: torch.device | str = "cpu") -> Flat:
    """The first token of a document stands behind nothing, so it is never learned whatever `learned` says."""
    ids: list[int] = []
    rows: list[int] = []
    targets: list[int] = []
    for words, counted in (document for example in examples for document in example.documents()):
        start = len(ids)
        ids += words
        learned = [at for at, counts in enumerate(counted) if counts and at]
        rows += [start + at - 1 for at in learned]
        targets += [words[at] for at in learned]
    lengths = tuple(length for example in examples for length in example.lengths)
    numbers, places, wanted = (torch.tensor(each, dtype=torch.long, device=device) for each in (ids, rows, targets))
    return Flat(numbers, lengths, places, wanted)


def learned_of(example: Example) -> int:
    """How many tokens of it are learned."""
    return sum(sum(learned[1:]) for _, learned in example.documents())


def loss_of(
    model: LanguageModel,
    flat: Flat,
    *,
    by_layer: bool = False,
    front: Front | None = None,
    hits: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum of the cross entropies of `flat.targets`, float32; logits are computed for the learned rows alone.

    by_layer: keep only what goes into each layer, and compute the layer again in the backward pass. front: of models
    that are computed here alone. hits: a number that the targets with the highest logit are added to.
    """
    if isinstance(model, Fallback):
        return _of_transformers(model, flat, by_layer=by_layer, hits=hits).double().sum().float()
    return head_loss(hidden(model, flat, by_layer=by_layer, front=front), flat.targets, head_of(model), hits)


def losses_of(model: LanguageModel, flat: Flat, *, by_layer: bool = False) -> torch.Tensor:
    """The cross entropy of each of `flat.targets`: [m], float32."""
    if isinstance(model, Fallback):
        return _of_transformers(model, flat, by_layer=by_layer)
    return head_losses(hidden(model, flat, by_layer=by_layer), flat.targets, head_of(model))


def hidden(model: LanguageModel, flat: Flat, *, by_layer: bool = False, front: Front | None = None) -> torch.Tensor:
    """What the head of a model of ours is given for `flat.rows`: [m, hidden], after the last norm."""
    x, layers, norm = _unrolled(model, flat, front or Front())
    for layer in layers:
        x = cast(torch.Tensor, checkpoint(layer, x, use_reentrant=False)) if by_layer else layer(x)
    rows = flat.rows
    if front is not None and front.words is not None:  # so many of them stand before each document
        ends = torch.tensor(flat.lengths, device=rows.device).cumsum(0)
        rows = rows + len(front.words) * (1 + torch.searchsorted(ends, rows, right=True))
    return cast(torch.Tensor, norm(x.index_select(0, rows)))


def head_of(model: LanguageModel) -> nn.Module:
    """What turns hidden states into logits."""
    if isinstance(model, ChatGLM):
        return tied_head(model.transformer.word_embeddings)
    if isinstance(model, ChatGLM2):
        return model.transformer.output_layer
    if isinstance(model, Llama):
        return model.lm_head if model.lm_head is not None else tied_head(model.model.embed_tokens)
    own = cast(GPT2, model)
    return own.lm_head if own.lm_head is not None else tied_head(own.transformer.wte)


def layers_of(model: LanguageModel) -> list[tuple[str, nn.Module]]:
    """The layers with their names, first to last."""
    lists = ((n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == model.spec.layers)
    name, found = next(lists)
    return [(f"{name}.{number}", layer) for number, layer in enumerate(found)]


def refuse_untrainable(model: LanguageModel) -> None:
    """Raise Usage for a model whose documents cannot be computed here as its own forward would."""
    if isinstance(model, PrefixedModel) and (model.prefix_key_values is not None or model.own_prefix_encoder()):
        raise Usage(
            tr("this checkpoint has a P-Tuning prefix of its own, and nothing on top of it is trained here"),
            hint=tr("tune the model without its prefix (pre_seq_len)"),
            code="tune.prefix",
        )
    if not isinstance(model, Llama | ChatGLM | ChatGLM2 | GPT2 | Fallback):
        raise Usage(
            tr("models of the family {family} cannot be tuned", family=model.spec.family),
            hint=tr("take a model of another family"),
            code="tune.family",
        )


def _unrolled(model: LanguageModel, flat: Flat, front: Front) -> tuple[torch.Tensor, list[Layer], nn.Module]:
    """Embeddings [n, hidden], the layers as functions of [n, hidden], and the last norm."""
    if isinstance(model, ChatGLM):
        return _of_chatglm(model, flat, front)
    device, words = flat.ids.device, 0 if front.words is None else len(front.words)
    start = front.key_values.shape[3] if front.key_values is not None and front.shifts else 0
    lengths = [words + length for length in flat.lengths]
    end = start + max(lengths)
    positions = torch.cat([torch.arange(start, start + length, device=device) for length in lengths])
    masks = _masks(lengths, (), device, front, model.spec.layers)
    if isinstance(model, ChatGLM2):
        cos, sin = chatglm2.rotation(0, end, model.spec, device)
        rotary = (cos[positions], sin[positions])
        network = model.transformer
        x = _embedded(network.embedding.word_embeddings, flat, front)
        x = x.float() if model.wide_residual else x
        layers: list[Layer] = [
            partial(layer, rotary=rotary, mask=masks[number], cache=None, layer=number)
            for number, layer in enumerate(network.encoder.layers)
        ]
        return x, layers, network.encoder.final_layernorm
    if isinstance(model, Llama):
        table = model.rotary.at(0, end)
        turned = (table[0][positions], table[1][positions])
        x = _embedded(model.model.embed_tokens, flat, front)
        x = x.float() if model.wide_residual else x
        layers = [
            partial(layer, layer=number, cache=None, rotary=model.rotary, table=turned, mask=masks[number])
            for number, layer in enumerate(model.model.layers)
        ]
        return x, layers, model.model.norm
    trunk = cast(GPT2, model).transformer
    x = _embedded(trunk.wte, flat, front) + trunk.wpe(positions)
    return x, [partial(layer, mask=masks[n], cache=None, layer=n) for n, layer in enumerate(trunk.h)], trunk.ln_f


def _masks(
    lengths: Sequence[int], visible: Sequence[int], device: torch.device, front: Front, layers: int
) -> list[Documents]:
    """One for each layer; a prefix has keys and values for each."""
    if front.key_values is None:
        return [Documents(lengths, visible, device)] * layers
    documents = Documents(lengths, visible, device, front.key_values.shape[3])
    return [documents.behind(keys, values) for keys, values in front.key_values]


def _embedded(embedding: nn.Module, flat: Flat, front: Front) -> torch.Tensor:
    """[n, hidden], virtual tokens before each document."""
    x = cast(torch.Tensor, embedding(flat.ids))
    if front.words is None:
        return x
    words = front.words.to(x.dtype)
    return torch.cat([part for document in torch.split(x, list(flat.lengths)) for part in (words, document)])


def _of_chatglm(model: ChatGLM, flat: Flat, front: Front) -> tuple[torch.Tensor, list[Layer], nn.Module]:
    """Two positions a token, and a prompt that is read in both directions."""
    device, two_rows = flat.ids.device, model.spec.extra["two_positions"]
    layouts = [chatglm.read_layout(ids, model.spec) for ids in flat.documents()]
    positions = torch.cat(
        [layout.positions(0, length, two_rows, device) for layout, length in zip(layouts, flat.lengths, strict=True)],
        dim=1,
    )
    rotary = chatglm.rotation(positions, model.spec.head_dim // len(positions))
    masks = _masks(flat.lengths, [layout.visible for layout in layouts], device, front, model.spec.layers)
    x = model.transformer.word_embeddings(flat.ids)
    layers: list[Layer] = [
        partial(block, rotary=rotary, mask=masks[number], cache=None, layer=number)
        for number, block in enumerate(model.transformer.layers)
    ]
    return x, layers, model.transformer.final_layernorm


def _of_transformers(model: Fallback, flat: Flat, *, by_layer: bool, hits: torch.Tensor | None = None) -> torch.Tensor:
    """One document after the other, by the network's own forward: nobody knows how it would keep several apart."""
    _checkpoint_layers(cast(Any, model.inner), by_layer)
    accepted = inspect.signature(model.inner.forward).parameters
    found = [torch.zeros(0, device=flat.ids.device)]
    start = 0
    for ids in flat.documents():
        here = (flat.rows >= start) & (flat.rows < start + len(ids))
        rows, targets = flat.rows[here] - start, flat.targets[here]
        start += len(ids)
        if not len(rows):
            continue
        some = {"logits_to_keep": rows} if "logits_to_keep" in accepted else {}
        logits = cast(Any, model.inner)(input_ids=ids[None], use_cache=False, **some).logits[0]
        found.append(losses_of_logits(logits if some else logits[rows], targets, hits))
    return torch.cat(found)


def _checkpoint_layers(network: Any, by_layer: bool) -> None:
    """Have transformers compute its layers twice, or once. Raises Usage for a type that cannot."""
    if by_layer == network.is_activation_checkpointing:
        return
    if not by_layer:
        network.activation_checkpointing_disable()
        return
    if not network.supports_gradient_checkpointing:
        raise Usage(
            tr("models of the type {type} cannot compute their layers twice", type=network.config.model_type),
            hint=tr("take shorter passes instead: --row-tokens, --max-length"),
            code="tune.checkpointing",
        )
    network.activation_checkpointing_enable()


def load_base(
    folder: Path, settings: Settings, device: str, home: str | None = None
) -> tuple[Checkpoint, LanguageModel, int]:
    """The checkpoint, its model with the weights in, and the number of threads that compute.

    device: where it will learn. home: where its weights lie until then; None: there. Packed weights stay packed. Raises
    what loading raises, and Usage for a model that cannot be tuned.
    """
    checkpoint = identify(folder)
    dtype = choose_dtype(settings.dtype, checkpoint, device)
    if dtype == torch.float16 and (device == "cpu" or (settings.is_whole and settings.dtype)):
        raise no_float16()
    if settings.is_whole:
        dtype = torch.float32
    model = load_model(checkpoint, dtype=dtype, quant=settings.quant, plan=DevicePlan((home or device,)))
    if settings.dtype == "float32":
        multiply_exactly(model)
    refuse_untrainable(model)
    if device == "cpu":
        beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes of one launcher share the cores
        torch.set_num_threads(settings.threads or max(1, physical_cores() // beside))
    return checkpoint, model, torch.get_num_threads()
