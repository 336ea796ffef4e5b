"""What an adapter says of itself: the files that people have of one, its configuration, names and shapes.

A PEFT folder, THUDM's prefix folder, a training output, or one file. No numbers are read here, so a wrong adapter is
known before any of its own are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glmchat.checkpoints.adapter_fit import BESIDE
from glmchat.checkpoints.adapter_settings import LoraSettings, Shape, check_lora, incomplete_adapter, parse_lora
from glmchat.checkpoints.config import integer, number
from glmchat.checkpoints.file_kinds import kind_of_file, refuse_no_weights
from glmchat.checkpoints.gguf_file import adapter_config, open_gguf
from glmchat.checkpoints.peft_kinds import KINDS, check_peft, kind_of, rank_of, refusal, takes_weight
from glmchat.checkpoints.safetensors_file import read_safetensors
from glmchat.checkpoints.tokenizer_files import PAIR, PAIRED
from glmchat.checkpoints.torch_file import read_torch_file
from glmchat.checkpoints.weight_files import PREFIX_ENCODER, checkpoints
from glmchat.checkpoints.weight_files import weight_files as files_of_a_model
from glmchat.core.errors import Damaged, NotInstalled, Usage
from glmchat.core.files import require_plain_folder, require_readable
from glmchat.core.json_files import read_json, small_json
from glmchat.core.language import tr
from glmchat.core.text import one_line

CONFIG = "adapter_config.json"
_PEFT_NAMES = ("adapter_model.safetensors", "adapter_model.bin")
_MLX_NAME = "adapters.safetensors"
_MODEL_NAMES = (
    "model.safetensors",
    "pytorch_model.bin",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)
_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors", ".ckpt", ".gguf")
# What a training run leaves beside its weights.
_TRAINING = re.compile(r"(optimizer|scheduler|scaler|rng_state\w*|training_args|\w+_states|global_step\w*)\.\w+")
_VOCABULARY = re.compile(r"\b(embed_tokens|wte|word_embeddings|lm_head|output_layer)\b")
# How its conversations are written: what transformers saves of a tokenizer.
TEXT_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip
_PROMPTS = ("PROMPT_TUNING", "P_TUNING")  # PEFT saves both as the embeddings of virtual tokens


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """A recognised adapter, by the names and shapes of its tensors.

    kind: "lora", "prefix" (keys and values in front of the cache), "prompt" (virtual tokens), or one that only PEFT
    computes ("loha", "ia3", …: checkpoints/peft_kinds.py). form: who wrote it, "peft", "merged-linear", "raw" or
    "thudm". length: virtual tokens. forced: the user attached it in spite of a base that does not match; every answer
    then says so.
    """

    path: Path
    kind: str
    form: str
    shapes: Mapping[str, Shape] = field(repr=False)
    config: Mapping[str, Any] = field(default_factory=dict, repr=False)
    base: str | None = None
    revision: str | None = None
    lora: LoraSettings = field(default_factory=LoraSettings)
    length: int = 0
    forced: bool = False

    def to_json(self) -> dict[str, Any]:
        """For `glmchat adapters show`, and for the store's note."""
        told: dict[str, Any] = {"kind": self.kind, "form": self.form, "base": self.base, "revision": self.revision}
        shapes = self.shapes
        told |= {"forced": self.forced, "tensors": len(shapes)}
        if self.kind in KINDS:
            mark = KINDS[self.kind].mark
            layers = sorted({name.split(f".{mark}")[0].rpartition(".")[2] for name in shapes if f".{mark}" in name})
            weighed = takes_weight(self.kind, self.config)
            return {**told, "rank": rank_of(self.config), "targets": layers, "takes_weight": weighed}
        told |= measures(shapes, self.lora)
        if self.kind != "lora":
            return {**told, "length": self.length}
        ranks = sorted({shape[0] for name, shape in shapes.items() if ".lora_A" in name and shape})
        return {
            **told,
            "rank": self.lora.rank or (ranks[0] if ranks else None),
            "alpha": self.lora.alpha,
            "alpha_known": self.lora.alpha_known,
            "rslora": self.lora.rslora,
            "dora": self.lora.dora,
            "targets": sorted({name.split(".lora_")[0].rpartition(".")[2] for name in shapes if ".lora_" in name}),
            "saved": list(self.lora.saved),
        }


