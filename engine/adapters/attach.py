"""Adapters of one model: attached, activated, taken off. A wrong one is refused before the model is touched.

The same checks run against a model that is not loaded, from headers alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast
from weakref import WeakValueDictionary

import torch
from torch import nn

from glmchat.checkpoints.adapter_files import brings_text
from glmchat.checkpoints.adapter_fit import CHATGLM, names_of, other_model
from glmchat.checkpoints.adapter_settings import Names, weighted_words, words_of_two
from glmchat.checkpoints.peft_kinds import KINDS, refuse_together, takes_weight
from glmchat.checkpoints.weight_files import PREFIX_ENCODER
from glmchat.core.errors import Damaged, UnknownModel, Usage
from glmchat.core.language import tr
from glmchat.core.text import one_line
from glmchat.engine.adapters.files import Adapter, read_adapter
from glmchat.engine.adapters.lora import match, read_changes, require_finite
from glmchat.engine.adapters.low_rank import Change, Weighted, adapted_embedding, adapted_linear, replaced
from glmchat.engine.adapters.peft_layers import PeftWeights, read_weights, require_transformers, stand_in
from glmchat.engine.adapters.prefix_tuning import check_prefix, keys_of_prompt, read_prefix
from glmchat.engine.adapters.words import VOCABULARIES, measures, with_trained_rows
from glmchat.engine.families import Checkpoint, identify
from glmchat.engine.models.base import LanguageModel
from glmchat.engine.models.layers import tied_head
from glmchat.engine.models.prefix import PrefixedModel
from glmchat.engine.models.transformers_model import Fallback
from glmchat.engine.models.variant import Variant
from glmchat.engine.native.cards import device_of
from glmchat.engine.prompts.adapted import Formats
from glmchat.engine.quantize.linear import QuantEmbedding


def refuse_other_base(adapter: Adapter, checkpoint: Checkpoint) -> None:
    """Raise Usage if the adapter names the model it was trained on, and that is another one."""
    if adapter.base is None or adapter.forced:
        return
    title = checkpoint.gguf.metadata.get("general.name") if checkpoint.gguf is not None else None
    here = other_model(adapter.base, names_of(checkpoint.path, checkpoint.config, title))
    if here is None:
        return
    raise Usage(
        tr(
            "this adapter was trained on {base}, but this model is {here}: the shapes are the same, "
            "the weights are not",
            base=adapter.base,
            here=here,
        ),
        hint=tr("use it with its own base, or attach it anyway with --force"),
        code="adapter.other_base",
    )


@dataclass(slots=True)
class Ready:
    """An attached adapter: its numbers are read and checked, on the model's device."""

    adapter: Adapter
    changes: dict[str, Change] = field(default_factory=dict)  # layer -> what it changes there
    rows: torch.Tensor | None = None  # a prefix, or the embeddings of a prompt
    peft: PeftWeights | None = None  # of a kind that PEFT computes

    @property
    def nbytes(self) -> int:
        """Of what is read; PEFT's layers hold the same tensors."""
        rows = 0 if self.rows is None else self.rows.nbytes
        peft = 0 if self.peft is None else sum(t.nbytes for t in self.peft.tensors.values())
        return sum(c.nbytes for c in self.changes.values()) + rows + peft


