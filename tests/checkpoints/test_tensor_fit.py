"""A configuration that contradicts the tensors is refused where transformers finds other shapes or none, by its own
networks; without torch, in the same words before an engine starts and by the engine.

Covers checkpoints/layer_shapes.py, checkpoints/transformers_text.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import odd_models
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from glmchat.checkpoints.fit import check_folder, check_weights
from glmchat.checkpoints.tensor_fit import refuse_misfit
from glmchat.core.errors import Damaged
from glmchat.engine import Engine

SMALL: Mapping[str, Any] = {
    "vocab_size": 272, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "pad_token_id": 0,
}  # fmt: skip
NATIVE = ("llama", "qwen2", "qwen3", "glm", "glm4", "gpt2")
_GPT: Mapping[str, Any] = {
    **dict.fromkeys(SMALL), "vocab_size": 272, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64,
    "n_inner": 96,
}  # fmt: skip
KINDS: Mapping[str, Mapping[str, Any]] = {
    **{kind: {} for kind in NATIVE[:-1]},
    "gpt2": _GPT,
    **{kind: {} for kind in ("gemma", "gemma2", "gemma3_text", "phi3", "olmo2", "granite", "cohere2", "smollm3")},
    **{kind: {} for kind in ("stablelm", "starcoder2", "exaone4", "gpt_neox", "phi", "nemotron")},
    **{kind: {"head_dim": None} for kind in ("bloom", "falcon")},
    "mistral with a window": {"model_type": "mistral", "sliding_window": 8},
    "mixtral": {"num_local_experts": 2},
    "qwen3_moe": {"num_experts": 2, "moe_intermediate_size": 32},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64, "max_position_embeddings": 256},
    "openai-gpt": _GPT,
    "gpt2 through transformers": {**_GPT, "model_type": "gpt2", "activation_function": "relu"},
}
MEASURES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "ffn_dim", "word_embed_proj_dim", "n_embd", "n_layer", "n_head",
            "n_inner", "n_positions")  # fmt: skip
LAYERS = ("num_hidden_layers", "n_layer")
# Of matrices that transformers puts together from the file's, and of layers whose class is handed a width: the engine
# alone tells those.
LATER = {"mixtral": ("intermediate_size",), "gpt2 through transformers": ("n_inner",)}


def tensors_of(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """What transformers makes of settings: config.json, and every tensor of its network that a file would hold."""
    kind = str(settings["model_type"])
    made = AutoConfig.for_model(kind, **{key: value for key, value in settings.items() if key != "model_type"})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(made)
    tied = model.all_tied_weights_keys
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
    return {**json.loads(made.to_json_string()), "model_type": kind}, shapes


@pytest.mark.parametrize("case", ["mixtral", "gpt2 through transformers"])
def test_what_only_the_network_itself_tells_is_refused_by_the_engine_in_the_same_words(
    case: str, tmp_path: Path
) -> None:
    given = {"model_type": case, **SMALL, **KINDS[case]}
    config, stored = tensors_of({key: value for key, value in given.items() if value is not None})
    odd_models.tensors(tmp_path / "model.safetensors", stored)
    changed = {**config, LATER[case][0]: 48}
    odd_models.write(tmp_path, {"config.json": changed, "tokenizer.json": odd_models.TOKENIZER})
    with pytest.raises(Damaged, match="tensors have a different shape: ") as caught:
        Engine.load(tmp_path)
    assert caught.value.code == "weights.names" and "\n" not in caught.value.message


@pytest.mark.parametrize("case", KINDS)
def test_a_measure_is_refused_exactly_where_transformers_network_has_other_tensors(case: str) -> None:
    settings = {key: value for key, value in {"model_type": case, **SMALL, **KINDS[case]}.items() if value is not None}
    config, stored = tensors_of(settings)
    refuse_misfit(config, stored)
    wrong, seen = [], 0
    for name in MEASURES:
        if not isinstance(value := config.get(name), int) or name in LATER.get(case, ()):
            continue
        for other in (value * 2, value // 2):
            changed = {**config, name: other}
            try:
                _, right = tensors_of(changed)
            except Exception:
                continue  # settings that transformers itself does not take
            contradicts = any(stored.get(key) != shape for key, shape in right.items())
            left_over = name in LAYERS and other < value  # of which transformers loads the first layers
            try:
                refuse_misfit(changed, stored)
            except Damaged as error:
                seen += 1
                assert error.code == "weights.names" and error.exit == 3 and error.hint and "\n" not in error.message
                if not contradicts and not (left_over and case in NATIVE):
                    wrong.append(f"{name} {other} is refused: {error.message}")
            else:
                if contradicts or (left_over and case in NATIVE):
                    wrong.append(f"{name} {other} is taken")
    assert not wrong
    assert seen >= 4


CONTRADICTIONS: Mapping[str, dict[str, Any]] = {
    "heads too narrow": {"head_dim": 8},
    "heads too wide": {"head_dim": 64},
    "too many heads": {"num_attention_heads": 8, "head_dim": 16},
    "too few heads": {"num_attention_heads": 2, "head_dim": 16},
    "too many key heads": {"num_key_value_heads": 4},
    "too few key heads": {"num_key_value_heads": 1},
    "a wide middle": {"intermediate_size": 192},
    "a narrow middle": {"intermediate_size": 48},
    "too wide": {"hidden_size": 128, "head_dim": 16},
    "too narrow": {"hidden_size": 32, "head_dim": 16},
    "words too many": {"vocab_size": 400},
    "words too few": {"vocab_size": 200},
    "layers too many": {"num_hidden_layers": 3},
}


@pytest.mark.parametrize("kind", ["llama", "gemma"])
@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_the_check_before_a_start_and_the_engine_say_the_same_of_a_contradiction(
    case: str, kind: str, tmp_path: Path
) -> None:
    folder = odd_models.llama(tmp_path, model_type=kind, **{"head_dim": 16, **CONTRADICTIONS[case]})
    with pytest.raises(Damaged) as before:
        check_folder(folder)
    with pytest.raises(Damaged) as engine:
        Engine.load(folder)
    assert before.value.code == engine.value.code == "weights.names"
    assert (before.value.message, before.value.hint) == (engine.value.message, engine.value.hint)
    assert f"do not fit a {kind} model of this size" in before.value.message


def test_a_contradiction_is_told_without_torch(tmp_path: Path) -> None:
    folder = odd_models.llama(tmp_path, model_type="gemma", head_dim=32)
    code = (
        "import sys; from pathlib import Path; from glmchat.checkpoints.fit import check_folder\n"
        "from glmchat.core.errors import Damaged\n"
        "try:\n    check_folder(Path(sys.argv[1]))\n"
        "except Damaged:\n    sys.exit(4 if {'torch', 'transformers'} & set(sys.modules) else 0)\n"
        "sys.exit(5)\n"
    )
    assert subprocess.run([sys.executable, "-P", "-c", code, str(folder)], check=False).returncode == 0


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_work_that_only_loads_weights_says_it_before_torch_too(kind: str, tmp_path: Path) -> None:
    folder = odd_models.llama(tmp_path, model_type=kind, head_dim=16, num_hidden_layers=3)
    with pytest.raises(Damaged, match=r"9 tensors are missing: model\.layers\.2\.input_layernorm\.weight") as caught:
        check_weights(folder)
    assert caught.value.code == "weights.names"


_EVERY_MEASURE = """
import json, resource, sys, time
resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))
from glmchat.checkpoints.layer_shapes import layer_shapes
from glmchat.checkpoints.transformers_text import fields_of
for kind in json.load(sys.stdin):
    for name in fields_of(kind):
        for value in (10**9, "%999999999d"):
            started = time.process_time()
            layer_shapes({"model_type": kind, name: value})
            if time.process_time() - started > 1:
                print(kind, name, value)
"""


def test_no_number_or_text_of_a_configuration_makes_the_comparison_long() -> None:
    kinds = json.dumps(list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    done = subprocess.run(
        [sys.executable, "-P", "-c", _EVERY_MEASURE], input=kinds, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
