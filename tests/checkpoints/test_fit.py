"""Will it fit? The numbers, and the words for "no"."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES

from glmchat.checkpoints import fit
from glmchat.core.errors import DoesNotFit
from glmchat.engine.families import identify
from glmchat.engine.loading import load_model
from glmchat.engine.native.cpu import NativeCpu

GB = 10**9
NO_KERNEL = NativeCpu().unavailable()
Write = Callable[[dict[str, str]], Path]


def estimate(
    folder: Path, quant: int | None = None, dtype: str | None = None, context: int | None = None
) -> fit.Memory:
    memory = fit.estimate(folder, quant, dtype, context)
    assert memory is not None
    return memory


def checked(name: str, folder: Path, **options: Any) -> fit.Memory:
    memory = fit.check(name, folder, **options)
    assert memory is not None
    return memory


@pytest.fixture
def chatglm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The measures of ChatGLM-6B, without its weights: a sparse file of their size."""
    config = {"model_type": "chatglm", "num_layers": 28, "hidden_size": 4096, "num_attention_heads": 32,
              "vocab_size": 130528, "bos_token_id": 130004,
              "inner_hidden_size": 16384, "max_sequence_length": 2048, "torch_dtype": "float16"}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    with (tmp_path / "pytorch_model.bin").open("wb") as file:
        file.write(b"PK\x03\x04")
        file.truncate(12_346_621_952 - 22)
        file.seek(0, 2)
        file.write(b"PK\x05\x06" + bytes(18))  # the end of a zip archive without entries
    monkeypatch.setattr(fit, "has_bf16", lambda: True)
    monkeypatch.setattr(fit, "check_folder", lambda folder: None)  # whose vocabulary would be asked for too
    return tmp_path


def test_the_words_name_what_is_needed_what_is_free_and_what_fits() -> None:
    error = fit.memory_words(
        "chatglm-6b", int(13.4 * GB), 8 * GB, [("--quant 8", 9 * GB), ("--quant 4", int(4.1 * GB))]
    )
    assert error.message == "chatglm-6b needs 13.4 GB, but only 8.0 GB are free"
    assert error.hint == "try `--quant 4`, needs 4.1 GB"
    assert error.exit == 4 and error.code == "memory.preflight"
    assert "smaller model" in fit.memory_words("m", 9 * GB, GB, [("--quant 4", 4 * GB)]).hint


def test_weights_cache_and_scratch_are_counted_from_the_config_alone(
    chatglm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "available_memory", lambda: 8 * GB)
    whole = estimate(chatglm)
    assert whole.weights == 2 * 6_173_286_400  # as published
    assert whole.cache == 2 * 28 * 4096 * 2048 * 2
    assert 13.2 * GB < whole.total < 14.2 * GB
    assert estimate(chatglm, context=8192).cache == 4 * whole.cache
    assert 3.5 * GB < estimate(chatglm, 4, "bfloat16").total < 5.5 * GB
    assert estimate(chatglm, 8).total < whole.total * 0.6
    assert estimate(chatglm, dtype="float32").weights == 2 * whole.weights


def test_a_model_with_few_key_heads_has_a_small_cache(tmp_path: Path, chatglm: Path) -> None:
    config = {"model_type": "chatglm", "num_layers": 28, "hidden_size": 4096, "num_attention_heads": 32,
              "multi_query_attention": True, "rmsnorm": True, "padded_vocab_size": 65024,
              "multi_query_group_num": 2, "kv_channels": 128, "seq_length": 8192}  # fmt: skip
    (chatglm / "config.json").write_text(json.dumps(config))
    assert estimate(chatglm).cache == 2 * 28 * 2 * 128 * 8192 * 2


def test_what_does_not_fit_is_refused_before_anything_is_loaded(chatglm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "available_memory", lambda: 8 * GB)
    with pytest.raises(DoesNotFit, match=r"only 8[.]0 GB are free") as refused:
        fit.check("chatglm-6b", chatglm)
    assert "--quant" in refused.value.hint
    assert checked("chatglm-6b", chatglm, quant=4).total < 8 * GB
    monkeypatch.setattr(fit, "available_memory", lambda: GB)
    with pytest.raises(DoesNotFit) as refused:
        fit.check("chatglm-6b", chatglm)
    assert "smaller model" in refused.value.hint