def measures(shapes: Mapping[str, tuple[int, ...]], settings: LoraSettings) -> dict[str, Any]:
    """What tells which models an adapter can fit, from its tensors alone; checkpoints/adapter_fit.py compares it.

    layers: the highest one and one. shapes: last part of a layer's name -> [out, in] that its LoRA changes. vocabulary:
    rows of a trained embedding or head. replaces: those of them that come whole. width: numbers that a prefix has for
    each position.
    """
    found: dict[str, Any] = {}
    changed: dict[str, list[int]] = {}
    layers = 0
    for name, shape in shapes.items():
        parts = name.split(".")
        layers = max([layers, *(int(p) + 1 for p in parts if p.isdecimal() and len(p) < 5)])
        stem, kind, _ = name.partition(".lora_A")
        pair = shapes.get(name.replace(".lora_A", ".lora_B"), ())
        if kind and len(shape) == 2 and pair:
            out = pair[0] * len(settings.enable) // max(1, sum(settings.enable)) if settings.enable else pair[0]
            changed[stem.rpartition(".")[2]] = [out, shape[1]]
        elif ".lora_embedding_A" in name and len(shape) == 2:
            found["vocabulary"] = shape[1]
        elif name.endswith(".weight") and ".lora_" not in name and "original_module" not in name and len(shape) == 2:
            if (end := _VOCABULARY.search(name)) is not None:
                found["vocabulary"] = shape[0]
                found["replaces"] = sorted({*found.get("replaces", ()), end.group()})
        elif name in (f"{PREFIX_ENCODER}embedding.weight", "prompt_embeddings") and len(shape) == 2:
            found.setdefault("width", shape[1])
        elif name == f"{PREFIX_ENCODER}trans.2.weight":
            found["width"] = shape[0]
    if changed:
        found["shapes"] = changed
    if layers:
        found["layers"] = layers
    return found


def find_weights(path: Path) -> tuple[Path, dict[str, Any]]:
    """The file of an adapter's weights (the folder, where they lie as a model's do), and its config ({} without one).

    Raises NotInstalled if nothing is there, Damaged, or Usage for a folder that holds no adapter or several.
    """
    if not path.exists():
        if path.is_symlink():
            require_readable(path)
        raise NotInstalled(
            tr("there is no adapter at {path}", path=one_line(str(path))),
            hint="glmchat adapters list",
            code="adapter.no_path",
        )
    if path.is_file():
        _look(path)
        beside = path.parent / CONFIG
        named = path.name in _PEFT_NAMES or len(_weight_files(path.parent)) == 1
        return path, read_json(beside) if named and beside.is_file() else {}
    require_plain_folder(path)
    config = read_json(path / CONFIG) if (path / CONFIG).is_file() else {}
    if (path / _MLX_NAME).is_file() and "lora_parameters" in config:
        raise Usage(
            tr("{name} contains an adapter of mlx_lm", name=one_line(path.name)),
            hint=tr("merge it with mlx_lm's fuse, or use the adapter as PEFT saved it"),
            code="adapter.type",
        )
    for name in _PEFT_NAMES:
        if (path / name).is_file():
            _look(path / name)
            return path / name, config
    if any((path / name).is_file() for name in _MODEL_NAMES):
        files_of_a_model(path)
        return path, config
    files = _weight_files(path)
    if len(files) == 1:
        _look(files[0])
        return files[0], config
    for link in sorted(p for p in path.iterdir() if p.is_symlink() and not p.exists()):
        if not files and link.suffix in _SUFFIXES:
            require_readable(link)
    raise _no_adapter(path, files)


