"""What cannot be run is refused before the engine starts: in one line, with a hint, a code, and the right exit code.

Covers checkpoints/vocabularies.py, checkpoints/weight_files.py.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import odd_models
import pytest
import torch
from fakes import LLAMA, stored_shapes, weights_of

from glmchat.checkpoints import fit, tokenizer_files
from glmchat.checkpoints.families import describe
from glmchat.checkpoints.fit import check_folder, stored_bytes
from glmchat.checkpoints.tokenizer_files import check_tokenizer
from glmchat.checkpoints.vocabularies import KNOWN, generation
from glmchat.checkpoints.weight_files import folder_config
from glmchat.core.errors import Damaged, GlmchatError, Hostile, Usage
from glmchat.hub.installed import family_at

SIX = {"model_type": "chatglm", "hidden_size": 64, "inner_hidden_size": 256, "num_layers": 2, "num_attention_heads": 4}
TWO = {"model_type": "chatglm", "multi_query_attention": True, "multi_query_group_num": 2, "kv_channels": 16,
       "hidden_size": 64, "ffn_hidden_size": 160, "num_layers": 2, "num_attention_heads": 4}  # fmt: skip
CONFIGS = {
    "first": {**SIX, "vocab_size": 150528},
    "slim": {**SIX, "vocab_size": 130528, "bos_token_id": 130004},
    "chatglm2": {**TWO, "padded_vocab_size": 65024},
    "glm4": {**TWO, "padded_vocab_size": 151552},
    "cpm": {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 30000},
}
REAL = {"first": "chatglm-6b-early", "slim": "chatglm-6b", "chatglm2": "chatglm3", "glm4": "glm4", "cpm": "cpm-gpt2"}
PARAMETERS = 12_000_000  # more than any of these describes


def vocabulary(shared: Path, name: str) -> Path:
    return shared / "tokenizers" / REAL[name] / KNOWN[name].file


def write_config(folder: Path, config: object) -> None:
    (folder / "config.json").write_text(json.dumps(config))


def write_bin(
    path: Path, names: Sequence[str] = ("transformer.word_embeddings.weight",), size: int = 2 * PARAMETERS
) -> None:
    held = torch.zeros(size, dtype=torch.uint8)
    torch.save({name: held[:1] if number else held for number, name in enumerate(names)}, path)


def write_shards(folder: Path, config: Mapping[str, Any]) -> None:
    """Config and weights in two shards: every tensor by name and shape, of zeros in a byte each."""
    write_config(folder, config)
    table: dict[str, str] = {}
    for number in (1, 2):
        name = f"pytorch_model-0000{number}-of-00002.bin"
        shapes = dict(list(stored_shapes(config).items())[number - 1 :: 2])
        torch.save({key: torch.zeros(shape, dtype=torch.uint8) for key, shape in shapes.items()}, folder / name)
        table |= dict.fromkeys(shapes, name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": table}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A ChatGLM3 of two layers in shards. No vocabulary yet."""
    write_shards(tmp_path, CONFIGS["chatglm2"])
    return tmp_path


@pytest.fixture
def whole(folder: Path, shared: Path) -> Path:
    shutil.copy(vocabulary(shared, "chatglm2"), folder)
    return folder


def refused(folder: Path, kind: type[GlmchatError] = Damaged) -> GlmchatError:
    with pytest.raises(kind) as caught:
        fit.check("m", folder)
    error = caught.value
    assert error.exit == (2 if kind is Usage else 3) and error.hint and "\n" not in error.message
    return error


