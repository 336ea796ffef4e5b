"""Wrong, damaged and hostile adapters: each is refused with its reason, and the model answers as before.

Covers engine/adapters/attach.py, engine/adapters/files.py, checkpoints/adapter_files.py,
checkpoints/adapter_settings.py, checkpoints/adapter_fit.py.
"""

from __future__ import annotations

import json
import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import adapter_builders as adapters
import pytest
import torch
from safetensors.torch import save_file

from glmchat.checkpoints.adapter_fit import canonical, other_model
from glmchat.cli.adapters import add
from glmchat.core.errors import Damaged, GlmchatError, Usage
from glmchat.engine import Engine
from glmchat.hub.adapters import list_adapters

IDS = [1, 40, 77, 105, 9]
Q = "base_model.model.model.layers.0.self_attn.q_proj"


class Runs:
    """A pickle that runs a program when it is opened."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def other_family(folder: Path) -> None:
    stem = "base_model.model.transformer.layers.0.attention.query_key_value"
    adapters.write_lora(
        folder, {f"{stem}.lora_A.weight": torch.ones(4, 64), f"{stem}.lora_B.weight": torch.ones(64, 4)}
    )


def other_width(folder: Path) -> None:
    adapters.write_lora(folder, adapters.factors(3, width=128, out=128))


def more_layers(folder: Path) -> None:
    adapters.write_lora(folder, adapters.factors(4))


def fewer_layers(folder: Path) -> None:
    adapters.write_lora(folder, adapters.factors(2))


def wrong_rank(folder: Path) -> None:
    adapters.write_lora(folder, adapters.factors(3), r=8)


def absurd_rank(folder: Path) -> None:
    adapters.write_lora(folder, adapters.factors(3), r=10**12)


def ranks_apart(folder: Path) -> None:
    tensors = adapters.factors(3)
    tensors[f"{Q}.lora_A.weight"] = torch.ones(3, 64)
    adapters.write_lora(folder, tensors)


def missing_b(folder: Path) -> None:
    tensors = adapters.factors(3)
    del tensors[f"{Q}.lora_B.weight"]
    adapters.write_lora(folder, tensors)


def not_a_number(folder: Path) -> None:
    tensors = adapters.factors(3)
    tensors[f"{Q}.lora_B.weight"][0, 0] = float("nan")
    adapters.write_lora(folder, tensors)


def cut_off(folder: Path) -> None:
    adapters.write_lora(folder, adapters.factors(3))
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def claims_ten_gigabytes(folder: Path) -> None:
    adapters.write_lora(folder, adapters.factors(3))
    header = {f"{Q}.lora_A.weight": {"dtype": "F32", "shape": [50000, 50000], "data_offsets": [0, 10**10]}}
    text = json.dumps(header).encode()
    (folder / "adapter_model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)


def stretched_storage(folder: Path) -> None:
    """Ten gigabytes of shape over four bytes of storage."""
    adapters.write_lora(folder, adapters.factors(3))
    (folder / "adapter_model.safetensors").unlink()
    tensors = adapters.factors(3)
    tensors[f"{Q}.lora_A.weight"] = torch.zeros(1).expand(50000, 50000)
    torch.save(tensors, folder / "adapter_model.bin")


def pickle_with_code(folder: Path) -> None:
    adapters.write_lora(folder, adapters.factors(3))
    (folder / "adapter_model.safetensors").unlink()
    torch.save({f"{Q}.lora_A.weight": Runs(folder / "it-ran")}, folder / "adapter_model.bin")


def bare_pickle(folder: Path) -> None:
    folder.mkdir()
    (folder / "adapter.pt").write_bytes(pickle.dumps(Runs(folder / "it-ran")))


def unknown_type(folder: Path) -> None:
    adapters.write_lora(folder, adapters.factors(3), peft_type="NEW")


def unknown_variant(folder: Path) -> None:
    adapters.write_lora(folder, adapters.factors(3), layer_replication=[[0, 2], [1, 3]])


def begun_with_pissa(folder: Path) -> None:
    adapters.write_lora(folder, adapters.factors(3), init_lora_weights="pissa_niter_16")


def empty_folder(folder: Path) -> None:
    folder.mkdir()


def only_a_config(folder: Path) -> None:
    adapters.write_lora(folder, adapters.factors(3))
    (folder / "adapter_model.safetensors").unlink()


def pointer(folder: Path) -> None:
    adapters.write_lora(folder, adapters.factors(3))
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 14700000\n"
    (folder / "adapter_model.safetensors").write_text(text)


def config_is_no_json(folder: Path) -> None:
    adapters.write_lora(folder, adapters.factors(3))
    (folder / "adapter_config.json").write_text("{'r': 8}")


def pattern_that_never_ends(folder: Path) -> None:
    adapters.write_lora(folder, adapters.factors(3), rank_pattern={r"((a+)+)+\.q_proj": 4})


def index_leads_outside(folder: Path) -> None:
    folder.mkdir()
    index = {"weight_map": {"transformer.prefix_encoder.embedding.weight": "../../secret.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def a_whole_model(folder: Path) -> None:
    folder.mkdir()
    save_file({"model.embed_tokens.weight": torch.ones(272, 64)}, folder / "model.safetensors")


def other_vocabulary(folder: Path) -> None:
    tensors = adapters.factors(3)
    tensors["base_model.model.lm_head.weight"] = torch.ones(300, 64)
    adapters.write_lora(folder, tensors, modules_to_save=["lm_head"])


def words_added(folder: Path) -> None:
    tensors = adapters.factors(3)
    tensors |= {f"base_model.model.model.embed_tokens.lora_embedding_{x}": torch.ones(s) for x, s in
                (("A", (4, 280)), ("B", (64, 4)))}  # fmt: skip
    adapters.write_lora(folder, tensors, target_modules=["q_proj", "embed_tokens"])


def one_end_of_two(folder: Path) -> None:
    tensors = {f"base_model.model.model.embed_tokens.lora_embedding_{x}": torch.ones(s) for x, s in
               (("A", (4, 272)), ("B", (64, 4)))}  # fmt: skip
    adapters.write_lora(folder, tensors, target_modules=["embed_tokens"], ensure_weight_tying=True)


def chatglm_prefix(folder: Path) -> None:
    folder.mkdir()
    tensors = {"transformer.prefix_encoder.embedding.weight": torch.ones(8, 3584)}
    torch.save(tensors, folder / "pytorch_model.bin")


def prefix_of_another_length(folder: Path) -> None:
    folder.mkdir()
    save_file({"prompt_embeddings": torch.ones(8, 192)}, folder / "adapter_model.safetensors")
    config = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 20}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def another_base(folder: Path) -> None:
    adapters.write_lora(folder, adapters.factors(3), base_model_name_or_path="someone/Tiny-9M-Instruct")


REFUSED: list[tuple[Callable[[Path], None], int, str]] = [
    (other_family, 2, "belong to no layer of this model"),
    (other_width, 2, r"of \[128, 128\], but in this model it is \[64, 64\]"),
    (more_layers, 2, "belong to no layer of this model"),
    (fewer_layers, 3, "nothing for 1 of the 3 layers"),
    (wrong_rank, 3, "gives rank 8, but .* has 4"),
    (absurd_rank, 3, "r is 1000000000000"),
    (ranks_apart, 3, "cannot be multiplied"),
    (missing_b, 3, "lacks its lora_B"),
    (not_a_number, 3, "not finite"),
    (cut_off, 3, "truncated or damaged: it"),
    (claims_ten_gigabytes, 3, "truncated or damaged: "),
    (stretched_storage, 3, "a tensor has an impossible shape|beyond its storage"),
    (pickle_with_code, 3, "contains more than tensors"),
    (bare_pickle, 3, "adapter.pt"),
    (unknown_type, 2, "'NEW', which glmchat does not support"),
    (unknown_variant, 2, "layer_replication"),
    (begun_with_pissa, 2, "changes the base model"),
    (empty_folder, 2, "contains no adapter"),
    (only_a_config, 2, "there are no weights"),
    (pointer, 3, "git-lfs pointer"),
    (config_is_no_json, 3, "not JSON"),
    (pattern_that_never_ends, 3, "rank_pattern is"),
    (index_leads_outside, 3, "names the file"),
    (a_whole_model, 2, "none of its 1 tensors"),
    (other_vocabulary, 2, "lm_head: it was trained with 300 words, but this model has 272"),
    (words_added, 2, "embed_tokens: it was trained with 280 words, but this model has 272"),
    (one_end_of_two, 3, "ensure_weight_tying, but the adapter contains a change of model.embed_tokens alone"),
    (chatglm_prefix, 2, "a P-Tuning prefix for ChatGLM"),
    (prefix_of_another_length, 3, "gives 20 virtual tokens, but the file contains 8"),
    (another_base, 2, "trained on someone/Tiny-9M-Instruct, but this model is tiny-7M"),
]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, builders: ModuleType) -> Engine:
    folder = builders.write_folder(tmp_path_factory.mktemp("base") / "tiny-7M")
    return Engine.load(folder, threads=1, dtype="float32")


@pytest.mark.parametrize(("make", "code", "reason"), REFUSED, ids=[make.__name__ for make, _, _ in REFUSED])
def test_it_is_refused_with_its_reason_and_the_model_still_answers(
    engine: Engine, tmp_path: Path, make: Callable[[Path], None], code: int, reason: str
) -> None:
    make(tmp_path / "adapter")
    before, memory = engine.logits(IDS), engine.memory()
    started = time.process_time()
    with pytest.raises(GlmchatError, match=reason) as caught:
        engine.attach(tmp_path / "adapter", "bad")
    assert time.process_time() - started < 1.0
    assert (caught.value.exit, bool(caught.value.hint)) == (code, True)
    assert not (tmp_path / "adapter" / "it-ran").exists()
    assert engine.memory() == memory
    assert torch.equal(engine.logits(IDS), before)
    with pytest.raises(Usage, match="no adapter is attached as 'bad'"):
        engine.activate({"bad": 1.0})


def test_a_refusal_leaves_the_active_adapter_as_it_was(engine: Engine, tmp_path: Path) -> None:
    adapters.write_lora(tmp_path / "good", adapters.factors(3))
    not_a_number(tmp_path / "bad")
    engine.attach(tmp_path / "good", "good")
    engine.activate({"good": 1.0})
    spoken = engine.logits(IDS)
    for name in ("good", "other"):
        with pytest.raises(GlmchatError):
            engine.attach(tmp_path / "bad", name)
        assert torch.equal(engine.logits(IDS), spoken)
    engine.detach("good")


def test_another_base_is_attached_by_force_and_says_so(engine: Engine, tmp_path: Path) -> None:
    another_base(tmp_path / "adapter")
    assert engine.attach(tmp_path / "adapter", "forced", force=True).forced
    engine.detach("forced")


def test_the_medical_lora_of_smollm_is_refused_on_smollm2_by_name(shared: Path, starter_model: Path) -> None:
    folder = shared / "adapters" / "smollm-135m-instruct-medical-lora"
    engine = Engine.load(starter_model, threads=1)
    with pytest.raises(Usage) as caught:
        engine.attach(folder, "medical")
    assert "was trained on HuggingFaceTB/SmolLM-135M-Instruct" in caught.value.message
    assert "this model is SmolLM2-135M-Instruct" in caught.value.message
    assert "--force" in caught.value.hint
    assert engine.attach(folder, "medical", force=True).forced


@pytest.mark.usefixtures("adds_here")
@pytest.mark.parametrize("make", [wrong_rank, ranks_apart, missing_b, stretched_storage, not_a_number])
def test_what_no_model_could_take_never_comes_into_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], None]
) -> None:
    monkeypatch.setenv("GLMCHAT_HOME", str(tmp_path / "home"))
    make(tmp_path / "adapter")
    with pytest.raises(Damaged):
        add(str(tmp_path / "adapter"))
    assert list_adapters() == []


@pytest.mark.parametrize(
    ("recorded", "here", "apart"),
    [
        ("THUDM/chatglm-6b", ["zai-org/chatglm-6b"], False),
        ("/root/autodl-tmp/models/ChatGLM2-6B", ["THUDM/chatglm2-6b-int4"], False),
        ("models/chatglm-6b", ["THUDM/chatglm2-6b"], True),
        ("./glm_models", ["THUDM/chatglm-6b"], False),
        ("THUDM/chatglm-6b", ["my-folder"], False),
        ("../../Llama2-7b-chat/", ["meta-llama/Llama-2-7b-chat-hf"], False),
        ("HuggingFaceTB/SmolLM-135M-Instruct", ["SmolLM2-135M-Instruct.Q4_1.gguf"], True),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", ["SmolLM2-135M-Instruct.Q4_1.gguf"], False),
        ("unsloth/Qwen2.5-7B-Instruct-bnb-4bit", ["Qwen/Qwen2.5-7B-Instruct"], False),
    ],
)
def test_names_tell_models_apart_only_where_both_say_something(recorded: str, here: list[str], apart: bool) -> None:
    assert (other_model(recorded, here) is not None) is apart


def test_a_name_is_compared_without_owner_storage_and_punctuation() -> None:
    assert canonical("THUDM/chatglm-6b-int4") == canonical("C:\\models\\ChatGLM_6B") == "chatglm6b"
