"""Whether a setting of a config.json is one that its type has: judged without transformers as transformers judges it.

Which networks go on with a text is tested in tests/cli/test_refusals.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from glmchat.checkpoints.architectures import refuse_settings
from glmchat.core.errors import Damaged

KINDS = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "glm", "glm4", "phi3", "gemma2", "gemma3_text", "mixtral",
         "gpt_neox", "falcon", "cohere2", "smollm3", "lfm2", "qwen2_moe", "gpt_oss")  # fmt: skip
VALUES: tuple[Any, ...] = ("x", 1.5, True, None, [], [1], ["x"], {"a": 1}, 3, 0.5)
# Told by the network itself, not by its settings: an activation, a window and the row for padding are found when it is
# built or computes. test_values_that_break_the_network_are_refused has those.
LATER = ("hidden_act", "hidden_activation", "activation_function", "sliding_window", "pad_token_id", "vocab_size",
         "hidden_size", "num_attention_heads")  # fmt: skip


def is_taken(settings: Mapping[str, Any]) -> bool:
    try:
        refuse_settings(settings)
    except Damaged as error:
        assert error.code == "config.absurd" and error.hint and "in the model's configuration" in error.message
        return False
    return True


@pytest.mark.parametrize("kind", KINDS)
def test_each_setting_of_a_type_is_taken_or_refused_as_transformers_does(kind: str) -> None:
    from transformers import AutoConfig

    def is_taken_there(settings: Mapping[str, Any]) -> bool:
        try:
            AutoConfig.for_model(kind, **json.loads(json.dumps(settings)))
        except Exception:
            return False
        return True

    made = AutoConfig.for_model(kind)
    usual = json.loads(json.dumps({k: v for k, v in made.to_dict().items() if k not in ("dtype", "model_type")}))
    assert is_taken({**usual, "model_type": kind})
    fields = [
        name for name in type(made).__dataclass_fields__ if name in vars(type(made).__mro__[0])["__annotations__"]
    ]
    assert len(fields) > 10
    wrong = []
    for name in fields:
        for value in VALUES if name not in LATER else ("x", 1.5, True, [], {"a": 1}):
            if name in LATER and isinstance(value, str) and "act" in name:
                continue
            settings = {**usual, name: value}
            if is_taken({**settings, "model_type": kind}) != is_taken_there(settings):
                wrong.append((name, value))
    assert not wrong


@pytest.mark.parametrize(
    "change",
    [{"hidden_act": "nonsense"}, {"hidden_act": ""}, {"pad_token_id": 64}, {"pad_token_id": -65}, {"dtype": "bf16"},
     {"torch_dtype": "int8"}, {"layer_types": ["sliding_attention"] * 2, "sliding_window": None},
     {"rope_scaling": {"type": "nonsense"}}, {"rope_scaling": {"rope_type": "dynamic"}}, {"sliding_window": 0},
     {"sliding_window": -4}],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["mistral", "qwen2_moe", "phi3"])
def test_values_that_break_the_network_are_refused(kind: str, change: Mapping[str, Any]) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    small = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "pad_token_id": None,
             "num_attention_heads": 2, "num_key_value_heads": 2, "use_sliding_window": True, "num_experts": 2,
             "num_experts_per_tok": 1, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
             "max_window_layers": 2, "original_max_position_embeddings": 64}  # fmt: skip
    settings = {**small, **change}
    with pytest.raises(Exception, match=r".*"):  # each breaks in a way of its own
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
        model.generate(torch.arange(8)[None], max_new_tokens=4, eos_token_id=None)
    assert is_taken({**small, "model_type": kind}) and not is_taken({**settings, "model_type": kind})


def test_settings_inside_those_of_a_model_that_also_sees_are_looked_at_too() -> None:
    inner = {"model_type": "gemma3_text", "hidden_activation": "gelu_pytorch_tanh"}
    assert is_taken({"model_type": "gemma3", "text_config": inner})
    assert not is_taken({"model_type": "gemma3", "text_config": {**inner, "hidden_activation": "nonsense"}})
