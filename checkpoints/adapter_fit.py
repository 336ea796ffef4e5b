"""Does an adapter of the store fit a model? Told from what both say of themselves, in milliseconds and without torch.

The engine checks every tensor when it attaches an adapter. This comes before it: a wrong one is refused while the
person still looks at what they typed, and the picker shows why.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glmchat.checkpoints.describe import describe_config
from glmchat.checkpoints.fit import measures
from glmchat.checkpoints.model_names import names_of, other_model
from glmchat.core.errors import Usage
from glmchat.core.language import tr
from glmchat.core.text import one_line
from glmchat.hub import adapters
from glmchat.hub.installed import Installed

_LLAMA = ("llama", "mistral", "qwen2", "qwen3")
_CHATGLM = ("chatglm", "chatglm2", "chatglm3", "glm4")
_HEADS = ("lm_head", "output_layer", "embed_tokens", "wte", "word_embeddings")
Shape = tuple[int | None, int | None]  # [out, in]; None: not known


@dataclass(frozen=True, slots=True)
class Misfit:
    """Why an adapter does not fit. forceable: its shapes do; only the names say that it is for another model."""

    reason: str
    hint: str
    forceable: bool = False

    def error(self, name: str) -> Usage:
        code = "adapter.other_base" if self.forceable else "adapter.misfit"
        return Usage(f"{one_line(name, 40)}: {self.reason}", hint=self.hint, code=code)


@dataclass(frozen=True, slots=True)
class Measures:
    """What of a model decides which adapters it can take."""

    family: str
    hidden: int
    layers: int
    vocabulary: int | None
    prefix_width: int  # numbers of one position of a prefix
    shapes: Mapping[str, Shape]  # last part of a layer's name -> its measures


@dataclass(frozen=True, slots=True)
class Base:
    """A model as adapters see it. measures: None for families whose layers are not told here."""

    names: tuple[str, ...]
    measures: Measures | None

    @staticmethod
    def of(folder: Path) -> Base:
        """folder: of the checkpoint, or a GGUF file. Never raises: what cannot be read is the engine's to refuse."""
        config = measures(folder)
        names = tuple(names_of(folder.expanduser().absolute(), config))
        return Base(names, _measured({"model_type": "llama", **config} if folder.is_file() else config))


def require_fit(wanted: Iterable[tuple[str, float]], folder: Path | None, *, force: bool = False) -> None:
    """Raise Usage with the reason if these adapters of the store cannot be right for the model in `folder`.

    wanted: (name, weight). folder: None for a model that is not known yet. force: names prove nothing, measures do.
    Raises UnknownModel for a name that is not in the store.
    """
    rows = [(adapters.find_adapter(name), weight) for name, weight in wanted]
    base = Base.of(folder) if folder is not None and rows else None
    for row, _ in rows:
        found = unfit(row, base)
        if found is not None and not (force and found.forceable):
            raise found.error(row.name)
    prefixes = [weight for row, weight in rows if adapters.facts_of(row).get("kind") in ("prefix", "prompt")]
    if prefixes and abs(sum(prefixes) - 1) > 1e-6:
        raise Usage(
            tr("the weights of the prefixes add up to {sum}", sum=f"{sum(prefixes):g}"),
            hint=tr("a prefix stands before the conversation or it does not: its weight is 1; a mixture's add up to 1"),
            code="adapter.prefixes",
        )


def unfit(row: Installed, base: Base | None) -> Misfit | None:
    """Why this adapter of the store cannot be used, with this model if one is known."""
    if not row.complete:
        return Misfit(tr("its files are not all here"), tr("glmchat verify {name} says which", name=row.name))
    return misfit(adapters.facts_of(row), row.base, base) if base is not None else None


def misfit(facts: Mapping[str, Any], trained_on: str | None, base: Base) -> Misfit | None:
    """None if the adapter fits, or if too little is known of the two to say that it does not.

    facts: what was noted when it was added. trained_on: the model it names.
    """
    found = _by_measures(facts, base.measures)
    if found is not None or trained_on is None or facts.get("forced"):
        return found
    here = other_model(trained_on, base.names)
    if here is None:
        return None
    return Misfit(
        tr("trained on {base}, and the model here is {here}", base=one_line(trained_on, 80), here=one_line(here, 80)),
        tr("use it with its own base, or attach it all the same with --force"),
        forceable=True,
    )


