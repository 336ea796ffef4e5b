"""What tiny checkpoints of every family answer: ids and logits as they were, on other processors too."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from glmchat.engine import Engine, Sampling

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "benchmarks"), str(ROOT / "tests" / "engine")]

import engine_builders as llamas  # noqa: E402
import random_checkpoints as originals  # noqa: E402
from golden_files import Golden  # noqa: E402

PROMPT = (5, 9, 17, 200, 33, 7, 150)
STEPS = 12
TOP = 5
POSITIONS = (-1, 4)
GREEDY = Sampling(temperature=0, max_tokens=STEPS, ignore_eos=True)
SAMPLED = Sampling(temperature=1.6, top_k=40, top_p=0.95, repetition_penalty=1.1, max_tokens=STEPS, ignore_eos=True)
# Sums are taken in another order on another processor; a packed matrix meets activations that are rounded to 16 bits
# on some and are floats on others.
CLOSE = {False: 2e-3, True: 1e-2}  # of logits between 2 and 15
FOREIGN = 5e-2  # where the C kernel was not built: torch's operators round the activations to bfloat16
STEADY = {False: (1e-2, 3e-4), True: (2e-2, 1e-3)}  # a greedy lead below the first is no record; noise a draw survives

_V1 = {"hidden_size": 64, "inner_hidden_size": 96}
_V2 = {"padded_vocab_size": 400, "hidden_size": 64, "ffn_hidden_size": 96, "kv_channels": 16}
_ORIGINALS: dict[str, tuple[str, dict[str, Any]]] = {
    "chatglm-early": ("chatglm-6b-early", _V1),
    "chatglm": ("chatglm-6b", _V1),
    "chatglm2": ("chatglm2-6b", _V2),
    "chatglm3": ("chatglm3-6b", _V2),
    "glm4": ("glm-4-9b-chat", _V2),
    "gpt2": ("cpm-gpt2", {"vocab_size": 300, "n_embd": 64, "n_head": 4}),
}
_LLAMAS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
    "qwen3": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 16},
}
NAMES = (*_ORIGINALS, *_LLAMAS, "gguf", "fallback")


def prompt_of(name: str) -> list[int]:
    """ChatGLM-6B reads up to its mask and begins behind it."""
    if name == "chatglm-early":
        return [*PROMPT, 150001, 150004]
    return [*PROMPT, 130001, 130004] if name == "chatglm" else list(PROMPT)


def build(name: str, folder: Path) -> Path:
    if name in _ORIGINALS:
        config, changes = _ORIGINALS[name]
        originals.write_checkpoint(folder, originals.tiny(config, **changes), dtype=torch.float32)
        return folder
    if name in _LLAMAS:
        return llamas.write_folder(folder, **_LLAMAS[name])
    if name == "gguf":
        folder.mkdir()
        return llamas.write_gguf(folder / "tiny.gguf", "Q4_0")
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=272, max_position_embeddings=256, **sizes))
    noise = torch.Generator().manual_seed(11)
    for label, parameter in sorted(model.named_parameters()):
        drawn = 0.2 * torch.randn(parameter.shape, generator=noise)
        parameter.data = 1 + drawn if "norm.weight" in label else drawn
    model.save_pretrained(folder)
    return folder


def margins(rows: torch.Tensor) -> list[float]:
    """By how much the likeliest id of each row leads the next one."""
    best = rows.topk(2).values
    return (best[:, 0] - best[:, 1]).tolist()


def is_steady(engine: Engine, ids: list[int], said: list[int], sampling: Sampling, noise: float) -> bool:
    """The draws would come out the same with logits that are off by `noise`."""
    rows = engine.logits([*ids, *said])[len(ids) - 1 : -1]
    for seed in range(4):
        off = torch.randn(rows.shape, generator=torch.Generator().manual_seed(seed)) * noise
        choose = engine.sampler(sampling, sampling.seed or 0, ids)
        if [choose(row) for row in rows + off] != said:
            return False
    return True


def record(engine: Engine, ids: list[int], margin: float, noise: float) -> dict[str, Any]:
    """Greedy ids up to the first close choice, sampled ids of a seed whose draws are not close, and top logits."""
    said = list(engine.generate(ids, GREEDY))
    lead = margins(engine.logits([*ids, *said])[len(ids) - 1 : -1])
    clear = next((step for step, ahead in enumerate(lead) if ahead < margin), len(said))
    for seed in range(1, 100):
        sampling = replace(SAMPLED, seed=seed)
        drawn = list(engine.generate(ids, sampling))
        if is_steady(engine, ids, drawn, sampling, noise):
            break
    else:
        raise AssertionError("every seed has a close draw")
    rows = engine.logits(ids)
    top = [{str(int(i)): round(float(rows[at][i]), 3) for i in rows[at].topk(TOP).indices} for at in POSITIONS]
    return {"greedy": said[:clear], "seed": seed, "sampled": drawn, "top": top}


@pytest.mark.parametrize("name", NAMES)
def test_a_tiny_checkpoint_answers_what_it_answered(golden: Golden, name: str, tmp_path: Path) -> None:
    folder, ids, file = build(name, tmp_path / name), prompt_of(name), f"answers/{name}.json"
    quants = (None,) if name in ("gguf", "fallback") else (None, 8, 4)
    engines = {str(quant): Engine.load(folder, quant=quant, dtype="float32", threads=1) for quant in quants}
    if golden.writing:
        golden.write(file, {q: record(engine, ids, *STEADY[packed(name, q)]) for q, engine in engines.items()})
    expected = golden.read(file)
    assert expected.keys() == engines.keys()
    for quant, then in expected.items():
        engine, close = engines[quant], CLOSE[packed(name, quant)]
        foreign = packed(name, quant) and not engine.facts()["kernel"].startswith("native")
        said = list(engine.generate(ids, replace(GREEDY, max_tokens=STEPS)))
        assert said[: len(then["greedy"])] == then["greedy"], (quant, "greedy")
        if not foreign:
            drawn = list(engine.generate(ids, replace(SAMPLED, seed=then["seed"])))
            assert drawn == then["sampled"], (quant, "sampled")
        rows = engine.logits(ids)
        for at, logits in zip(POSITIONS, then["top"], strict=True):
            for i, logit in logits.items():
                assert abs(float(rows[at][int(i)]) - logit) < (FOREIGN if foreign else close), (quant, at, i)


def packed(name: str, quant: str) -> bool:
    return name == "gguf" or quant != "None"


def test_the_records_say_enough_to_tell_two_models_apart(golden: Golden) -> None:
    for name in NAMES:
        for quant, then in golden.read(f"answers/{name}.json").items():
            assert len(then["sampled"]) == STEPS and len(set(then["sampled"])) > 1, (name, quant)
            assert then["greedy"] or quant == "4", (name, quant)
