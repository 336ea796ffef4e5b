"""Configurations of transformers' own kinds: measures, or one line, never a raw exception."""

from __future__ import annotations

import json

import pytest
from transformers import AutoConfig

from glmchat.core.errors import Damaged
from glmchat.engine.models.transformers import parse


@pytest.mark.parametrize("kind", ["gemma4_text", "gemma3n_text", "gemma3_text", "phi3", "mamba"])
def test_layers_of_different_sizes_have_measures(kind: str) -> None:
    config = json.loads(AutoConfig.for_model(kind).to_json_string(use_diff=False))
    spec = parse({**config, "model_type": kind})
    assert spec.layers == config["num_hidden_layers"]
    assert spec.ffn_size > 0


@pytest.mark.parametrize("kind", ["deepseek_v4", "musicgen"])
def test_what_transformers_cannot_describe_is_one_line(kind: str) -> None:
    config = json.loads(AutoConfig.for_model(kind).to_json_string(use_diff=False))
    with pytest.raises(Damaged, match=f"does not describe a {kind} model") as caught:
        parse({**config, "model_type": kind})
    assert "\n" not in caught.value.message
