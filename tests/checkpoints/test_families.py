"""What `show` says of a network is what the engine builds, for every family it counts."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from glmchat.checkpoints.architectures import refuse_no_generator
from glmchat.checkpoints.families import describe, describe_config, has_experts, is_quantisable
from glmchat.checkpoints.fit import check_folder
from glmchat.core.errors import Usage

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def full_size() -> ModuleType:
    spec = importlib.util.spec_from_file_location("full_size_configs", ROOT / "benchmarks" / "random_checkpoints.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


NAMES = ["chatglm-6b-early", "chatglm-6b", "chatglm2-6b", "chatglm3-6b", "glm-4-9b-chat", "cpm-gpt2"]


@pytest.mark.parametrize("changes", [{}, {"pre_seq_len": 128}])
@pytest.mark.parametrize("name", NAMES)
def test_show_and_the_engine_agree(name: str, changes: dict[str, int], full_size: ModuleType) -> None:
    import torch

    from glmchat.engine.families import family_of

    config = {**full_size.CONFIGS[name], **({} if name == "cpm-gpt2" else changes)}
    family, spec = family_of(config)
    with torch.device("meta"):
        model = family.build(spec)
    said = describe_config(config)
    assert said is not None
    assert said.parameters == sum(p.numel() for p in model.parameters())
    assert (said.family, said.generation) == (spec.family, spec.generation)
    assert (said.layers, said.heads, said.kv_heads) == (spec.layers, spec.heads, spec.kv_heads)
    assert (said.vocabulary, said.context) == (spec.vocab_size, spec.context)
    assert said.memory is not None
    prefix = sum(p.numel() for name, p in model.named_parameters() if "prefix_encoder" in name)
    assert said.memory["float16"] == 2 * (said.parameters + prefix)  # the prefix stays in float32
    assert said.memory["float16"] > said.memory["int8"] > said.memory["int4"]


def test_code_that_config_json_points_at_is_named_as_ignored(tmp_path: Path) -> None:
    config = {"model_type": "chatglm", "auto_map": {"AutoModel": "modeling_chatglm.ChatGLM", "X": ["a.b", None]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    said = describe(tmp_path)
    assert said is not None
    assert said.ignored_code == ("a.py", "modeling_chatglm.py")
    assert said.layers == 28  # what the first generation's code takes where its configuration is silent
    json.dumps(said.to_json())


@pytest.mark.parametrize("config", [{}, {"model_type": 7}, {"hidden_size": "x"}])
def test_a_config_that_names_no_network_is_not_described(config: dict[str, object]) -> None:
    assert describe_config(config) is None


def test_nonsense_in_a_config_is_left_out_and_never_raises() -> None:
    said = describe_config({"model_type": "chatglm", "hidden_size": -1, "num_layers": True, "auto_map": "x"})
    assert said is not None
    assert said.hidden_size is None
    assert said.layers is None


def test_describing_a_folder_loads_no_torch() -> None:
    code = "import sys, glmchat.checkpoints.families; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], cwd="/", check=False).returncode == 0


MIXTURES = [
    "Afmoe", "AriaText", "Dbrx", "DeepseekV2", "DeepseekV3", "Ernie4_5_Moe", "FlexOlmo", "Glm4Moe", "GptOss",
    "GraniteMoe", "Jamba", "JetMoe", "Lfm2Moe", "Llama4Text", "LongcatFlash", "MiniMax", "Mixtral", "NemotronH",
    "Olmoe", "Phimoe", "Qwen2Moe", "Qwen3_5Moe", "Qwen3Moe", "Qwen3Next",
]  # fmt: skip
DENSE = ["Gemma", "Gemma2", "Gemma3", "Gemma4Text", "Phi", "Phi3", "Mistral", "Cohere2", "Doge", "FalconMamba", "GPTJ"]


@pytest.mark.parametrize("name", [*MIXTURES, *DENSE])
def test_a_mixture_of_experts_is_told_from_its_configuration(name: str) -> None:
    import transformers

    config = getattr(transformers, f"{name}Config")().to_dict()
    assert has_experts(config) == (name in MIXTURES)
    assert is_quantisable(config) == (name not in MIXTURES)


@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm-roberta", "electra", "big_bird", "xlm", "xlnet"])
def test_an_encoder_is_refused_unless_it_says_that_it_is_a_decoder(kind: str, tmp_path: Path) -> None:
    config = {"model_type": kind, "hidden_size": 64, "vocab_size": 272}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(Usage, match=f"this {kind} model reads a text in both directions"):
        check_folder(tmp_path)
    refuse_no_generator({**config, "is_decoder": True}, natively=False)


def test_every_causal_type_of_transformers_is_taken_and_others_are_told_apart() -> None:
    """The tables that are read as text are those that transformers has once it is loaded."""
    from transformers.models.auto import modeling_auto as auto

    encoders = set(auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES)
    causal = set(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    for kind in causal:
        refuse_no_generator({"model_type": kind, "is_decoder": True}, natively=False)
    for kind in set(auto.MODEL_MAPPING_NAMES) - causal:
        with pytest.raises(Usage) as caught:
            refuse_no_generator({"model_type": kind}, natively=False)
        assert caught.value.code == ("model.encoder" if kind in encoders else "model.kind"), kind
