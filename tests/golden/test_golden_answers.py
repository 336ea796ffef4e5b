"""What tiny checkpoints of every family answer: ids and logits as they were, on other processors too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_files import Golden
from tiny_checkpoints import NAMES, build, prompt_of

from glmchat.engine import Engine, Sampling

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
