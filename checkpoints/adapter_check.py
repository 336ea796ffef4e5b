"""What is known of an adapter before torch is: from its settings and the names of its tensors, and beside a model.

A wrong adapter is refused where it is typed, in well under a second.
"""

from __future__ import annotations

from pathlib import Path

from glmchat.checkpoints.adapter_files import (
    AdapterFacts,
    find_weights,
    own_tokenizer,
    recognise,
    refuse_settings,
    shapes_of_safetensors,
)
from glmchat.checkpoints.adapter_fit import Base, misfit
from glmchat.checkpoints.adapter_settings import Shape
from glmchat.checkpoints.file_kinds import kind_of_file
from glmchat.checkpoints.gguf_file import GGUFFile, adapter_config, adapter_name, open_gguf
from glmchat.checkpoints.torch_file import read_torch_file
from glmchat.checkpoints.weight_files import is_safetensors
from glmchat.checkpoints.weight_files import weight_files as files_of_a_model


def check_adapter(path: Path, base: Path | None, *, alpha: float | None = None, force: bool = False) -> None:
    """Raise Usage, Damaged, Hostile or NotInstalled for what is no adapter, or none for the model in `base`."""
    facts = read_facts(path, alpha=alpha, force=force)
    own_tokenizer(facts.path)
    if base is None:
        return
    difference = misfit(facts.to_json(), facts.base, Base.of(base))
    if difference is not None:
        raise difference.error(path.name)


def read_facts(path: Path, *, alpha: float | None = None, force: bool = False) -> AdapterFacts:
    """What the adapter at `path` is, by its settings and the names and shapes of its tensors.

    Raises what `find_weights` and `recognise` raise.
    """
    path = path.expanduser().absolute()
    file, config = find_weights(path)
    shapes: dict[str, Shape] = {}
    if file.is_dir():
        for shard in files_of_a_model(file):
            shapes |= _shapes(shard)
    elif kind_of_file(file) == "gguf":
        opened = open_gguf(file)
        shapes, config = gguf_shapes(opened), adapter_config(opened)
    else:
        refuse_settings(config)
        shapes = _shapes(file)
    return recognise(path, shapes, config, alpha=alpha, force=force)


def gguf_shapes(file: GGUFFile) -> dict[str, Shape]:
    """As PEFT would have them; llama.cpp looks up rows of an embedding's A, which PEFT keeps the other way round."""
    shapes = {adapter_name(name): tensor.shape for name, tensor in file.tensors.items()}
    return {name: shape[::-1] if ".lora_embedding_A" in name else shape for name, shape in shapes.items()}


def _shapes(file: Path) -> dict[str, Shape]:
    if kind_of_file(file) == "safetensors" or is_safetensors(file):
        return shapes_of_safetensors(file)
    return {name: tensor.shape for name, tensor in read_torch_file(file).items()}
