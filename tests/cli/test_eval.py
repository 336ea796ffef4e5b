"""`glmchat eval` as people and scripts see it: the table, the rows, and what is refused before an engine starts."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from glmchat.cli.main import run
from glmchat.core import language, locations
from glmchat.core.eval_folder import evaluations
from glmchat.core.run_folder import new_run

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


def test_a_table_of_pairs_tells_how_often_and_how_far_the_better_answer_is_ahead(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"he {n}?", "chosen": f"tea {n} {HOSTILE}", "rejected": f"hat {HOSTILE}"} for n in range(5)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_peft(Path(model), tmp_path / "poet")
    assert run(["adapters", "add", str(tmp_path / "poet")]) == 0
    code, out, err = evaluated(capsys, model, "+poet", str(tmp_path / "pairs.jsonl"), "--dtype", "float32")
    assert code == 0, err
    for label in ("perplexity", "better answer likelier", "log probability ahead", "pairs that gained"):
        assert label in out, label
    assert "ROUGE" not in out and "at most" not in out  # nothing is answered
    assert "  =   tea" in out and "  ≠   hat" in out
    assert "\x1b" not in out and "\u202e" not in out
    code, out, _ = evaluated(capsys, "--show", evaluations()[0].id, "--json")
    (told,) = (json.loads(line) for line in out.splitlines())
    assert code == 0 and (told["pairs"], told["answered"]) == (5, 0)
    assert {"margin", "gained"} <= set(told["candidates"][1]["differences"])


def test_evaluations_are_listed_told_again_and_told_of_what_took_part(
    model: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_peft(Path(model), tmp_path / "poet")
    assert run(["add", model, "--name", "small"]) == 0
    assert run(["adapters", "add", str(tmp_path / "poet")]) == 0
    assert run(["eval", "--list"]) == 0 and "no evaluations yet" in capsys.readouterr().err
    code, table, _ = evaluated(capsys, "small", "+poet", data)
    assert code == 0
    assert run(["eval", "--list", "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)
    assert (told["state"], told["candidates"], told["data"]) == ("done", ["small", "small+poet"], [data])
    assert told["answers"] == [6, 6]
    assert run(["eval", "--list"]) == 0 and told["evaluation"] in capsys.readouterr().out
    assert run(["eval", "--show", told["evaluation"]]) == 0
    assert capsys.readouterr().out == table
    for command, name in ((["show"], "small"), (["show"], "poet"), (["adapters", "show"], "poet")):
        assert run([*command, name]) == 0
        out = capsys.readouterr().out
        assert f"{told['evaluation']}  small+poet" in out and "6 rows" in out
        assert run([*command, name, "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert {one["evaluation"] for one in facts["evaluations"]} == {told["evaluation"]}
    assert run(["eval", "--show", "nobody"]) == 2 and told["evaluation"] in capsys.readouterr().err
    assert run(["eval", "--list", data]) == 2 and run(["eval", "--list", "--show", "x"]) == 2


def test_other_rows_have_a_table_of_their_own_and_the_model_is_loaded_once_for_both(
    model: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "general.jsonl"
    other.write_text(json.dumps({"prompt": "he", "response": "the hat"}) + "\n")
    code, out, err = evaluated(capsys, model, data, "--also", str(other), "--rows", "0")
    assert code == 0 and out.count("perplexity") == 2
    assert out.index(f"6 rows of {data}") < out.index(f"1 rows of {other}")
    assert err.count("loading") <= 2  # a line at its beginning and one at its end
    found = json.loads(evaluated(capsys, model, data, "--also", str(other), "--json")[1].splitlines()[-1])
    (general,) = found["also"]
    assert (found["rows"], general["rows"], general["data"]) == (6, 1, str(other))
    alone = json.loads(evaluated(capsys, model, str(other), "--json")[1].splitlines()[-1])
    assert alone["candidates"] == general["candidates"]


def test_prune_takes_evaluations_and_done_runs_away_and_keeps_what_is_at_work_or_can_be_gone_on_with(
    model: str, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluated(capsys, model, data)[0] == 0
    evaluated(capsys, model, data, "--limit", "2")
    at_work, idle = evaluations()
    at_work.note("running")
    runs = {state: new_run(f"run-{state}", {"base": "b"}) for state in ("done", "stopped", "running")}
    for state, one in runs.items():
        one.write("big", "x" * 5000)
        one.checkpoints.mkdir()  # it has learned
        one.note(state)  # type: ignore[arg-type]
    assert run(["prune", "--yes"]) == 0
    assert len(evaluations()) == 2 and all(one.folder.is_dir() for one in runs.values())
    capsys.readouterr()
    assert run(["prune", "--evaluations", "--runs", "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert str(idle.folder) in out and str(runs["done"].folder) in out and "5.1 kB" in out
    assert f"{at_work.id} is at work" in err and "run-stopped" in err and "run-running" in err
    assert run(["prune", "--evaluations", "--runs", "--yes"]) == 0
    assert evaluations() == [at_work] and not runs["done"].folder.exists()
    assert all(runs[state].folder.is_dir() for state in ("stopped", "running"))
    assert {folder.name for folder in locations.evals_dir().iterdir()} == set(at_work.keys)
    assert run(["doctor", "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])["evaluations and runs"]
    assert (told["evaluations"], told["runs"]) == (1, 2) and told["runs_bytes"] > 10000
