"""Prefixes and virtual tokens as methods: what learns stands before every document, and the base stays as it is.

P-Tuning v2 (Liu et al. 2021) as THUDM's scripts learn it, for ChatGLM-6B, ChatGLM2 and ChatGLM3; prefix tuning (Li and
Liang 2021) and prompt tuning (Lester et al. 2021) in PEFT's format for the other families that are computed here.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from glmchat.checkpoints.adapter_fit import CHATGLM, names_of
from glmchat.checkpoints.weight_files import PREFIX_ENCODER
from glmchat.engine.adapters.prefix_tuning import keys_of_prompt
from glmchat.engine.families import Checkpoint
from glmchat.engine.formats.weights import load_bin
from glmchat.engine.models.base import LanguageModel
from glmchat.engine.models.gpt2 import GPT2
from glmchat.engine.models.llama import Llama
from glmchat.engine.models.prefix import PrefixedModel, key_values, rows_of
from glmchat.tuning import lora
from glmchat.tuning.checking import refuse_family
from glmchat.tuning.effects import Effects, effects_of_rows
from glmchat.tuning.forward import Flat, Front, loss_of
from glmchat.tuning.methods.base import Method
from glmchat.tuning.settings import Settings

THUDM = "pytorch_model.bin"
_ENCODER = "prefix_encoder.safetensors"  # of a checkpoint: PEFT's file holds what a projection gives, not itself
_PEFT_NAME = "prompt_embeddings"


class _InFront(Method):
    """beside: the encoder, or the virtual tokens. virtual: so many positions stand before each document."""

    def __init__(
        self, checkpoint: Checkpoint, model: LanguageModel, settings: Settings, beside: nn.Module, names: str = ""
    ) -> None:
        """names: what the names of the tensors begin with."""
        lora.prepare(model)
        self._checkpoint, self._settings = checkpoint, settings
        self.beside = beside.to(next(model.parameters()).device)
        tensors = {f"{names}{name}": value for name, value in beside.named_parameters()}
        super().__init__(model, tensors, model.spec.layers)
        self.virtual = settings.prefix_length

    @abstractmethod
    def front(self) -> Front:
        """What stands before every document, with its gradients."""

    def loss(self, flat: Flat, *, by_layer: bool = False) -> torch.Tensor:
        return loss_of(self.model, flat, by_layer=by_layer, front=self.front(), hits=self.measured)

    def count(self) -> tuple[int, int]:
        learning = sum(value.numel() for value in self.parameters.values())
        return learning, lora.count(self.model, {})[1] + learning

    def read(self, folder: Path) -> None:
        lora.read_tensors(self._saved(folder), self.parameters)

    def _saved(self, folder: Path) -> Mapping[str, torch.Tensor]:
        return {**load_file(folder / lora.WEIGHTS)}

    def _config(self) -> dict[str, Any]:
        """What PEFT's configurations of virtual tokens have in common."""
        spec = self.model.spec
        return {
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": next(iter(names_of(self._checkpoint.path, self._checkpoint.config)), ""),
            "inference_mode": True,
            "num_virtual_tokens": self.virtual,
            "num_layers": spec.layers,
            "num_transformer_submodules": 1,
        }

    def _write_peft(self, folder: Path, rows: torch.Tensor, config: Mapping[str, Any]) -> None:
        tensors = {_PEFT_NAME: rows.detach().float().cpu().contiguous().clone()}
        save_file(tensors, folder / lora.WEIGHTS, metadata={"format": "pt"})
        text = json.dumps(self._config() | dict(config), indent=2, sort_keys=True) + "\n"
        (folder / lora.CONFIG).write_text(text, encoding="utf-8")