def _look(path: Path) -> None:
    """Raise Usage, Damaged or Hostile for a file that holds no adapter, by what it says of itself."""
    refuse_no_weights(path)
    if (kind := kind_of_file(path)) == "gguf":
        adapter_config(open_gguf(path))
    elif kind == "safetensors" or path.suffix == ".safetensors":
        shapes_of_safetensors(path)
    else:
        read_torch_file(path)


def shapes_of_safetensors(path: Path) -> dict[str, Shape]:
    """The names and shapes in an adapter's file. Raises Damaged."""
    try:
        return {name: tensor.shape for name, tensor in read_safetensors(path).items()}
    except Damaged as error:
        hint = tr("it is truncated, or claims more than it contains: fetch it again")
        raise Damaged(error.message, hint=hint, code="adapter.damaged") from None


def refuse_settings(config: Mapping[str, Any]) -> None:
    """Raise Usage for a kind or a variant that is not computed, whatever the tensors are."""
    kind = config.get("peft_type")
    if kind is not None and kind_of(config) is None and kind not in ("LORA", "PREFIX_TUNING", *_PROMPTS):
        raise refusal(kind)
    if kind == "LORA":
        parse_lora(config)


def own_tokenizer(folder: Path) -> tuple[str, ...]:
    """The files that an adapter's own words are read from; () where it brings none.

    Raises Usage for words that only the code of some class could put together.
    """
    for names in (("tokenizer.json",), ("tokenizer.model",), PAIR):
        if folder.is_dir() and all((folder / name).is_file() for name in names):
            break
    else:
        return ()
    kind = small_json(folder / "tokenizer_config.json").get("tokenizer_class")
    if names == PAIR and str(kind or "").removesuffix("Fast") not in PAIRED:
        raise Usage(
            tr("its words are in vocab.json and merges.txt, for the class {kind}, which is not read from there",
               kind=one_line(str(kind or "?"), 60)),
            hint=tr("save its tokenizer with transformers (save_pretrained), which writes tokenizer.json"),
            code="adapter.vocabulary",
        )  # fmt: skip
    return names


def brings_text(folder: Path) -> bool:
    """Whether an adapter's folder holds a tokenizer or a chat template, as trainers save them beside the weights."""
    return folder.is_dir() and any((folder / name).is_file() for name in TEXT_FILES)


def weight_files(path: Path) -> list[Path]:
    """The files that the weights of this adapter are read from."""
    if path.is_file():
        return [path]
    for name in _PEFT_NAMES:
        if (path / name).is_file():
            return [path / name]
    named = [path / name for name in _MODEL_NAMES if (path / name).is_file()]
    if named and named[0].suffix == ".json":
        table = read_json(named[0]).get("weight_map")
        return [named[0], *sorted({path / str(name) for name in table.values()})] if isinstance(table, dict) else named
    return named[:1] or _weight_files(path)


def _weight_files(folder: Path) -> list[Path]:
    return sorted(
        p for p in folder.iterdir() if p.is_file() and p.suffix in _SUFFIXES and not _TRAINING.fullmatch(p.name)
    )


def _no_adapter(folder: Path, files: list[Path]) -> Usage:
    name = one_line(str(folder))
    if files:
        names = ", ".join(one_line(p.name, 60) for p in files[:4])
        return Usage(
            tr("{name} contains several weight files: {names}", name=name, names=names),
            hint=tr("name one of them"),
            code="adapter.several",
        )
    if saved := checkpoints(folder):
        return Usage(
            tr("{name} is a training output with {saved}", name=name, saved=", ".join(p.name for p in saved[-4:])),
            hint=tr("name one of them: {saved}", saved=one_line(str(saved[-1]))),
            code="adapter.several",
        )
    return Usage(
        tr("{name} contains no adapter: there are no weights", name=name),
        hint=tr("expected adapter_model.safetensors, adapter_model.bin, pytorch_model.bin or a single .pt file"),
        code="adapter.empty",
    )