class AdapterSet:
    """The adapters of one model: attached by name, any number of them active with weights."""

    def __init__(self, model: LanguageModel, checkpoint: Checkpoint, device: str) -> None:
        self._model = model
        self._checkpoint = checkpoint
        self._device = device
        self._modules = modules_of(model)
        self._ready: dict[str, Ready] = {}
        self._active: dict[str, float] = {}
        self._variant = model.plain
        self._variants: WeakValueDictionary[tuple[tuple[str, float], ...], Variant] = WeakValueDictionary()

    @property
    def nbytes(self) -> int:
        """Bytes that the attached adapters hold."""
        return sum(ready.nbytes for ready in self._ready.values())

    @property
    def active(self) -> Mapping[str, float]:
        return dict(self._active)

    @property
    def variant(self) -> Variant:
        """The model as the active ones make it."""
        return self._variant

    def folders(self, names: Iterable[str]) -> list[Path]:
        """Where these were read from. Raises UnknownModel."""
        return [self._attached(name).adapter.path for name in names]

    def attach(
        self,
        path: Path,
        name: str,
        check_text: Callable[[Path], None] = lambda path: None,
        *,
        force: bool = False,
        alpha: float | None = None,
    ) -> Adapter:
        """Read the adapter at `path`, check it against the model, and keep it ready under `name`.

        force: attach an adapter that names another base of the same shape. check_text: raises where the words that it
        brings do not fit. Raises Usage, Damaged, Hostile or NotInstalled with the reason; the model and what is
        attached are then as they were.
        """
        adapter = read_adapter(path, alpha=alpha, force=force)
        worn = self._model.variant
        self._model.wear(self._model.plain)  # it is the model by itself that the adapter is compared with
        try:
            ready = self._read(adapter)
        finally:
            self._model.wear(worn)
        check_text(adapter.path)
        if name in self._active:
            self.activate({other: weight for other, weight in self._active.items() if other != name})
        self._forget(name)
        self._ready[name] = ready
        return adapter

    def _read(self, adapter: Adapter) -> Ready:
        ready = Ready(adapter)
        if adapter.kind == "lora":
            matched = layers_of(adapter, self._model, self._checkpoint, self._modules)
            refuse_other_base(adapter, self._checkpoint)
            spec, plan = self._model.spec, self._model.plan
            ready.changes = dict(read_changes(adapter, matched, lambda at: device_of(f"{at}.weight", spec, plan)))
        elif adapter.kind in KINDS:
            require_transformers(adapter, self._model)
            refuse_other_base(adapter, self._checkpoint)
            ready.peft = read_weights(adapter, self._model)
        else:
            check_prefix(adapter, self._model.spec, self._model)
            refuse_other_base(adapter, self._checkpoint)
            ready.rows = read_prefix(adapter, self._model.spec, self._device)
        return ready

    def detach(self, name: str) -> None:
        """Forget an adapter; if it is active it stops first. Raises UnknownModel for a name that is not attached."""
        self._attached(name)
        if name in self._active:
            self.activate({other: weight for other, weight in self._active.items() if other != name})
        self._forget(name)
        del self._ready[name]

    def _forget(self, name: str) -> None:
        """From now on this name means another adapter. Who holds a variant with the old one keeps it."""
        for key in [key for key in self._variants if any(adapter == name for adapter, _ in key)]:
            del self._variants[key]

    def activate(self, adapters: Mapping[str, float]) -> None:
        """Exactly these from now on, with their weights; {} is the base model, bit for bit.

        The model as they make it (`variant`) lives as long as somebody holds it; activated again, they then cost no
        more than putting their layers in their places. Raises UnknownModel, or Usage for prefixes that cannot be
        combined; what was active then stays.
        """
        for name in adapters:
            self._attached(name)
        # In one order, whichever they are given in: sums of another order have other bits.
        weights = {name: float(weight) for name, weight in sorted(adapters.items()) if weight != 0}
        key = tuple(weights.items())
        variant = self._variants.get(key) if weights else self._model.plain
        if variant is None:
            variant = self._variants[key] = self._make(weights)
        self._model.wear(variant)
        self._active, self._variant = weights, variant

    def _make(self, weights: Mapping[str, float]) -> Variant:
        """The model with these, which it wears only if something must be computed with it."""
        self._refuse_words_of_two(weights)
        layers, prefixes = self._layers(weights), self._prefixes(weights)
        worn = self._model.variant
        self._model.wear(self._model.plain)
        try:
            variant = Variant(layers, self._stand_in(weights))
            self._give_prefix(variant, prefixes)
        finally:
            self._model.wear(worn)
        return variant

    def _attached(self, name: str) -> Ready:
        ready = self._ready.get(name)
        if ready is None:
            raise UnknownModel(
                tr("no adapter is attached as {name}", name=one_line(repr(name), 80)),
                hint=tr("attached: {names}", names=one_line(", ".join(self._ready)) or tr("none")),
                code="adapter.unknown",
            )
        return ready

    def _layers(self, weights: Mapping[str, float]) -> dict[str, nn.Module]:
        """The layers that stand in for the model's own, made before any is put in its place."""
        by_layer: dict[str, list[Weighted]] = {}
        for name, weight in weights.items():
            for place, change in self._ready[name].changes.items():
                by_layer.setdefault(place, []).append((change, weight))
        return {place: self._layer(place, changes) for place, changes in by_layer.items()}

    def _layer(self, place: str, changes: list[Weighted]) -> nn.Module:
        base = self._modules[place]
        trained = [(c, w) for c, w in changes if c.replaced]
        if isinstance(base, nn.Embedding | QuantEmbedding):
            rest = [(c, w) for c, w in changes if c.a is not None or c.replaced]
            if not rest:
                return with_trained_rows(base, changes)
            embedding = adapted_embedding(base, rest)
            if any(c.tokens for c, _ in changes):
                embedding.rows = with_trained_rows(base if embedding.rows is None else embedding.rows, changes)
            return embedding
        if any("weight" in c.replaced for c, _ in trained) or not hasattr(base, "in_features"):
            base = replaced(base, trained, self._model.dtype)
        base = with_trained_rows(base, changes)
        if base is not self._modules[place]:
            changes = [(c, w) for c, w in changes if c.a is not None]
        return adapted_linear(base, changes) if changes and hasattr(base, "in_features") else base

    def _refuse_words_of_two(self, weights: Mapping[str, float]) -> None:
        """An adapter with another number of words has every row of its own: nothing can be added to them."""
        changing: dict[str, int] = {}  # the adapters that change words -> how many they have
        for name, weight in weights.items():
            for place, change in self._ready[name].changes.items():
                if place.rpartition(".")[2] in VOCABULARIES:
                    rows = measures(self._modules[place])[0]
                    changing[name] = len(change.replaced.get("weight", range(rows)))
                    resized = changing[name] != rows
                    if resized and weight != 1:
                        raise weighted_words(name)
        if len(changing) > 1 and set(changing.values()) != {self._model.spec.vocab_size}:
            raise words_of_two(changing)

    def _prefixes(self, weights: Mapping[str, float]) -> list[tuple[Ready, float]]:
        """The prefixes among them; one, or several of one kind and length whose weights add up to one."""
        prefixes = [(ready, w) for n, w in weights.items() if (ready := self._ready[n]).rows is not None]
        lengths = {(ready.adapter.kind, ready.adapter.length, ready.adapter.form) for ready, _ in prefixes}
        if len(lengths) > 1:
            raise Usage(
                tr("prefixes of different lengths cannot be mixed"),
                hint=tr("activate one of them"),
                code="adapter.prefixes",
            )
        if prefixes and abs(sum(w for _, w in prefixes) - 1) > 1e-6:
            raise Usage(
                tr("the weights of the prefixes add up to {found:g}", found=sum((w for _, w in prefixes))),
                hint=tr("a prefix is either there or not, so its weight is 1; the weights of a mixture add up to 1"),
                code="adapter.prefixes",
            )
        return prefixes

    def _stand_in(self, weights: Mapping[str, float]) -> nn.Module | None:
        """The network with the layers that PEFT computes; in the order of the names, as some kinds do not commute."""
        parts = [(peft, w) for n, w in sorted(weights.items()) if (peft := self._ready[n].peft) is not None]
        if not parts:
            return None
        ready = [(self._ready[name].adapter, weight) for name, weight in weights.items()]
        refuse_together((a.kind, a.kind in KINDS and takes_weight(a.kind, a.config), w) for a, w in ready)
        return stand_in(cast(Fallback, self._model), parts)

    def _give_prefix(self, variant: Variant, prefixes: list[tuple[Ready, float]]) -> None:
        if not prefixes:
            return
        first = prefixes[0][0]
        rows = sum(cast(torch.Tensor, r.rows) * w for r, w in prefixes) if len(prefixes) > 1 else first.rows
        rows = cast(torch.Tensor, rows)
        if first.adapter.kind == "prompt":
            model = cast(PrefixedModel, self._model)
            model.wear(variant)
            model.set_prefix(None)  # the prompt is read by the network without one
            rows = keys_of_prompt(model, rows)
        variant.prefix, variant.shifts = rows, first.adapter.form == "peft"