class Prefix(_InFront):
    """Keys and values of every layer, with and without a projection in front of them.

    They begin as THUDM and PEFT let them begin, by torch's own rule for an embedding and for linear layers; those of
    PEFT's format without a projection with what the network makes of random words (Li and Liang 2021, section 7.4), as
    numbers of its own size disturb it least.
    """

    def __init__(self, checkpoint: Checkpoint, model: LanguageModel, settings: Settings) -> None:
        refuse_family(checkpoint.spec.family, "prefix", is_native=checkpoint.family.load is None)
        model = cast(PrefixedModel, model)
        self._is_thudm = checkpoint.spec.family in CHATGLM
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self._encoder = model.make_encoder(settings.prefix_length, projected=settings.prefix_projection)
            if not self._is_thudm and not settings.prefix_projection:
                words = model_words(model, settings.prefix_length)
                with torch.no_grad():
                    self._encoder.embedding.weight.copy_(rows_of(keys_of_prompt(model, words)))
        super().__init__(checkpoint, model, settings, self._encoder, PREFIX_ENCODER)

    def front(self) -> Front:
        """In the type of the activations, as the original casts them, and then with its dropout."""
        rows = self._encoder().to(self.model.dtype)
        if self._settings.dropout:
            rows = functional.dropout(rows, self._settings.dropout, self.model.training)
        return Front(key_values(rows, self.model.spec), shifts=not self._is_thudm)

    @torch.no_grad()
    def change(self) -> float:
        return float(self._encoder().norm())

    @contextmanager
    def in_force(self) -> Iterator[None]:
        model = cast(PrefixedModel, self.model)
        with torch.no_grad():
            model.set_prefix(key_values(self._encoder(), model.spec), shifts=not self._is_thudm)
        try:
            yield
        finally:
            model.set_prefix(None)

    @torch.no_grad()
    def effects(self) -> Effects:
        return effects_of_rows(key_values(self._encoder(), self.model.spec))

    def write(self, folder: Path) -> None:
        settings = self._settings
        if self._is_thudm:
            torch.save(self._tensors(), folder / THUDM)
            config = {
                **self._checkpoint.config,
                "pre_seq_len": settings.prefix_length,
                "prefix_projection": settings.prefix_projection,
                "_name_or_path": self._config()["base_model_name_or_path"],
            }
            text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
            (folder / "config.json").write_text(text, encoding="utf-8")
            return
        spec = self.model.spec
        with torch.no_grad():
            rows = self._encoder()
        inner = spec.kv_heads * spec.head_dim
        self._write_peft(
            folder,
            rows,
            {
                "peft_type": "PREFIX_TUNING",
                "token_dim": inner,
                "num_attention_heads": spec.kv_heads,
                "encoder_hidden_size": inner,
                "prefix_projection": settings.prefix_projection,
            },
        )

    def save(self, folder: Path) -> None:
        self.write(folder)
        if self._settings.prefix_projection and not self._is_thudm:
            save_file(self._tensors(), folder / _ENCODER)

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {name: value.detach().cpu().contiguous().clone() for name, value in self.parameters.items()}

    def _saved(self, folder: Path) -> Mapping[str, torch.Tensor]:
        if self._is_thudm:
            return load_bin(folder / THUDM)
        if self._settings.prefix_projection:
            return {**load_file(folder / _ENCODER)}
        return {name: super(Prefix, self)._saved(folder)[_PEFT_NAME] for name in self.parameters}


class Prompt(_InFront):
    """Virtual tokens, that begin as words drawn from the vocabulary."""

    learns_words: ClassVar[bool] = True

    def __init__(self, checkpoint: Checkpoint, model: LanguageModel, settings: Settings) -> None:
        refuse_family(checkpoint.spec.family, "prompt", is_native=checkpoint.family.load is None)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self._words = nn.Parameter(model_words(model, settings.prefix_length))
        super().__init__(checkpoint, model, settings, nn.ParameterDict({_PEFT_NAME: self._words}))

    def front(self) -> Front:
        return Front(words=self._words)

    @torch.no_grad()
    def change(self) -> float:
        return float(self._words.norm())

    @contextmanager
    def in_force(self) -> Iterator[None]:
        model = cast(PrefixedModel, self.model)
        model.set_prefix(keys_of_prompt(model, self._words.detach()), shifts=True)
        try:
            yield
        finally:
            model.set_prefix(None)

    def effects(self) -> Effects:
        return effects_of_rows(self._words)

    def write(self, folder: Path) -> None:
        spec = self.model.spec
        self._write_peft(
            folder,
            self._words,
            {
                "peft_type": "PROMPT_TUNING",
                "token_dim": spec.hidden_size,
                "num_attention_heads": spec.heads,
                "prompt_tuning_init": "RANDOM",
            },
        )


def model_words(model: LanguageModel, count: int) -> torch.Tensor:
    """Embeddings [count, hidden] of words drawn by torch's generator, float32."""
    embedding = model.transformer.wte if isinstance(model, GPT2) else cast(Llama, model).model.embed_tokens
    ids = torch.randint(0, model.spec.vocab_size, (count,))
    with torch.no_grad():
        return cast(torch.Tensor, embedding(ids.to(next(model.parameters()).device))).float()
