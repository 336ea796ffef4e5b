"""Every scaling of rotary positions gives transformers' numbers, from folders and GGUF files, across its switches."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers

from glmchat.core.errors import Damaged
from glmchat.core.messages import Sampling
from glmchat.engine import Engine

IDS = [(7 * n) % 260 + 3 for n in range(150)]
SMALL: dict[str, Any] = {
    "vocab_size": 272, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2,
    "eos_token_id": None,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
NATIVE = {
    "yarn": ("Llama", YARN),
    "yarn of Qwen2": ("Qwen2", YARN),
    "yarn of Qwen3": ("Qwen3", {**YARN, "rope_theta": 1e6}),
    "yarn with its betas": ("Llama", {**YARN, "beta_fast": 16.0, "beta_slow": 2.0}),
    "yarn without whole dimensions": ("Llama", {**YARN, "truncate": False}),
    "yarn with a factor of attention": ("Llama", {**YARN, "attention_factor": 0.8}),
    "yarn with two scales": ("Llama", {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3}),
    "yarn without its original length": ("Llama", {k: v for k, v in YARN.items() if not k.startswith("original")}),
    "linear": ("Mistral", {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}),
}


def saved(folder: Path, name: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**{**SMALL, **changes}))
    model.eval().save_pretrained(folder)
    return model


@pytest.mark.parametrize("case", NATIVE)
def test_logits_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    name, rope = NATIVE[case]
    twin = saved(tmp_path, name, rope_parameters=rope, **({"sliding_window": None} if name == "Mistral" else {}))
    engine = Engine.load(tmp_path, dtype="float32", threads=1)
    assert engine.family == "llama"
    with torch.no_grad():
        assert (engine.logits(IDS) - twin(torch.tensor([IDS])).logits[0]).abs().max() < 1e-4
    answer = list(engine.generate(IDS[:60], Sampling(temperature=0, max_tokens=12, ignore_eos=True)))
    with torch.no_grad():
        rows = twin(torch.tensor([[*IDS[:60], *answer]])).logits[0]
    assert answer == rows[59:-1].argmax(-1).tolist()


SWITCHING: dict[str, tuple[str, dict[str, Any]]] = {
    "longrope": ("Phi3", {
        "original_max_position_embeddings": 64, "pad_token_id": 0, "sliding_window": None,
        "rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8,
                            "long_factor": [1.0 + n for n in range(8)], "original_max_position_embeddings": 64},
    }),
    "dynamic": ("Llama", {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0,
                            "original_max_position_embeddings": 64},
    }),
}  # fmt: skip


@pytest.mark.parametrize("case", SWITCHING)
@pytest.mark.parametrize("prompt", [40, 62, 64, 65, 70])
def test_an_answer_that_grows_beyond_the_first_context_is_that_of_transformers(
    case: str, prompt: int, tmp_path: Path
) -> None:
    name, changes = SWITCHING[case]
    saved(tmp_path, name, **changes)
    engine = Engine.load(tmp_path, dtype="float32", threads=1, context=200)

    def both(ids: list[int]) -> tuple[list[int], list[int]]:
        mine = list(engine.generate(ids, Sampling(temperature=0, max_tokens=40, ignore_eos=True)))
        twin = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)  # its frequencies remember the last text
        text = torch.tensor([ids])
        with torch.no_grad():
            if case == "dynamic":  # each token is rotated once, by the length of the text when it came
                return mine, twin.generate(text, do_sample=False, max_new_tokens=40)[0].tolist()[len(ids) :]
            for _ in range(40):  # the whole text is rotated by its length
                text = torch.cat((text, twin(text, use_cache=False).logits[:, -1:].argmax(-1)), 1)
        return mine, text[0].tolist()[len(ids) :]

    mine, theirs = both(IDS[:prompt])
    assert mine == theirs
    mine, theirs = both([*IDS[:prompt], *mine[:30], 5, 6])  # a second turn finds the cache of the first
    assert mine == theirs
    mine, theirs = both(IDS[:20])  # and a short text behind a long one
    assert mine == theirs


SCALED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "yarn": (
        {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 64},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    ),
    "yarn with its betas": (
        {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 64,
         "scaling.yarn_beta_fast": 16.0, "scaling.yarn_beta_slow": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16.0,
         "beta_slow": 2.0},
    ),
    "linear": ({"scaling.type": "linear", "scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    "a factor alone": ({"scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    "the old key": ({"scale_linear": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    "none, whatever the factor": ({"scaling.type": "none", "scaling.factor": 4.0}, {"rope_type": "default"}),
    "linear without a factor": ({"scaling.type": "linear"}, {"rope_type": "default"}),
}  # fmt: skip


@pytest.mark.parametrize("case", SCALED)
def test_a_scaling_in_gguf_is_what_the_folder_form_says(case: str, tmp_path: Path, builders: ModuleType) -> None:
    fields, rope = SCALED[case]
    folder = builders.write_folder(tmp_path / "f", rope_parameters={**rope, "rope_theta": 10000.0})
    twin = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    file = builders.write_gguf(tmp_path / "t.gguf", **{f"llama.rope.{key}": value for key, value in fields.items()})
    with torch.no_grad():
        expected = twin(torch.tensor([IDS])).logits[0]
    assert (Engine.load(file, dtype="float32", threads=1).logits(IDS) - expected).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"llama.rope.scaling.type": "longrope"}, "t.gguf contains the rope scaling longrope"),
        ({"llama.expert_count": 8}, "t.gguf contains a mixture of experts"),
    ],
)
def test_what_gguf_says_and_nobody_reads_is_named_as_gguf(
    fields: dict[str, Any], reason: str, tmp_path: Path, builders: ModuleType
) -> None:
    with pytest.raises(Damaged, match=reason) as caught:
        Engine.load(builders.write_gguf(tmp_path / "t.gguf", **fields))
    assert "config.json" not in caught.value.message
    assert "Hugging Face folder" in (caught.value.hint or "")
