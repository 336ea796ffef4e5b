"""`glmchat eval` as people and scripts see it: the table, the rows, and what is refused before an engine starts."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from glmchat.cli.main import run
from glmchat.core import language

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "engine"))

from adapter_builders import write_peft
from engine_builders import write_folder

HOSTILE = "\x1b[2J\u202eevil"


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """`--lang` holds for the process: the next test begins without it."""
    yield
    language.choose(None)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_folder(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture
def data(tmp_path: Path) -> str:
    rows = [{"prompt": f"he {n} {HOSTILE}", "response": f"the {n} {HOSTILE}"} for n in range(6)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": 5, "response": "a"}]))
    return str(path)


def evaluated(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = run(["eval", *words, "--max-tokens", "8"])
    return (code, *capsys.readouterr())


def test_candidates_stand_side_by_side_with_their_differences(
    model: str, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = evaluated(capsys, model, ",temp=1,seed=3", data, "--dtype", "float32")
    assert code == 0, err
    head, _, rest = out.partition("\n\n")
    assert [line.split()[0] for line in head.splitlines()] == ["1", "2"] and ",temp=1" in head
    for label in ("loss per learned token", "perplexity", "exact match", "ROUGE-L", "BLEU-4 of characters",
                  "ended by itself", "length in tokens"):  # fmt: skip
        assert label in rest
    assert "2 − 1" in rest and "95 % interval" in rest and "no difference shown" in rest
    assert "rows to judge by: 6" in err and "rows not used: 1" in err and ":7" in err


def test_texts_of_data_and_models_never_drive_the_terminal(
    model: str, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = evaluated(capsys, model, data, "--rows", "3")
    assert code == 0 and "evil" in out
    assert not {"\x1b", "\u202e", "\x00"} & set(out + err)


def test_programs_get_each_answer_and_the_table(model: str, data: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = evaluated(capsys, model, data, "--json", "--limit", "4", "--bleu", "words")
    plan, *told, last = map(json.loads, out.splitlines())
    assert (code, plan["event"], plan["rows"], last["event"]) == (0, "plan", 4, "done")
    answers = [event for event in told if event["event"] == "answer"]
    assert {event["row"] for event in answers} == {1, 2, 3, 4} and all("predict" in event for event in answers)
    mean = sum(event["nats"] for event in answers) / sum(event["learned"] for event in answers)
    assert last["candidates"][0]["values"]["loss"] == pytest.approx(mean) and last["bleu"] == "words"
    again = evaluated(capsys, model, data, "--json", "--limit", "4", "--bleu", "words")[1]
    assert [json.loads(line)["event"] for line in again.splitlines()] == ["plan", "done"]
    assert json.loads(again.splitlines()[-1]) == last


def test_it_speaks_chinese(model: str, data: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = evaluated(capsys, model, ",temp=1", data, "--lang", "zh")
    assert code == 0 and "困惑度" in out and "未显示出差异" in out and "行" in err


def test_a_file_that_is_there_is_not_written_over(
    model: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "predictions.txt"
    assert evaluated(capsys, model, data, "--out", str(out))[0] == 0
    before = out.read_text()
    code, _, err = evaluated(capsys, model, data, "--out", str(out))
    assert code == 2 and "already exists" in err and out.read_text() == before


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["nobody-knows", "DATA"], 2, "nobody-knows"),
        (["MODEL+nobody", "DATA"], 2, "nobody"),
        (["MODEL+foreign", "DATA"], 2, "foreign"),
        (["MODEL,temp=9", "DATA"], 2, "temperature"),
        (["MODEL,colour=red", "DATA"], 2, "colour"),
        (["MODEL,template_variables.enable_thinking=false", "DATA"], 2, "template"),
        (["MODEL"], 2, "the data last"),
        ([], 2, "the data last"),
        (["MODEL", "MODEL+nobody"], 2, "no file"),
        (["MODEL", "DATA", "--sampling", "mad"], 2, "--sampling"),
        (["MODEL", "DATA", "--bleu", "letters"], 2, "--bleu"),
        (["MODEL", "DATA", "--columns", "prompt"], 2, "--columns"),
        (["MODEL", "DATA", "--out", "/nowhere/at/all"], 2, "no folder"),
        (["MODEL", "DATA", "--limit", "0"], 2, "--limit"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line_and_without_torch(
    model: str, data: str, tmp_path: Path, words: list[str], code: int, said: str
) -> None:
    if "MODEL+foreign" in words:
        other = write_folder(tmp_path / "other", hidden_size=32, intermediate_size=64)
        write_peft(other, tmp_path / "foreign")
        assert run(["adapters", "add", str(tmp_path / "foreign")]) == 0
    line = ["eval", *(word.replace("MODEL", model).replace("DATA", data) for word in words)]
    program = f"import sys\nfrom glmchat.cli.main import run\nprint(run({line!r}), 'torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, timeout=120)
    assert ended.stdout.split() == [str(code), "False"], ended.stderr
    first, *hint = ended.stderr.splitlines()
    assert first.startswith("glmchat: ") and said in first and len(hint) == 1


def test_a_table_of_texts_has_no_answers_in_it(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = tmp_path / "t.txt"
    texts.write_text("the hat\nthe cat sat\n")
    code, out, _ = evaluated(capsys, model, ",temp=1", str(texts))
    assert code == 0 and "perplexity" in out and "ROUGE" not in out and "  =  " not in out