def pointer(size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize {size}\n".encode()


def test_a_sound_folder_passes_and_torch_is_not_loaded(whole: Path) -> None:
    code = "import sys; from pathlib import Path; from glmchat.checkpoints.fit import check_folder as c; "
    code += f"c(Path({str(whole)!r})); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


@pytest.mark.parametrize("beside", CONFIGS)
@pytest.mark.parametrize("name", CONFIGS)
def test_each_vocabulary_passes_beside_its_own_config_and_no_other(
    name: str, beside: str, folder: Path, shared: Path
) -> None:
    write_shards(folder, CONFIGS[beside])
    shutil.copy(vocabulary(shared, name), folder / KNOWN[beside].file)
    if name == beside:
        check_folder(folder)
        return
    error = refused(folder)
    assert error.code == "tokenizer.generation"
    assert KNOWN[name].model in error.message and KNOWN[beside].model in error.message
    assert f"{KNOWN[beside].size:,}" in error.hint


def test_a_vocabulary_that_is_absent_or_under_another_models_name_is_told(folder: Path, shared: Path) -> None:
    shutil.copy(vocabulary(shared, "slim"), folder)
    error = refused(folder)
    assert error.code == "tokenizer.missing" and "ice_text.model, which belongs to other models" in error.message


def test_an_export_without_its_vocabulary_is_told_the_file_its_size_and_the_base_that_has_it(folder: Path) -> None:
    error = refused(folder)
    assert "tokenizer.model" in error.message
    assert "1,018,370 bytes" in error.hint and "glmchat pull THUDM/chatglm3-6b --include tokenizer.model" in error.hint


GLM_TOKENS = {"64790": {"content": "[gMASK]"}, "64792": {"content": "sop"}}
ROLES = {"64795": {"content": "<|user|>"}, "64796": {"content": "<|assistant|>"}}
SIGNS: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "nothing": ({}, "chatglm3"),
    "the tokenizer's name": ({"tokenizer_config.json": {"name_or_path": "THUDM/chatglm2-6b"}}, "chatglm2"),
    "tokens without roles": ({"tokenizer_config.json": {"added_tokens_decoder": GLM_TOKENS}}, "chatglm2"),
    "tokens with roles": ({"tokenizer_config.json": {"added_tokens_decoder": {**GLM_TOKENS, **ROLES}}}, "chatglm3"),
    "added tokens": ({"added_tokens.json": {"[gMASK]": 64790, "<|user|>": 64795}}, "chatglm3"),
    "code of ChatGLM2": ({"tokenization_chatglm.py": 'prompt += "[Round {}]"'}, "chatglm2"),
    "code of ChatGLM3": ({"tokenization_chatglm.py": 'role_special_tokens = ["<|user|>"]'}, "chatglm3"),
    "a hostile file": ({"tokenizer_config.json": [], "added_tokens.json": 7}, "chatglm3"),
}


@pytest.mark.parametrize("case", SIGNS)
def test_an_export_that_lost_its_name_is_known_by_its_tokenizers_files_wherever_it_is_read(
    case: str, whole: Path
) -> None:
    files, right = SIGNS[case]
    exported = {"_name_or_path": "output/export", "auto_map": {"AutoModel": "modeling_chatglm.X"}}
    write_config(whole, {**CONFIGS["chatglm2"], **exported, "transformers_version": "4.41.2"})
    for name, content in files.items():
        (whole / name).write_text(content if isinstance(content, str) else json.dumps(content))
    check_folder(whole)
    assert generation(folder_config(whole)) == right
    shown = describe(whole)
    assert shown is not None and shown.family == right
    assert family_at(whole) == right
    assert generation(fit.config_at(whole)) == right


@pytest.mark.parametrize(
    ("content", "code"),
    [(b"", "file.empty"), (pointer(1_018_370), "file.lfs_pointer"), (b"<html>404</html>", "tokenizer.damaged")],
)
def test_a_vocabulary_that_is_none_is_told(content: bytes, code: str, folder: Path) -> None:
    (folder / "tokenizer.model").write_bytes(content)
    assert refused(folder).code == code


@pytest.mark.parametrize("kept", [0.01, 0.5, 0.999])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_vocabulary_that_was_cut_off_is_told(name: str, kept: float, folder: Path, shared: Path) -> None:
    write_config(folder, CONFIGS[name])
    data = vocabulary(shared, name).read_bytes()
    (folder / KNOWN[name].file).write_bytes(data[: int(len(data) * kept)])
    assert refused(folder).code in ("tokenizer.damaged", "tokenizer.generation")


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "tokenizer.model"])
def test_pointers_are_found_in_vocabularies_of_every_family(name: str, folder: Path) -> None:
    write_config(folder, LLAMA)
    (folder / name).write_bytes(pointer(2_000_000))
    assert "2.0 MB" in refused(folder).message


def test_a_missing_shard_a_pointer_and_a_shard_cut_off_are_named(whole: Path) -> None:
    shard = whole / "pytorch_model-00002-of-00002.bin"
    data = shard.read_bytes()
    for content, code in ((pointer(10**9), "file.lfs_pointer"), (b"", "file.empty"), (data[:-30], "weights.damaged")):
        shard.write_bytes(content)
        error = refused(whole)
        assert error.code == code and shard.name in error.message
    shard.unlink()
    error = refused(whole)
    assert error.code == "weights.missing_shard" and shard.name in error.message


