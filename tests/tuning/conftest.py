"""Models of every family without their weights: the published tokenizers, with the configuration beside them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from glmchat.tuning.prompt_side import PromptSide, load_prompt_side

# What differs from the published configuration of the same name.
CONFIGS: dict[str, dict[str, Any]] = {
    "chatglm-6b-early": {"vocab_size": 150528, "bos_token_id": 150004, "eos_token_id": 150005,
                         "mask_token_id": 150000, "gmask_token_id": 150001, "pad_token_id": 20003},
    "chatglm-6b": {}, "chatglm2": {}, "chatglm3": {}, "glm4": {},
}  # fmt: skip
FAMILIES = (*CONFIGS, "smollm2")  # those that talk
CPM = {"model_type": "gpt2", "vocab_size": 30000, "n_positions": 1024, "n_ctx": 1024, "n_embd": 768, "n_layer": 12,
       "n_head": 12}  # fmt: skip


@pytest.fixture(scope="session")
def sides(
    shared: Path, starter_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], PromptSide]]:
    """By name; each is loaded once."""
    loaded: dict[str, PromptSide] = {}

    def side(name: str) -> PromptSide:
        if name not in loaded:
            path = starter_model
            if name in CONFIGS:
                path = tmp_path_factory.mktemp(name)
                for file in (shared / "tokenizers" / name).iterdir():
                    if file.suffix == ".model" or file.name == "tokenizer_config.json":
                        shutil.copyfile(file, path / file.name)
                config = json.loads((shared / "tokenizers" / name.removesuffix("-early") / "config.json").read_text())
                (path / "config.json").write_text(json.dumps(config | CONFIGS[name]))
            if name == "cpm":
                path = tmp_path_factory.mktemp(name)
                shutil.copyfile(
                    shared / "tokenizers" / "cpm-gpt2" / "chinese_vocab.model", path / "chinese_vocab.model"
                )
                (path / "config.json").write_text(json.dumps(CPM))
            loaded[name] = load_prompt_side(path)
        return loaded[name]

    yield side
    for each in loaded.values():
        each.close()


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)
