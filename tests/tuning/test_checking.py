"""What is refused by words and rows alone is refused as a whole reading would refuse it, and nothing else is."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoints
from tiny_talker import write_talker

from glmchat.checkpoints.fit import spec_at
from glmchat.core.cards import look
from glmchat.core.errors import GlmchatError
from glmchat.tuning.checking import check_run, refuse_targets
from glmchat.tuning.dataset import read_dataset
from glmchat.tuning.forward import load_base
from glmchat.tuning.lora import targets_of
from glmchat.tuning.options import DataOptions
from glmchat.tuning.prompt_side import load_prompt_side
from glmchat.tuning.settings import Settings
from glmchat.tuning.settings import targets_of as words_of_targets

QA = '{"question": "a", "answer": "b"}\n'
PAIR = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_talker(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize(
    ("rows", "asked", "code"),
    [
        (QA, {}, None),
        ("", {}, "data.nothing"),
        ("\n\n", {}, "data.nothing"),
        ("not json\n" * 60, {}, "data.nothing"),
        ('{"question": 7, "answer": "x"}\n' * 3, {}, "data.nothing"),
        ("not json\n" * 60 + QA, {}, None),
        ('{"question": 7, "answer": "x"}\n' * 300 + QA, {}, None),
        ('{"a": 1, "b": 2}\n', {}, "data.format"),
        (QA, {"columns": {"prompt": "question", "answer": "reply"}}, "data.nothing"),
        (QA, {"columns": {"prompt": "question"}}, "data.columns"),
        (QA, {"columns": {"promt": "question"}}, "data.columns"),
        (QA, {"format": "nosuch"}, "data.format"),
        (QA, {"method": "dpo"}, "data.no_pairs"),
        (PAIR, {}, "data.pairs"),
        (PAIR, {"method": "dpo"}, None),
        ('{"prompt": "a", "chosen": "b", "rejected": "b"}\n', {"method": "dpo"}, "data.nothing"),
        (QA, {"stride": 4}, "data.stride"),
        (QA, {"on": "text"}, "data.text"),
        ('{"text": "a b c"}\n', {"on": "text"}, None),
        (QA, {"like": "lora-guide"}, "data.recipe_family"),
        (QA, {"max_length": 1_000_000}, "data.max_length"),
        (QA, {"eval": "50%"}, "data.eval"),
        (QA * 3, {"eval": "{rows}.eval"}, "data.nothing"),
        (QA, {"mix": ["{rows}:60%", "{rows}:40%"]}, "data.mix"),
        (QA, {"mix": ["{rows}:0%"]}, "data.mix"),
        (QA, {"data": ["{rows}.json#x"]}, "data.missing"),
        (QA, {"data": ["/nowhere.jsonl"]}, "data.missing"),
        (QA, {"data": ["{broken}#x"]}, "data.table"),
        (QA, {"method": "prefix", "prefix_length": 8192}, "data.prefix"),
        ("\ufeff".encode("utf-16-le").decode("latin-1") + QA, {}, "data.nothing"),
    ],
)
def test_a_quick_look_refuses_what_a_reading_refuses(
    rows: str, asked: dict[str, Any], code: str | None, base: Path, tmp_path: Path
) -> None:
    path = tmp_path / "rows"
    path.write_bytes(rows.encode("latin-1"))
    (tmp_path / "rows.eval").write_text('{"question": "a", "answer": ""}\n')
    given = json.loads(
        json.dumps({"data": ["{rows}"], "folder": str(base), **asked})
        .replace("{rows}", str(path))
        .replace("{broken}", str(tmp_path / "dataset_info.json"))
    )
    (tmp_path / "dataset_info.json").write_text("{")
    side = load_prompt_side(base)
    try:
        early = refusal(lambda: check_run(given))
        late = refusal(lambda: read_dataset(given["data"], DataOptions.of(given), side))
    finally:
        side.close()
    assert early == late
    assert (early[0] if early else None) == code


def refusal(work: Any) -> tuple[str, str, str] | None:
    try:
        work()
    except GlmchatError as problem:
        return problem.code, problem.message, problem.hint
    return None


@pytest.mark.parametrize("name", tiny_checkpoints.NAMES)
def test_layers_are_known_before_the_model_is_loaded(name: str, tmp_path: Path) -> None:
    folder = tiny_checkpoints.build(name, tmp_path / name)
    spec = spec_at(folder)
    if spec is None or spec.layout is None:
        pytest.skip("transformers alone knows its tensors")
    _, model, _ = load_base(folder, Settings(), "cpu")
    for layer in targets_of(model, r".*"):
        refuse_targets(re.escape(layer), spec)
        refuse_targets(layer.rpartition(".")[2], spec)
    for wrong in ("nosuch", "q_proj,nosuch", r".*\.nosuch", "(", "layers"):
        with pytest.raises(GlmchatError) as early:
            refuse_targets(wrong, spec)
        with pytest.raises(GlmchatError) as late:
            targets_of(model, words_of_targets(wrong))
        assert (early.value.code, early.value.message) == (late.value.code, late.value.message)


def test_a_card_that_is_not_there_and_a_type_that_overflows_are_refused(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(QA)
    given = {"data": [str(path)], "folder": str(base)}
    if not look().visible:
        with pytest.raises(GlmchatError, match="--device cuda cannot be used"):
            check_run({**given, "device": "cuda"})
    for asked in ({"device": "cpu"}, {"method": "full"}):
        with pytest.raises(GlmchatError, match="float16 overflows"):
            check_run({**given, **asked, "dtype": "float16"})
    check_run({**given, "device": "cpu", "dtype": "bfloat16"})


def test_a_prefix_and_a_row_share_the_positions_of_the_model(base: Path, tmp_path: Path) -> None:
    spec = spec_at(base)
    assert spec is not None
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"question": "q" * size, "answer": "a"}) + "\n" for size in (5, 150, 160)))
    prefix: dict[str, Any] = {"method": "prefix", "prefix_length": spec.context - 120}
    given: dict[str, Any] = {"data": [str(path)], "folder": str(base), **prefix}
    side = load_prompt_side(base)
    try:
        with pytest.raises(GlmchatError, match="are longer than 120 tokens") as refused:
            read_dataset(given["data"], DataOptions.of(given), side)
        assert "--prefix-length" in refused.value.hint
        dataset = read_dataset(given["data"], DataOptions.of({**given, "over_length": "cut-question"}), side)
        lengths = [len(example.ids) for example in dataset.examples]
    finally:
        side.close()
    assert max(lengths) <= 120 and len(lengths) == 3
    with pytest.raises(GlmchatError, match="a row of 121 tokens is not possible") as refused:
        check_run({**given, "max_length": 121})
    assert f"behind a prefix of {spec.context - 120:,}" in refused.value.hint
    check_run({**given, "max_length": 120})


def test_an_original_brings_its_own_prefix() -> None:
    known = {"ptuning": 8, "chatglm2-ptuning": 128}
    for like, length in known.items():
        assert DataOptions.of({"like": like, "method": "prefix"}).prefix == length
    assert DataOptions.of({"method": "prefix"}).prefix == 128
    assert DataOptions.of({}).prefix == 0


def test_a_model_from_scratch_is_refused_by_its_configuration_and_its_rows(tmp_path: Path) -> None:
    config, rows = tmp_path / "config.json", tmp_path / "rows.jsonl"
    rows.write_text(QA)
    config.write_text('{"model_type": "llama"}')
    given = {"data": [str(rows)], "words": "train:300", "config": str(config), "method": "scratch"}
    with pytest.raises(GlmchatError, match="only a GPT-2 is made from scratch"):
        check_run(given)
    for wrong in ('{"n_embd": 65, "n_head": 2}', "{", "[]", '{"n_layer": -1}', '{"n_layer": "two"}'):
        config.write_text(wrong)
        with pytest.raises(GlmchatError, match="the configuration makes no GPT-2: ") as refused:
            check_run(given)
        assert refused.value.code == "tune.config" and "n_embd" in refused.value.hint
    config.write_text('{"model_type": "gpt2", "n_positions": 64}')
    with pytest.raises(GlmchatError, match="no chat format"):
        check_run(given)
    with pytest.raises(GlmchatError, match="a row of 65 tokens is not possible"):
        check_run({**given, "max_length": 65})


def test_of_a_large_file_the_first_rows_are_enough_and_torch_is_not_imported(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with path.open("w") as file:
        for _ in range(200):
            file.write(QA * 1000)
    code = (
        "import sys, json; from glmchat.tuning.checking import check_run; from glmchat.tuning import reading;\n"
        "parsed = []; real = reading._parsed; reading._parsed = lambda *a: parsed.append(1) or real(*a)\n"
        "check_run(json.loads(sys.argv[1])); print(len(parsed), 'torch' in sys.modules)"
    )
    given = json.dumps({"data": [str(path)], "folder": str(base)})
    done = subprocess.run([sys.executable, "-P", "-c", code, given], capture_output=True, text=True, check=True)
    count, has_torch = done.stdout.split()
    assert int(count) < 100
    assert has_torch == "False"