def test_a_cache_of_8_bits_is_counted_and_named_where_it_is_what_fits(
    chatglm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide, narrow = (fit.estimate(chatglm, 4, "float32", 2048, kind) for kind in (None, "int8"))
    assert wide is not None and narrow is not None
    assert narrow.cache * 128 * 4 == wide.cache * (128 + 4)
    assert narrow.scratch > wide.scratch  # one layer of it at a time is read as float32
    monkeypatch.setattr(fit, "available_memory", lambda: (wide.total + narrow.total) // 2)
    with pytest.raises(DoesNotFit) as refused:
        fit.check("chatglm-6b", chatglm, quant=4, dtype="float32", context=2048)
    assert "--cache-type int8" in refused.value.hint
    assert checked("chatglm-6b", chatglm, quant=4, dtype="float32", context=2048, cache_type="int8") == narrow


def test_an_engine_that_was_killed_for_memory_gets_the_next_step(chatglm: Path) -> None:
    assert "--quant 4" in (fit.smaller_hint(chatglm, None, None) or "")
    assert fit.smaller_hint(chatglm, 4, None) is None


@pytest.mark.parametrize("config", [None, "{", "[]", '{"num_layers": -1}', '{"num_layers": "many"}'])
def test_a_folder_that_says_too_little_is_no_reason_to_refuse(tmp_path: Path, config: str | None) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    assert fit.estimate(tmp_path) is None
    assert fit.estimate(tmp_path / "absent") is None


def test_int4_of_six_billion_weights_fits_a_limit_of_six_gigabytes_with_a_cache_of_two_bytes(
    chatglm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "available_memory", lambda: 6 * GB)
    assert checked("chatglm-6b", chatglm, quant=4).cache == 2 * 28 * 4096 * 2048 * 2
    monkeypatch.setattr(fit, "available_memory", lambda: 20 * GB)
    assert checked("chatglm-6b", chatglm, quant=4).cache == 2 * 28 * 4096 * 2048 * 4


KINDS = {
    "token_embd": "Q8_0", "ffn_gate": "Q4_0", "ffn_up": "Q4_1", "ffn_down": "Q8_0", "attn_q": "Q6_K", "attn_k": "F16",
}  # fmt: skip


@pytest.fixture
def gguf(tmp_path: Path) -> Write:
    """Writes a Llama of one layer and of zeros, whose matrices are packed, dense, or of a type that is dequantised."""

    def write(kinds: dict[str, str]) -> Path:
        writer = GGUFWriter(tmp_path / "m.gguf", "llama")
        writer.add_block_count(1)
        writer.add_head_count(4)
        writer.add_head_count_kv(2)
        writer.add_embedding_length(256)
        writer.add_feed_forward_length(512)
        writer.add_context_length(128)
        writer.add_layer_norm_rms_eps(1e-5)
        ffn = {"ffn_gate": (512, 256), "ffn_up": (512, 256), "ffn_down": (256, 512)}
        heads = {"attn_q": (256, 256), "attn_k": (128, 256), "attn_v": (128, 256), "attn_output": (256, 256)}
        layer = {f"blk.0.{name}": shape for name, shape in (ffn | heads).items()}
        norms = dict.fromkeys(("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"), (256,))
        for name, shape in {"token_embd": (320, 256), **layer, **norms}.items():
            kind = GGMLQuantizationType[kinds.get(name.rpartition(".")[2], "F32")]
            block, size = GGML_QUANT_SIZES[kind]
            raw = np.zeros((*shape[:-1], shape[-1] // block * size), np.uint8)
            writer.add_tensor(f"{name}.weight", raw, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / "m.gguf"

    return write


@pytest.mark.skipif(NO_KERNEL is not None, reason=f"the C kernel, whose layout is counted, is not here: {NO_KERNEL}")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kinds", [{}, KINDS, dict.fromkeys(KINDS, "Q4_0"), dict.fromkeys(KINDS, "F16")])
def test_a_gguf_file_takes_the_bytes_in_memory_that_were_told(gguf: Write, kinds: dict[str, str], dtype: str) -> None:
    file = gguf(kinds)
    model = load_model(identify(file), dtype=getattr(torch, dtype))
    memory = estimate(file, dtype=dtype)
    assert memory.weights == sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    assert memory.cache == 2 * 2 * 64 * 128 * (2 if dtype == "bfloat16" else 4)


def test_a_gguf_file_that_is_cut_off_is_weighed_by_its_size_or_not_at_all(gguf: Write, tmp_path: Path) -> None:
    data = gguf(KINDS).read_bytes()
    for length in range(0, 1200, 13):
        (tmp_path / "cut.gguf").write_bytes(data[:length])
        memory = fit.estimate(tmp_path / "cut.gguf")
        assert memory is not None or length == 0
        assert memory is None or memory.weights <= 4 * length


def test_the_starter_models_estimate_is_near_its_file(starter_model: Path) -> None:
    found = estimate(starter_model, dtype="bfloat16", context=2048)
    assert 0.9 < found.weights / starter_model.stat().st_size < 1.1
    assert found.cache == 2 * 30 * 3 * 64 * 2048 * 2


def test_where_bfloat16_is_slow_activations_take_four_bytes_unless_memory_is_short(
    chatglm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = estimate(chatglm)
    monkeypatch.setattr(fit, "has_bf16", lambda: False)
    monkeypatch.setattr(fit, "available_memory", lambda: 100 * GB)
    assert estimate(chatglm).weights == 2 * narrow.weights
    assert estimate(chatglm).cache == 2 * narrow.cache
    monkeypatch.setattr(fit, "available_memory", lambda: 20 * GB)
    assert estimate(chatglm) == narrow
    assert estimate(chatglm, 4).cache == 2 * narrow.cache  # packed weights: float32 around them


def test_the_table_has_a_line_for_each_width_and_context_and_says_what_fits(
    chatglm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "available_memory", lambda: 8 * GB)
    table = fit.fit_table(chatglm, (1024, 8192))
    assert [(row.quant, row.context) for row in table] == [
        (quant, context) for quant in ("float16", "int8", "int4") for context in (1024, 2048)
    ]
    assert [row.fits for row in table] == [False, False, True, True, True, True]
    line = table[-1].to_json()
    assert line["total_bytes"] == sum(line[f"{part}_bytes"] for part in ("weights", "cache", "scratch", "runtime"))
    assert line["free_bytes"] == 8 * GB and line["fits"] is True


def test_a_model_with_its_own_bits_has_one_width_in_the_table(starter_model: Path) -> None:
    assert {row.quant for row in fit.fit_table(starter_model)} == {"as it is"}