def modules_of(model: LanguageModel) -> dict[str, nn.Module]:
    """Every module by name. A tied head has no module of its own; a trained one needs a place, `lm_head`."""
    modules = dict(model.named_modules())
    if model.tied is not None:
        modules["lm_head"] = tied_head(model.get_submodule(model.tied))
    return modules


def layers_of(
    adapter: Adapter, model: LanguageModel, checkpoint: Checkpoint, modules: Mapping[str, nn.Module]
) -> dict[str, Names]:
    """`match` with what is known of the model. modules: of the bare model, as `modules_of` gives them."""
    heads = {"q_proj": checkpoint.spec.heads, "k_proj": checkpoint.spec.kv_heads}
    resizable = checkpoint.spec.family not in CHATGLM
    return match(adapter, modules, checkpoint.family.transposed, tied_ends(model), resizable, heads)


def tied_ends(model: LanguageModel) -> tuple[str, ...]:
    """Names of embedding and head where they share one matrix; () where they do not."""
    if model.tied is not None:
        return (model.tied, "lm_head")
    places: dict[int, list[str]] = {}
    for name, module in model.named_modules() if isinstance(model, Fallback) else ():
        if isinstance(module, nn.Linear | nn.Embedding) and module.weight.shape[0] == model.spec.vocab_size:
            places.setdefault(id(module.weight), []).append(name)
    return next((tuple(names) for names in places.values() if len(names) > 1), ())


def check_against(adapter: Adapter, base: Path) -> Checkpoint:
    """Raise what attaching would raise. Reads no weights, neither the adapter's nor the model's. Returns the model's
    description."""
    checkpoint = identify(base)
    model = outline(checkpoint)
    if adapter.kind in KINDS:
        require_transformers(adapter, model)
    elif adapter.kind == "lora":
        layers_of(adapter, model, checkpoint, modules_of(model))
    else:
        check_prefix(adapter, checkpoint.spec, model)
    refuse_other_base(adapter, checkpoint)
    _check_text(adapter, checkpoint)
    return checkpoint


def _check_text(adapter: Adapter, checkpoint: Checkpoint) -> None:
    """Raise what speaking with the adapter's own tokenizer or chat template would raise."""
    if not brings_text(adapter.path):
        return
    path, spec, family = checkpoint.path, checkpoint.spec, checkpoint.family
    try:
        tokenizer = family.load_tokenizer(path, spec)
    except Damaged as error:
        if error.code != "tokenizer.missing":
            raise
        return
    formats = Formats(family.prompt(path, tokenizer, spec), spec)
    try:
        formats.of([adapter.path])
    finally:
        formats.close()


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
