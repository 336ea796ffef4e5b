"""What `quantize` writes is read by transformers with the same logits, or it was said before that it is not.

Covers checkpoints/readers.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers

from glmchat.checkpoints.readers import readers_at, usual_readers
from glmchat.checkpoints.recipe import Recipe
from glmchat.cli.main import run
from glmchat.engine import Engine
from glmchat.engine.quantize.plan import QuantizePlan, plan_quantise
from glmchat.engine.quantize.quantiser import execute

# torch's four-bit product rounds activations, scales, minima and its sums to bfloat16, by 2**-9 at most each;
# transformers' reading rounds none of them. That bounds one product; of these whole networks the most seen is 4.8e-3.
BFLOAT16 = 4 * 2**-9
IDS = [1, 40, 77, 105, 9, 200, 31, 64, 12]
Make = Callable[[Path, ModuleType], Path]


def folder(**changes: Any) -> Make:
    return lambda path, builders: builders.write_folder(path / "source", **changes)


def gguf(kind: str, **kinds: str) -> Make:
    return lambda path, builders: builders.write_gguf(path / "source.gguf", kind, kinds=kinds)


def heavy_tailed(path: Path, builders: ModuleType) -> Path:
    """Weights of Student's t with 4 degrees of freedom: for each group of 32 some grid of its own fits better."""
    config = transformers.LlamaConfig(**{**builders.CONFIG, "intermediate_size": 128, "hidden_size": 128})
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    drawn = torch.distributions.StudentT(4.0)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data = 0.05 * drawn.sample(parameter.shape)
    model.save_pretrained(path / "source")
    return path / "source"


def by_transformers(name: str, **measures: Any) -> Make:
    def make(path: Path, builders: ModuleType) -> Path:
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(vocab_size=272, pad_token_id=0, **measures)
        model = getattr(transformers, "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")(config)
        model.save_pretrained(path / "source")
        return path / "source"

    return make


OLMO = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
# Source, how it is quantised, and why other programs do not read it as written ("": transformers and vLLM do).
CASES: dict[str, tuple[Make, dict[str, Any], str]] = {
    "dense": (folder(), {"bits": 4}, ""),
    "dense, 8 bits": (folder(), {"bits": 8}, "ends"),
    "dense, 8 bits, embedding as it is": (folder(), {"bits": 8, "ends": 0}, ""),
    "symmetric": (folder(), {"bits": 4, "symmetric": True}, ""),
    "two sizes of groups": (folder(intermediate_size=160), {"bits": 4}, ""),
    "a width that no group divides": (folder(intermediate_size=100), {"bits": 4}, ""),
    "another": (folder(intermediate_size=104, tie_word_embeddings=False), {"bits": 4}, ""),
    "no width that a group divides": (folder(hidden_size=48, intermediate_size=100), {"bits": 4}, "ends"),
    "groups of 32": (folder(), {"bits": 4, "group": 32}, ""),
    "weights that lie near grids": (heavy_tailed, {"bits": 4, "group": 32}, ""),
    "embedding in 8 bits": (folder(), {"bits": 4, "ends": 8}, "schemes ends"),
    "embedding in 8 bits, symmetric": (folder(), {"bits": 4, "ends": 8, "symmetric": True}, "schemes ends"),
    "embedding in 4 bits": (folder(tie_word_embeddings=False), {"bits": 4, "ends": 4}, "ends"),
    "GGUF of 16 bits": (gguf("F16"), {"bits": 4}, ""),
    "Q4_0": (gguf("Q4_0"), {"bits": 4}, "ends"),
    "Q4_0, dense embedding": (gguf("Q4_0", embed="F16"), {"bits": 4}, ""),
    "Q4_0, embedding Q8_0": (gguf("Q4_0", embed="Q8_0"), {"bits": 4}, "schemes ends"),
    "Q4_1": (gguf("Q4_1"), {"bits": 4}, "minima ends"),
    "Q4_1, embedding Q8_0": (gguf("Q4_1", embed="Q8_0"), {"bits": 4}, "minima schemes ends"),
    "Q4_0 and Q4_1": (gguf("Q4_0", down_proj="Q4_1", embed="F16"), {"bits": 4}, "minima schemes"),
    "Q4_0 and 16 bits": (gguf("Q4_0", down_proj="F16", embed="F16"), {"bits": 4}, "schemes"),
    "Q4_0 and 16 bits, symmetric": (gguf("Q4_0", down_proj="F16", embed="F16"), {"bits": 4, "symmetric": True}, ""),
    "Q8_0": (gguf("Q8_0"), {"bits": 8}, "ends"),
    "Q8_0 and 16 bits": (gguf("Q8_0", down_proj="F16", embed="F16"), {"bits": 8, "ends": 0}, "modules"),
    "GPT-2": (by_transformers("GPT2", n_embd=64, n_layer=2, n_head=4), {"bits": 4}, "layout minima schemes ends"),
    "OLMo hybrid": (by_transformers("OlmoHybrid", **OLMO), {"bits": 4}, "joined"),
}


