"""Folders that are not what they seem: each is refused in one line, with a hint, a code and exit 3; none runs code.

Covers engine/formats/compressed.py, checkpoints/vocabularies.py.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from glmchat.core.errors import Damaged, GlmchatError, Hostile, Usage
from glmchat.engine import Engine, load_tokenizer
from glmchat.engine.families import identify

SMALL = {"hidden_size": 16, "inner_hidden_size": 32, "num_layers": 2, "num_attention_heads": 2}


@pytest.fixture
def folder(tmp_path: Path, random_checkpoints: ModuleType) -> Path:
    """ChatGLM-6B with the real vocabulary size, in shards."""
    config = random_checkpoints.tiny("chatglm-6b", **SMALL)
    paths = random_checkpoints.write_checkpoint(tmp_path / "model", config, shard_bytes=1_500_000)
    assert len(paths) == 3
    return tmp_path / "model"


def refused(
    folder: Path, kind: type[GlmchatError] = Damaged, load: Callable[[Path], Any] = Engine.load
) -> GlmchatError:
    with pytest.raises(kind) as caught:
        load(folder)
    error = caught.value
    assert error.exit == (2 if kind is Usage else 3)
    assert error.hint
    assert "." in error.code
    assert "\n" not in error.message
    return error


def pointer(size: int) -> bytes:
    return b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize %d\n" % size


def shard(folder: Path, number: int = 1) -> Path:
    return sorted(folder.glob("pytorch_model-*.bin"))[number]


def test_a_pointer_instead_of_a_shard_is_refused_with_the_real_size(folder: Path) -> None:
    shard(folder).write_bytes(pointer(1_740_651_802))
    error = refused(folder)
    assert shard(folder).name in error.message
    assert "1.7 GB" in error.message


def test_a_pointer_instead_of_a_vocabulary_is_refused_with_the_real_size(folder: Path) -> None:
    (folder / "ice_text.model").write_bytes(pointer(2_706_249))
    error = refused(folder)
    assert "ice_text.model" in error.message
    assert "2.7 MB" in error.message


def test_an_empty_vocabulary_is_refused(folder: Path) -> None:
    (folder / "ice_text.model").touch()
    assert "ice_text.model is empty" in refused(folder).message


def test_a_vocabulary_cut_short_is_refused(folder: Path, shared: Path) -> None:
    whole = (shared / "tokenizers" / "chatglm-6b" / "ice_text.model").read_bytes()
    (folder / "ice_text.model").write_bytes(whole[: len(whole) // 2])
    assert "ice_text.model" in refused(folder).message


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.99])
def test_a_truncated_shard_is_refused_by_name(folder: Path, kept: float) -> None:
    path = shard(folder)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    assert path.name in refused(folder).message


def test_a_missing_shard_is_refused_by_name(folder: Path) -> None:
    name = shard(folder).name
    shard(folder).unlink()
    assert name in refused(folder).message


def test_a_shard_of_another_generation_is_refused_and_named(folder: Path, random_checkpoints: ModuleType) -> None:
    config = json.loads((folder / "config.json").read_text())
    early = random_checkpoints.tiny("chatglm-6b-early", **SMALL)
    random_checkpoints.write_checkpoint(folder, early, shard_bytes=1_500_000)
    (folder / "config.json").write_text(json.dumps(config))
    error = refused(folder)
    assert "[150528, 16] instead of [130528, 16]" in error.message
    assert "March 2023" in error.hint


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_malicious_pickle_is_refused_and_does_not_run(folder: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Bomb:
        def __reduce__(self) -> Any:
            return Path.touch, (canary,)

    name = "transformer.word_embeddings.weight"
    torch.save({name: Bomb()}, shard(folder, 0))
    assert "it asks for getattr" in refused(folder, Hostile).message
    with shard(folder, 0).open("wb") as file:
        pickle.dump({name: Bomb()}, file)
    refused(folder)
    assert not canary.exists()


def test_code_named_in_config_json_is_never_imported(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "modeling_chatglm.ChatGLM", "AutoConfig": "modeling_chatglm.Config"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_chatglm.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\n")
    assert Engine.load(folder, dtype="float32", threads=1).family == "chatglm"
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("config", "vocabulary", "words"),
    [
        ("chatglm-6b", "chatglm-6b-early/ice_text.model", ("March 2023", "130,528", "2,706,249")),
        ("chatglm-6b-early", "chatglm-6b/ice_text.model", ("April 2023", "150,528", "2,699,926")),
        ("chatglm-6b", "chatglm2/tokenizer.model", ("ice_text.model", "64,789")),
        ("chatglm3-6b", "glm4/tokenizer.model", ("tokenizer.model", "GLM-4")),
        ("glm-4-9b-chat", "chatglm3/tokenizer.model", ("ChatGLM3-6B", "2,623,634")),
    ],
)
def test_a_mixture_of_generations_is_refused_with_what_belongs_where(
    config: str, vocabulary: str, words: tuple[str, ...], tmp_path: Path, shared: Path, random_checkpoints: ModuleType
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(random_checkpoints.CONFIGS[config]))
    name = "ice_text.model" if config.startswith("chatglm-6b") else "tokenizer.model"
    shutil.copy(shared / "tokenizers" / vocabulary, tmp_path / name)
    error = refused(tmp_path, load=load_tokenizer)
    for word in words:
        assert word in f"{error.message} {error.hint}"


def test_a_vocabulary_of_another_model_beside_the_weights_is_named(folder: Path, shared: Path) -> None:
    shutil.copy(shared / "tokenizers" / "chatglm2" / "tokenizer.model", folder)
    assert "tokenizer.model, which belongs to other models" in refused(folder, load=load_tokenizer).message


def test_a_folder_without_a_vocabulary_computes_and_says_what_is_missing(folder: Path) -> None:
    engine = Engine.load(folder, dtype="float32", threads=1)
    assert engine.logits([5, 130001, 130004]).shape == (3, 130528)
    with pytest.raises(Damaged, match=r"ice_text\.model"):
        engine.render([{"role": "user", "content": "你好"}])


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 10**12}, {"num_layers": -1}, {"num_layers": "28"}, {"vocab_size": 2**40}, {"hidden_size": 17},
        {"layernorm_epsilon": -1}, {"bos_token_id": 10**9}, {"pre_seq_len": 10**9}, {"prefix_projection": [False]},
        {"quantization_embeddings": True},
    ],
)  # fmt: skip
def test_absurd_values_are_refused_before_memory_is_taken(folder: Path, changes: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, load=identify)


@pytest.mark.parametrize(
    "changes", [{"multi_query_attention": False}, {"rmsnorm": False}, {"multi_query_group_num": 3}, {"kv_channels": 7}]
)
def test_variants_of_chatglm2_that_were_never_released_are_refused(
    changes: dict[str, Any], tmp_path: Path, random_checkpoints: ModuleType
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(dict(random_checkpoints.CONFIGS["chatglm2-6b"]) | changes))
    refused(tmp_path, load=identify)


def test_quantised_embeddings_are_refused_by_name(folder: Path) -> None:
    path = shard(folder, 0)
    tensors = torch.load(path, weights_only=True)
    name = "transformer.word_embeddings.weight"
    tensors[name] = torch.zeros(130528, 8, dtype=torch.int8)
    tensors[f"{name}_scale"] = torch.ones(130528)
    torch.save(tensors, path)
    assert "int4-qe" in refused(folder).message


def test_fields_under_the_other_spelling_mean_the_same(random_checkpoints: ModuleType) -> None:
    from glmchat.checkpoints import chatglm, chatglm2

    for parse, name in ((chatglm.parse, "chatglm-6b"), (chatglm2.parse, "chatglm2-6b")):
        config = dict(random_checkpoints.CONFIGS[name])
        renamed = {"num_hidden_layers" if key == "num_layers" else key: value for key, value in config.items()}
        assert parse(renamed) == parse(config)


def test_a_folder_with_only_a_prefix_names_its_base_and_the_command(tmp_path: Path, shared: Path) -> None:
    source = shared / "reference" / "chatglm" / "v1_new_ptuning"
    shutil.copy(source / "config.json", tmp_path)
    shutil.copy(source / "prefix_only" / "pytorch_model.bin", tmp_path)
    error = refused(tmp_path, Usage)
    assert "THUDM/chatglm-6b" in error.message
    assert error.hint == f"glmchat run THUDM/chatglm-6b --adapter {tmp_path}"
    (tmp_path / "config.json").unlink()
    assert refused(tmp_path, Usage).hint == f"glmchat run BASE --adapter {tmp_path}"


def test_a_prefix_that_config_json_and_weights_do_not_agree_on_is_told(
    folder: Path, shared: Path, tmp_path: Path
) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pre_seq_len": 128}))
    assert "remove it" in refused(folder).hint
    source, merged = shared / "reference" / "chatglm" / "v1_new_ptuning", tmp_path / "merged"
    shutil.copytree(source, merged)
    config = json.loads((source / "config.json").read_text())
    (merged / "config.json").unlink()
    (merged / "config.json").write_text(json.dumps(config | {"pre_seq_len": None}))
    assert "pre_seq_len" in refused(merged).hint


def test_a_folder_with_only_a_lora_names_its_base_and_the_command(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "THUDM/chatglm3-6b", "r": 8})
    )
    error = refused(tmp_path, Usage)
    assert "THUDM/chatglm3-6b" in error.message
    assert error.hint == f"glmchat run THUDM/chatglm3-6b --adapter {tmp_path}"


def test_the_head_is_the_embedding_whatever_the_file_holds(folder: Path) -> None:
    ids = [5, 130001, 130004]
    before = Engine.load(folder, dtype="float32", threads=1).logits(ids)
    path = shard(folder, 2)
    tensors = torch.load(path, weights_only=True)
    tensors["lm_head.weight"] = torch.zeros_like(tensors["lm_head.weight"])
    torch.save(tensors, path)
    assert torch.equal(Engine.load(folder, dtype="float32", threads=1).logits(ids), before)


def test_packed_weights_are_recognised_without_quantization_bit(tmp_path: Path, shared: Path) -> None:
    """People copy the full model's config.json beside INT4 weights; the shapes tell."""
    for variant in ("v2_int4", "v1_new_int8"):
        source = shared / "reference" / "chatglm" / variant
        config = json.loads((source / "config.json").read_text())
        del config["quantization_bit"]
        target = tmp_path / variant
        target.mkdir()
        (target / "config.json").write_text(json.dumps(config))
        shutil.copy(source / "pytorch_model.bin", target)
        ids = [11, 1301, 1304] if variant.startswith("v1") else [11, 12, 13]
        expected = Engine.load(source, dtype="float32", threads=1).logits(ids)
        assert torch.equal(Engine.load(target, dtype="float32", threads=1).logits(ids), expected)