def test_zero_points_that_a_quantised_copy_has_lost_are_told(whole: Path) -> None:
    offsets = odd_models.tensors(whole / "offsets-00001.safetensors", {"a.weight_offset": (4, 1)})
    files = [{"path": name} for name in (offsets.name, "offsets-../../x.safetensors", "config.json")]
    (whole / "glmchat.json").write_text(json.dumps({"files": [*files, {"path": 3}, None]}))
    check_folder(whole)
    data = offsets.read_bytes()
    offsets.write_bytes(data[:-1])
    assert refused(whole).code == "weights.damaged"
    offsets.unlink()
    error = refused(whole)
    assert error.code == "weights.missing_shard" and "offsets-00001.safetensors is missing" in error.message
    offsets.symlink_to(whole / "nowhere")
    assert "link" in refused(whole).hint and stored_bytes(whole) == sum(p.stat().st_size for p in whole.glob("*.bin"))
    (whole / "glmchat.json").unlink()
    assert "link" in refused(whole).hint


@pytest.mark.parametrize("change", [-1, 1])
def test_safetensors_of_the_wrong_length_are_told(change: int, whole: Path) -> None:
    for file in whole.glob("*.bin*"):
        file.unlink()
    data = weights_of(CONFIGS["chatglm2"])
    (whole / "model.safetensors").write_bytes(data)
    check_folder(whole)
    (whole / "model.safetensors").write_bytes(data[:change] if change < 0 else data + b"x")
    assert refused(whole).code == "weights.damaged"


def test_an_index_that_names_a_path_is_hostile(whole: Path) -> None:
    (whole / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    assert refused(whole, Hostile).code == "weights.path"


@pytest.mark.parametrize(
    "change",
    [{"num_layers": 10**6}, {"num_layers": 1000}, {"num_layers": "28"}, {"num_layers": 0}, {"hidden_size": 65536},
     {"hidden_size": 10**9}, {"padded_vocab_size": 2**40}, {"seq_length": 10**12}, {"pre_seq_len": 10**7}],
)  # fmt: skip
def test_an_absurd_config_is_called_absurd_and_not_too_large_for_the_memory(
    change: Any, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "available_memory", lambda: 10**9)
    write_config(whole, {**CONFIGS["chatglm2"], **change})
    assert refused(whole).code == "config.absurd"


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_config_that_is_no_json_object_is_told(text: str, whole: Path) -> None:
    (whole / "config.json").write_text(text, encoding="latin-1")
    assert refused(whole).code == "config.damaged"


def test_a_folder_without_config_or_weights_is_told(whole: Path) -> None:
    for file in whole.glob("*.bin*"):
        file.unlink()
    assert refused(whole).code == "weights.none"
    (whole / "config.json").unlink()
    assert refused(whole).code == "model.no_config"


def test_a_folder_that_holds_only_a_lora_or_a_prefix_names_its_base_and_the_command(
    whole: Path, tmp_path: Path
) -> None:
    for file in whole.glob("*.bin*"):
        file.unlink()
    write_config(whole, {**CONFIGS["chatglm2"], "_name_or_path": "THUDM/chatglm2-6b"})
    write_bin(whole / "pytorch_model.bin", ["transformer.prefix_encoder.embedding.weight"])
    error = refused(whole, Usage)
    assert "only a P-Tuning prefix; it needs THUDM/chatglm2-6b" in error.message
    assert error.hint == f"glmchat run THUDM/chatglm2-6b --adapter {whole}"
    (whole / "config.json").unlink()
    (whole / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "x; rm -rf /"}))
    assert "glmchat run BASE " in refused(whole, Usage).hint


def test_the_output_of_a_training_names_its_newest_checkpoint_and_the_command(tmp_path: Path) -> None:
    for number in (500, 3000, 1000):
        (tmp_path / f"checkpoint-{number}").mkdir()
    newest = tmp_path / "checkpoint-3000"
    write_config(newest, {**CONFIGS["slim"], "_name_or_path": "THUDM/chatglm-6b"})
    write_bin(newest / "pytorch_model.bin", ["transformer.prefix_encoder.embedding.weight"], size=8)
    error = refused(tmp_path, Usage)
    assert error.code == "model.only_adapter" and str(newest) in error.message
    assert error.hint == f"glmchat run THUDM/chatglm-6b --adapter {newest}"
    write_bin(newest / "pytorch_model.bin", size=8)
    error = refused(tmp_path)
    assert error.code == "model.no_config" and error.hint.endswith(str(newest)), "a whole model was trained"
    (newest / "pytorch_model.bin").unlink()
    (newest / "config.json").unlink()
    (newest / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "THUDM/chatglm3-6b"}))
    assert refused(tmp_path, Usage).hint == f"glmchat run THUDM/chatglm3-6b --adapter {newest}"