def planned(case: str, path: Path, builders: ModuleType) -> QuantizePlan:
    make, recipe, _ = CASES[case]
    return plan_quantise(make(path, builders), path / "out", Recipe(**recipe))


def difference(out: Path) -> float:
    """Between transformers' logits and ours, of the largest; infinite where transformers cannot load the folder."""
    ours = Engine.load(out, dtype="float32", threads=1).logits(IDS)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, local_files_only=True)
        with torch.inference_mode():
            theirs = model.eval()(torch.tensor([IDS])).logits[0]
    except (RuntimeError, AttributeError, ValueError, KeyError):
        return float("inf")
    return float((ours - theirs).abs().max() / ours.abs().max())


@pytest.mark.parametrize("case", CASES)
def test_transformers_reads_the_folder_or_it_was_said_that_only_glmchat_does(
    case: str, tmp_path: Path, builders: ModuleType
) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    plan = planned(case, tmp_path, builders)
    told, lines = plan.to_json()["readers"], plan.lines("none")
    assert not plan.out.exists() and " ".join(told["reasons"]) == CASES[case][2]
    out = execute(plan)
    if "transformers" in told["programs"]:
        assert difference(out) < BFLOAT16, "within what bfloat16 tells apart"
    else:
        assert difference(out) > BFLOAT16, "what is said is so"
        assert told["note"].startswith("only glmchat reads this folder, because ") and told["note"] in lines
    manifest = json.loads((out / "glmchat.json").read_text())
    assert manifest.get("readers") == (told if told["reasons"] else None)
    found = readers_at(out)
    assert (found.words() if found is not None else None) == told["note"]


def test_the_starter_model_keeps_its_minima_and_says_so(starter_model: Path, tmp_path: Path) -> None:
    plan = plan_quantise(starter_model, tmp_path / "out", Recipe(4))
    assert plan.readers.to_json()["programs"] == ["glmchat"]
    assert "minima" in plan.readers.reasons and plan.readers.words() in plan.lines("q4_1")


def test_the_command_says_it_before_it_writes_and_show_repeats_it(
    tmp_path: Path, builders: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLMCHAT_HOME", str(tmp_path / "home"))
    source = builders.write_folder(tmp_path / "source")
    out = tmp_path / "out"
    words = "only glmchat reads this folder, because its matrices are packed in several ways (int4-g32, int8)"
    assert run(["quantize", str(source), "--embeddings", "8", "--out", str(out), "--dry-run"]) == 0
    assert words in capsys.readouterr().err and not out.exists()
    assert run(["quantize", str(source), "--embeddings", "8", "--out", str(out), "--quiet"]) == 0
    assert words in capsys.readouterr().err
    assert run(["show", str(out)]) == 0
    assert f"other programs: {words}" in capsys.readouterr().out
    assert run(["show", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["readers"]["programs"] == ["glmchat"]


def test_what_run_keeps_is_told_as_it_turns_out(tmp_path: Path, builders: ModuleType) -> None:
    for bits in (4, 8):
        plan = plan_quantise(builders.write_folder(tmp_path / str(bits)), tmp_path / f"out{bits}", Recipe(bits))
        assert usual_readers(plan.checkpoint.spec.family, bits).words() == plan.readers.words()
    assert usual_readers("chatglm3", 4).words() == (
        "only glmchat reads this folder, because other programs hold the matrices of a chatglm3 model in another way"
    )