def recognise(
    path: Path,
    shapes: Mapping[str, Shape],
    config: Mapping[str, Any],
    *,
    alpha: float | None = None,
    force: bool = False,
) -> AdapterFacts:
    """What the adapter at `path` is. alpha: for a raw file that does not say it. Raises Usage or Damaged."""
    note = _note(path)
    if alpha is None and note.get("alpha") is not None:
        alpha = number(note, "alpha", high=1e6)
    names = list(shapes)
    if not names:
        raise Damaged(
            tr("{name} contains no tensors", name=one_line(path.name)),
            hint=tr("fetch it again"),
            code="adapter.no_tensors",
        )
    base = config.get("base_model_name_or_path")
    found: dict[str, Any] = {
        "path": path,
        "shapes": shapes,
        "config": config,
        "base": one_line(base, 200) if isinstance(base, str) and base else None,
        "revision": one_line(str(config["revision"]), 100) if config.get("revision") else None,
        "forced": force or note.get("forced") is True,
    }
    kind = config.get("peft_type")
    if (by_peft := kind_of(config)) is not None:
        check_peft(by_peft, config, shapes)
        return AdapterFacts(**found, kind=by_peft, form="peft")
    refuse_settings(config)
    if kind in ("PREFIX_TUNING", *_PROMPTS):
        return _virtual_tokens(found, "prefix" if kind == "PREFIX_TUNING" else "prompt")
    if any(name.startswith(PREFIX_ENCODER) for name in names):
        return _thudm(found)
    if any(".lora_" in name for name in names):
        settings = parse_lora(config, alpha)
        check_lora(shapes, settings)
        form = "merged-linear" if settings.enable else "peft" if config else "raw"
        return AdapterFacts(**found, kind="lora", form=form, lora=settings)
    raise Usage(
        tr(
            "{name} contains no adapter: none of its {names} tensors belongs to a LoRA or a prefix ({names2}, …)",
            name=one_line(path.name),
            names=len(names),
            names2=one_line(names[0], 80),
        ),
        hint=tr("a whole model is added with `glmchat add`"),
        code="adapter.kind",
    )


def _thudm(found: dict[str, Any]) -> AdapterFacts:
    shapes = found["shapes"]
    shape = shapes.get(f"{PREFIX_ENCODER}embedding.weight", ())
    if len(shape) != 2:
        raise incomplete_adapter(
            tr("this P-Tuning prefix has no embedding"),
            tr("expected {PREFIX}embedding.weight: the file is incomplete", PREFIX=PREFIX_ENCODER),
        )
    length = shape[0]
    path: Path = found["path"]
    beside = (path if path.is_dir() else path.parent) / "config.json"
    config = read_json(beside) if beside.is_file() else {}
    if config.get("pre_seq_len") is not None and (said := integer(config, "pre_seq_len", high=1 << 16)) != length:
        raise Damaged(
            tr("config.json gives pre_seq_len {said}, but the prefix has {length} positions", said=said, length=length),
            hint=tr("the files come from two different training runs"),
            code="adapter.pre_seq_len",
        )
    base = config.get("_name_or_path")
    if isinstance(base, str) and base:
        found["base"] = one_line(base, 200)
    return AdapterFacts(**found, kind="prefix", form="thudm", length=length)


def _virtual_tokens(found: dict[str, Any], kind: str) -> AdapterFacts:
    shapes = found["shapes"]
    length = integer(found["config"], "num_virtual_tokens", high=1 << 16)
    shape = shapes.get("prompt_embeddings", ())
    if len(shape) != 2:
        raise incomplete_adapter(tr("this adapter contains no prompt_embeddings"), tr("the file is incomplete"))
    if shape[0] != length:
        raise Damaged(
            tr(
                "adapter_config.json gives {length} virtual tokens, but the file contains {shape}",
                length=length,
                shape=shape[0],
            ),
            hint=tr("the files come from two different training runs"),
            code="adapter.length",
        )
    return AdapterFacts(**found, kind=kind, form="peft", length=length)


def _note(path: Path) -> Mapping[str, Any]:
    """What the store noted for this adapter when it was added: alpha, forced."""
    file = path / BESIDE
    if not path.is_dir() or not file.is_file():
        return {}
    note = read_json(file).get("adapter")
    return note if isinstance(note, Mapping) else {}