def test_a_gguf_pointer_is_told(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(pointer(10**8))
    assert refused(tmp_path / "model.gguf").code == "file.lfs_pointer"


@pytest.mark.parametrize(("more", "fits"), [(1, True), (40, True), (2000, False)])
def test_some_added_words_may_have_no_row_and_those_of_another_model_are_told(
    more: int, fits: bool, folder: Path
) -> None:
    config = {"model_type": "llama", "vocab_size": 320}
    words = [{"id": 320 + n, "content": f"<image{n}>", "special": True} for n in range(more)]
    model = {"type": "BPE", "vocab": {f"w{n}": n for n in range(320)}, "merges": []}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": words, "model": model}))
    if fits:
        check_tokenizer(folder, config, natively=True)
        return
    with pytest.raises(Damaged, match="2,320 tokens") as told:
        check_tokenizer(folder, config, natively=True)
    assert told.value.code == "tokenizer.generation"


def test_of_a_very_long_tokenizer_the_beginning_tells_the_added_words(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer_files, "LARGEST", 1000)
    words = [{"id": 320 + n, "content": f"<image{n}>", "special": True} for n in range(200)]
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": words, "model": {"type": "BPE"}}))
    with pytest.raises(Damaged, match="520 tokens"):
        check_tokenizer(folder, {"model_type": "llama", "vocab_size": 320}, natively=True)


@pytest.mark.parametrize("kind", ["BPE", "Unigram", "WordLevel", "WordPiece"])
def test_every_kind_of_tokenizer_is_counted_as_its_own_library_counts_it(kind: str, tmp_path: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, models

    words = {f"w{n}": n for n in range(300)}
    made: dict[str, Callable[[], Any]] = {
        "BPE": lambda: models.BPE(words, []),
        "Unigram": lambda: models.Unigram([(word, -1.0) for word in words], unk_id=0),
        "WordLevel": lambda: models.WordLevel(words, unk_token="w0"),
        "WordPiece": lambda: models.WordPiece(words, unk_token="w0"),
    }
    tokenizer = Tokenizer(made[kind]())
    tokenizer.add_tokens([AddedToken("w7"), AddedToken("new one"), AddedToken("another")])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    count = tokenizer.get_vocab_size(with_added_tokens=True)
    fitting, short = ({"model_type": "llama", "vocab_size": count - 64 - less} for less in (0, 1))
    check_tokenizer(tmp_path, fitting, natively=True)
    with pytest.raises(Damaged, match=f"{count} tokens"):
        check_tokenizer(tmp_path, short, natively=True)


@pytest.mark.parametrize("value", ["abc", [1], True, 1.5, 0])
@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters", "quantization_config"])
def test_a_table_of_settings_that_is_none_is_refused_by_name(name: str, value: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, name: value}))
    with pytest.raises(Damaged, match=rf"{name} is .* in the model's configuration"):
        check_folder(tmp_path)


@pytest.mark.parametrize("value", ["abc", {}, {"id": 2}, True, 1.5, ["2"], [[2]]])
def test_an_end_token_that_is_no_id_is_refused_by_name(value: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "eos_token_id": value}))
    with pytest.raises(Damaged, match=r"eos_token_id is .* in the model's configuration"):
        check_folder(tmp_path)


@pytest.mark.parametrize("step", ["refuse_pipeline", "folder_config", "weight_files", "check_tokenizer", "shapes_of"])
def test_a_folder_that_another_program_removes_meanwhile_is_one_line(
    tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, then = odd_models.llama(tmp_path / "model"), getattr(fit, step)
    check_folder(folder)

    def gone(*arguments: object) -> object:
        shutil.rmtree(folder, ignore_errors=True)
        return then(*arguments)

    monkeypatch.setattr(fit, step, gone)
    with pytest.raises(GlmchatError) as raised:
        check_folder(folder)
    assert raised.value.exit in (2, 3)
