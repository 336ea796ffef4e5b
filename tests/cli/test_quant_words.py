"""`--quant`: one set of words in every command, read before any network is asked and before torch is loaded.

Covers cli/engine_flags.py, cli/quantize.py, checkpoints/families.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import odd_models
import pytest
import transformers
from fakes import WEIGHTS

from glmchat.chat.launch import locate
from glmchat.cli.main import run
from glmchat.hub import references

COMMANDS = {
    "run": ["run", "tiny/absent", "hi"],
    "serve": ["serve", "tiny/absent"],
    "bench": ["bench", "tiny/absent"],
    "pull": ["pull", "tiny/absent"],
    "adapters merge": ["adapters", "merge", "tiny/absent", "tiny/adapter", "out"],
}
NOWHERE = "http://127.0.0.1:9"  # the port that throws everything away: whoever asks it fails with other words

# Runs every command line of sys.argv[1] in turn and tells what each did.
RUNNER = """
import contextlib, io, json, sys
from glmchat.cli.main import run
results = []
for arguments in json.loads(sys.argv[1]):
    words = io.StringIO()
    with contextlib.redirect_stderr(words):
        code = run(arguments)
    results.append({"code": code, "words": words.getvalue(), "torch": "torch" in sys.modules})
print(json.dumps(results))
"""


def results_of(commands: list[list[str]]) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-P", "-c", RUNNER, json.dumps(commands)], cwd="/", capture_output=True, text=True, check=True
    )
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("word", ["5", "q5", "four", ""])
def test_a_width_that_does_not_exist_is_refused_alike_everywhere_before_network_and_torch(
    word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    told = results_of([[*arguments, "--quant", word] for arguments in COMMANDS.values()])
    assert [result["code"] for result in told] == [2] * len(COMMANDS)
    assert not any(result["torch"] for result in told)
    assert {result["words"] for result in told} == {f"glmchat: --quant cannot be {word!r}\n  hint: 4 or 8\n"}


@pytest.mark.parametrize("word", ["4", "8", "q4", "Q8", "int4", "INT8"])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_the_same_words_for_a_width(
    command: str, word: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    run([*COMMANDS[command], "--quant", word])
    err = capsys.readouterr().err
    later = (
        "cannot reach" if command == "pull" else "tiny/"
    )  # what is missing is the model, which comes after the width
    assert later in err


@pytest.mark.parametrize(("word", "quant"), [("int4", "int4"), ("INT8", "int8"), ("q4", "int4"), ("8", "int8")])
def test_a_name_takes_the_same_words_behind_its_colon(word: str, quant: str) -> None:
    for text in (f"smollm2:{word}", f"THUDM/chatglm-6b@main:{word}", f"./absent-folder:{word}"):
        assert references.parse(text).quant == quant


def test_widths_of_quantize_are_read_alike(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["quantize", "tiny/absent", "--bits", "5"]) == 2
    assert "--bits cannot be '5'" in capsys.readouterr().err
    assert run(["quantize", "tiny/absent", "--bits", "q4"]) == 1
    assert "tiny/absent" in capsys.readouterr().err


LAUNCHES = {
    "run": ["run", "MODEL", "hi", "--quant", "4"],
    "run --no-keep": ["run", "MODEL", "hi", "--quant", "8", "--no-keep"],
    "serve": ["serve", "MODEL", "--quant", "4"],
    "bench": ["bench", "MODEL", "--quant", "4"],
    "quantize": ["quantize", "MODEL", "--out", "OUT"],
}


def launches(folder: Path) -> list[list[str]]:
    """The command lines of LAUNCHES, of a folder that holds this configuration."""
    words = {"MODEL": str(folder), "OUT": str(folder / "out")}
    return [[words.get(word, word) for word in command] for command in LAUNCHES.values()]


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe", "GptOss", "DeepseekV3", "Dbrx", "Jamba"])
def test_a_mixture_of_experts_is_never_quantised_and_says_so_without_torch(name: str, tmp_path: Path) -> None:
    config = getattr(transformers, f"{name}Config")()
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(WEIGHTS)
    told = results_of(launches(tmp_path))
    line = f"glmchat: the experts of this {config.model_type} model are no plain matrices and cannot be quantised\n"
    assert {result["words"] for result in told} == {line + "  hint: run it without --quant\n"}
    assert [result["code"] for result in told] == [2] * len(told)
    assert not any(result["torch"] for result in told)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["Rwkv"])
def test_layers_that_are_no_plain_matrices_are_refused_without_torch(name: str, tmp_path: Path) -> None:
    config = getattr(transformers, f"{name}Config")()
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(WEIGHTS)
    told = results_of(launches(tmp_path))
    line = f"glmchat: the layers of this {config.model_type} model are no plain matrices and cannot be quantised\n"
    assert {result["words"] for result in told} == {line + "  hint: run it without --quant\n"}
    assert [result["code"] for result in told] == [2] * len(told)
    assert not any(result["torch"] for result in told)


def test_what_another_program_packed_is_not_packed_again(tmp_path: Path) -> None:
    config = transformers.Gemma2Config(quantization_config={"quant_method": "fp8"})
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(WEIGHTS)
    told = results_of(launches(tmp_path))
    words = "glmchat: these weights were already quantised with FP8\n  hint: run it without --quant\n"
    assert [(result["code"], result["words"]) for result in told] == [(2, words)] * len(told)


def test_no_copy_is_made_of_a_model_with_the_vocabulary_of_another(tmp_path: Path) -> None:
    folder = odd_models.llama(tmp_path)
    words = {f"word{number}": number for number in range(2500)}
    other = {**odd_models.TOKENIZER, "model": {"type": "BPE", "vocab": words, "merges": []}}
    odd_models.write(folder, {"tokenizer.json": other})
    told = results_of(launches(folder))
    line = "glmchat: tokenizer.json has 2,500 tokens, but config.json gives the network 272 rows\n"
    assert [(result["code"], result["words"].splitlines(keepends=True)[0]) for result in told] == [(3, line)] * 5
    assert not any(result["torch"] for result in told)
    assert not (folder / "out").exists()


def test_of_a_model_that_runs_through_transformers_a_copy_is_written_and_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLMCHAT_HOME", str(tmp_path / "home"))
    folder = tmp_path / "gemma"
    small = {"vocab_size": 272, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
    config = transformers.Gemma2Config(**small, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)
    transformers.Gemma2ForCausalLM(config).save_pretrained(folder)
    assert run(["quantize", str(folder), "--json"]) == 0
    made = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert made["event"] == "done" and made["quant"] == "int4-g64"
    assert run(["show", made["path"], "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["quant"], shown["architecture"]["family"]) == ("int4-g64", "gemma2")
    row, bits = locate(str(folder), quant=4)
    assert (str(row.path), bits) == (made["path"], None), "run --quant 4 takes the copy"