def _measured(config: Mapping[str, Any]) -> Measures | None:
    said = describe_config(config)
    if said is None or said.hidden_size is None or said.layers is None or said.heads is None:
        return None
    if said.family not in (*_LLAMA, *_CHATGLM, "gpt2"):
        return None
    hidden, heads, groups = said.hidden_size, said.heads, said.kv_heads or said.heads
    head = _size(config, "head_dim", "kv_channels") or hidden // heads
    if said.family == "chatglm":
        head, groups = hidden // heads, heads
    inner = _size(config, "intermediate_size", "inner_hidden_size", "ffn_hidden_size", "n_inner")
    shapes = _shapes(said.family, hidden, heads * head, groups * head, inner)
    return Measures(said.family, hidden, said.layers, said.vocabulary, said.layers * 2 * groups * head, shapes)


def _by_measures(facts: Mapping[str, Any], model: Measures | None) -> Misfit | None:
    kind = facts.get("kind")
    if model is None or kind is None:
        return None
    if kind == "lora":
        return _lora(facts, model)
    if facts.get("form") == "thudm" and model.family not in _CHATGLM:
        return Misfit(
            tr("a P-Tuning prefix for ChatGLM, and the model here is of the family {family}", family=model.family),
            tr("use it with the ChatGLM model it was trained on"),
        )
    wanted, width = model.hidden if kind == "prompt" else model.prefix_width, facts.get("width")
    if width is None or width == wanted:
        return None
    return Misfit(
        tr("made for a model of width {theirs}, here it is {ours}", theirs=width, ours=wanted),
        tr("it was trained on a model of other measures"),
    )


def _lora(facts: Mapping[str, Any], model: Measures) -> Misfit | None:
    changed: Mapping[str, Any] = facts.get("shapes") or {}
    for name, (out, width) in changed.items():
        if name in _HEADS:
            continue
        if name not in model.shapes:
            return Misfit(
                tr(
                    "changes layers called {name}, and the {family} model here has none",
                    name=one_line(str(name), 40),
                    family=model.family,
                ),
                tr("it was trained on a model of another family"),
            )
        if any(
            ours is not None and ours != theirs for ours, theirs in zip(model.shapes[name], (out, width), strict=True)
        ):
            here = " × ".join(str(size or "?") for size in model.shapes[name])
            return Misfit(
                tr("{name} is {theirs} in it, {here} in the model here", name=one_line(str(name), 40),
                   theirs=f"{out} × {width}", here=here),
                tr("it was trained on a model of other measures"),
            )  # fmt: skip
    layers, vocabulary = facts.get("layers") or 0, facts.get("vocabulary")
    if layers > model.layers:
        return Misfit(
            tr("trained on {theirs} layers, the model here has {ours}", theirs=layers, ours=model.layers),
            tr("it was trained on a model of more layers"),
        )
    if vocabulary and model.vocabulary and vocabulary != model.vocabulary:
        return Misfit(
            tr("its vocabulary has {theirs} rows, the model's {ours}", theirs=vocabulary, ours=model.vocabulary),
            tr("it was trained on another vocabulary"),
        )
    return None


def _shapes(family: str, hidden: int, queries: int, keys: int, inner: int | None) -> Mapping[str, Shape]:
    """The linear layers of a family. queries, keys: widths of all heads together."""
    if family in _LLAMA:
        return {
            "q_proj": (queries, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden),
            "o_proj": (hidden, queries), "gate_proj": (inner, hidden), "up_proj": (inner, hidden),
            "down_proj": (hidden, inner),
        }  # fmt: skip
    if family == "gpt2":
        return {"c_attn": (3 * hidden, hidden), "c_proj": (hidden, None), "c_fc": (inner or 4 * hidden, hidden)}
    if family == "chatglm":
        inner = inner or 4 * hidden
    up = inner if family == "chatglm" or inner is None else 2 * inner
    return {
        "query_key_value": (queries + 2 * keys, hidden), "dense": (hidden, queries),
        "dense_h_to_4h": (up, hidden), "dense_4h_to_h": (hidden, inner),
    }  # fmt: skip


def _size(config: Mapping[str, Any], *names: str) -> int | None:
    value = next((config[name] for name in names if config.get(name) is not None), None)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 32 else None
