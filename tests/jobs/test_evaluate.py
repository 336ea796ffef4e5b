"""An evaluation computes what transformers computes, writes each answer once, and goes on after a kill as if none was.

Covers jobs/answers.py, jobs/judging.py.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_builders import theirs, write_peft
from engine_builders import write_folder
from tiny_checkpoints import build, prompt_of

from glmchat.core import locations
from glmchat.core.engine_options import EngineOptions
from glmchat.core.errors import Failed, Usage
from glmchat.engine.engine import Engine
from glmchat.jobs import answers, evaluate
from glmchat.jobs.answers import Record, loss_of
from glmchat.jobs.judging import judge
from glmchat.tuning.metrics import Answer
from glmchat.tuning.prompt_side import load_prompt_side
from glmchat.tuning.questions import Reader, read_questions
from glmchat.tuning.sources import find_sources

ROWS = [
    {"prompt": f"{word} {n}?", "response": f"the {word} {n} it is"}
    for n, word in enumerate(["he", "the", "hat", "tea"] * 3)
]
GREEDY = {"temperature": 0.0, "max_tokens": 20}
DRAWN = {"temperature": 1.0, "top_p": 0.9, "max_tokens": 20}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def candidate(model: Path, sampling: dict[str, Any] = GREEDY, **more: Any) -> dict[str, Any]:
    options = EngineOptions(folder=model, dtype="float32", device="cpu", threads=1, **more.pop("options", {}))
    return {"text": "tiny", "engine": options.to_arguments(), "adapters": [], "sampling": sampling, **more}


def request(data: Path, *candidates: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"data": [str(data)], "candidates": list(candidates), "rows": 1, **more}


def done(asked: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The result of a run in this process, and the answers that were written in it."""
    told: list[Any] = []
    result = evaluate.work(json.loads(json.dumps(asked)), told.append)
    return result, [event for event in told if event["event"] == "answer"]


def test_the_loss_is_that_of_transformers_and_of_peft(model: Path, data: Path, tmp_path: Path) -> None:
    network = write_peft(model, tmp_path / "poet")
    adapted = candidate(model, adapters=[["poet", str(tmp_path / "poet"), 1.0]])
    result, _ = done(request(data, candidate(model), adapted))
    reader = Reader(load_prompt_side(model).prompt, 200)
    rows = read_questions(find_sources([str(data)]), [reader]).rows
    documents = [document for row in rows for document in reader.documents(row, 0)]
    for own, one in zip((theirs(model), network), result["candidates"], strict=True):
        total = count = 0.0
        for document in documents:
            ids = torch.tensor([document.ids])
            labels = torch.tensor([document.labels])
            with torch.no_grad():
                loss = float(own(input_ids=ids, labels=labels).loss)
            total += loss * sum(document.learned)
            count += sum(document.learned)
        assert one["values"]["loss"] == pytest.approx(total / count, rel=1e-5)
    assert result["candidates"][1]["differences"]["loss"]["mean"] != 0


def test_of_pairs_each_side_has_the_log_probability_of_transformers(model: Path, tmp_path: Path) -> None:
    network = write_peft(model, tmp_path / "poet")
    adapted = candidate(model, adapters=[["poet", str(tmp_path / "poet"), 1.0]])
    path, out = tmp_path / "pairs.jsonl", tmp_path / "said.jsonl"
    pairs = [{"prompt": row["prompt"], "chosen": row["response"], "rejected": f"tea {n}"} for n, row in enumerate(ROWS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    result, _ = done(request(path, candidate(model), adapted, out=str(out)))
    reader = Reader(load_prompt_side(model).prompt, 200)
    rows = read_questions(find_sources([str(path)]), [reader]).rows
    margins = []
    for number, own in enumerate((theirs(model), network), 1):
        said = [json.loads(line) for line in out.with_name(f"said-{number}.jsonl").read_text().splitlines()]
        for row, pair, line in zip(rows, pairs, said, strict=True):
            (example,) = reader.documents(row, 0)
            for side, (ids, learned) in zip(("chosen", "rejected"), example.documents(), strict=True):
                with torch.no_grad():
                    logps = own(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
                picked = logps[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
                total = float(picked[torch.tensor(learned[1:])].sum())
                assert line[side] == pair[side] and line[f"logps/{side}"] == pytest.approx(total, abs=1e-3)
        margins.append([line["logps/chosen"] - line["logps/rejected"] for line in said])
    apart = result["candidates"][1]["differences"]
    gained = [after - before for before, after in zip(*margins, strict=True)]
    assert apart["margin"]["mean"] == pytest.approx(sum(gained) / len(gained), abs=1e-6)
    assert apart["gained"]["mean"] == pytest.approx(100 * sum(one > 0 for one in gained) / len(gained))
    assert (result["answered"], result["pairs"]) == (0, len(pairs)) and "exact" not in result["candidates"][0]["values"]
    again, told = done(request(path, candidate(model), adapted))
    assert not told and again["candidates"] == result["candidates"]


@pytest.mark.parametrize("name", ["llama", "chatglm", "chatglm2", "gpt2", "fallback"])
def test_the_loss_of_a_long_text_is_added_up_piece_by_piece(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "_PIECE", 50)
    engine = Engine.load(build(name, tmp_path / name), dtype="float32", device="cpu", threads=1)
    ids = [*range(3, 93), *prompt_of(name), *range(7, 17)]
    learned = [at >= 40 and at % 7 != 0 for at in range(len(ids))]
    labels = [token if counts else -100 for token, counts in zip(ids, learned, strict=True)]
    assert loss_of(engine, ids, learned) == pytest.approx(engine.loss(ids, labels) * sum(learned), rel=1e-5)


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_many_at_once_write_what_one_by_one_writes(model: Path, data: Path, sampling: dict[str, Any]) -> None:
    alone = candidate(model, sampling, options={"parallel": 1})
    together = candidate(model, sampling, options={"parallel": 8})
    by_one = done(request(data, alone))
    at_once = done(request(data, together, again=True))
    assert {event["row"]: event for event in by_one[1]} == {event["row"]: event for event in at_once[1]}
    assert by_one[0] == at_once[0]


def test_a_run_that_was_killed_goes_on_writes_no_row_twice_and_ends_in_the_same_table(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = request(data, candidate(model, options={"parallel": 4}), candidate(model, DRAWN, options={"parallel": 4}))
    whole, events = done(asked)
    assert len(events) == 2 * len(ROWS)
    monkeypatch.setenv("GLMCHAT_HOME", str(tmp_path / "other"))
    told = 0
    for most in (3, 11):
        child = started(asked)
        assert child.stdout is not None
        for line in child.stdout:
            told += json.loads(line)["event"] == "answer"
            if told >= most:
                break
        child.send_signal(signal.SIGKILL)
        child.wait()
    for record in locations.evals_dir().glob("*/answers.jsonl"):
        with record.open("a") as file:
            file.write('{"row": 1, "labels": "half of a l')
    kept = sum(len(lines(record)) for record in locations.evals_dir().glob("*/answers.jsonl"))
    result, rest = done(asked)
    assert len(rest) == 2 * len(ROWS) - kept and kept >= told
    assert result == whole
    for record in locations.evals_dir().glob("*/answers.jsonl"):
        rows = [line["row"] for line in lines(record)]
        assert sorted(rows) == list(range(1, len(ROWS) + 1))


def whole_line(line: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(line)
    except ValueError:
        return {}
    return found


def lines(record: Path) -> list[dict[str, Any]]:
    return [found for line in record.read_text().splitlines() if (found := whole_line(line))]


def started(asked: dict[str, Any], *program: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-P", *(program or ("-m", "glmchat.jobs.evaluate"))]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None
    child.stdin.write(json.dumps(asked) + "\n")
    child.stdin.flush()
    return child


def test_a_stopped_run_says_how_much_is_kept_and_how_to_go_on(model: Path, data: Path) -> None:
    child = started(request(data, candidate(model)))
    assert child.stdout is not None
    for line in child.stdout:
        if json.loads(line)["event"] == "answer":
            child.send_signal(signal.SIGINT)
            break
    *_, last = map(json.loads, child.stdout)
    assert child.wait() == 130 and (last["event"], last["code"]) == ("error", "eval.stopped")
    kept = int(last["message"].split()[1])
    assert 1 <= kept < len(ROWS) and "goes on" in last["hint"]
    _, rest = done(request(data, candidate(model)))
    assert len(rest) == len(ROWS) - kept


def test_answers_are_used_again_by_other_runs_until_something_differs(model: Path, data: Path, tmp_path: Path) -> None:
    assert len(done(request(data, candidate(model), limit=4))[1]) == 4
    assert len(done(request(data, candidate(model)))[1]) == len(ROWS) - 4
    assert not done(request(data, candidate(model), candidate(model)))[1]
    assert len(done(request(data, candidate(model), again=True, limit=2))[1]) == 2
    assert len(done(request(data, candidate(model, {**GREEDY, "max_tokens": 3}), limit=2))[1]) == 2
    assert len(done(request(data, candidate(model), limit=2, system="he"))[1]) == 2
    other = write_folder(tmp_path / "other", rope_theta=20000.0)
    assert len(done(request(data, candidate(other), limit=2))[1]) == 2
    data.write_text(data.read_text() + json.dumps(ROWS[0]) + "\n")
    assert len(done(request(data, candidate(model), limit=2))[1]) == 2


def test_adapters_of_one_model_are_exchanged_without_loading_it_again(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seed in (("poet", 1), ("cook", 2)):
        write_peft(model, tmp_path / name, seed)
    loads: list[Path] = []
    load = Engine.load.__func__  # type: ignore[attr-defined]

    def counted(cls: type[Engine], /, folder: Path, **more: Any) -> Engine:
        loads.append(folder)
        loaded: Engine = load(cls, folder, **more)
        return loaded

    monkeypatch.setattr(Engine, "load", classmethod(counted))
    adapted = [candidate(model, adapters=[[name, str(tmp_path / name), 1.0]]) for name in ("poet", "cook")]
    result, said = done(request(data, candidate(model), *adapted, limit=3))
    assert loads == [model] and len(said) == 9
    assert len({round(one["values"]["loss"], 6) for one in result["candidates"]}) == 3


def test_no_engine_starts_for_data_that_cannot_be_used(model: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "response": 5}\n')
    told: list[Any] = []
    with pytest.raises(Usage, match=r"bad\.jsonl:1"):
        evaluate.work(request(bad, candidate(model)), told.append)
    assert not [event for event in told if "loading" in event.get("label", "")]


def test_data_that_cannot_be_used_are_refused_by_a_program_that_has_no_torch(model: Path, tmp_path: Path) -> None:
    program = (
        "import runpy, sys; sys.modules['torch'] = None; runpy.run_module('glmchat.jobs.evaluate', run_name='__main__')"
    )
    good, bad, odd, empty = (tmp_path / f"{name}.jsonl" for name in ("good", "bad", "odd", "empty"))
    empty.touch()
    good.write_text('{"prompt": "a", "response": "b"}\n')
    bad.write_text('{"prompt": "a", "response": 5}\n')
    odd.write_text('{"a": 1}\n')
    for asked, code in (
        (request(bad, candidate(model)), "data.nothing"),
        (request(odd, candidate(model)), "data.format"),
        (request(empty, candidate(model)), "data.nothing"),
        (request(good, candidate(model), also=[str(bad)]), "data.nothing"),
        (request(tmp_path / "none.jsonl", candidate(model)), "data.missing"),
    ):
        child = started(asked, "-c", program)
        assert child.stdout is not None
        *_, last = map(json.loads, child.stdout)
        assert (last["event"], last["code"]) == ("error", code)
        child.wait()
    for data in (bad, odd, empty):
        asked = request(data, candidate(model))
        with pytest.raises(Usage) as early:
            evaluate.work(asked, lambda event: None)
        with pytest.raises(Usage) as late:
            judge(asked, lambda event: None)
        assert (early.value.message, early.value.hint) == (late.value.message, late.value.hint)  # as a reading says it
        assert data is odd or data.name in early.value.message


def test_texts_are_judged_by_their_loss_alone(model: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": "the hat of the cat " * n}) + "\n" for n in (1, 3)))
    result, said = done(request(texts, candidate(model)))
    assert [event["predict"] for event in said] == [None, None] and result["answered"] == 0
    assert set(result["candidates"][0]["values"]) == {"loss", "perplexity"}


def test_two_runs_do_not_write_the_same_answers(tmp_path: Path) -> None:
    first = Record(tmp_path / "one", {"candidate": "tiny"}, again=False)
    with pytest.raises(Failed, match="another"):
        Record(tmp_path / "one", {"candidate": "tiny"}, again=False)
    first.begin({"dtype": "float32"})
    first.add(Answer(1, "\ud800", "\x1b[31m\n", 1.0, 2, 3, "eos"), "rows.jsonl:1")
    first.close()
    second = Record(tmp_path / "one", {"candidate": "tiny"}, again=False)
    assert second.answers[1].predict == "\x1b[31m\n" and second.computed == {"dtype": "float32"}
    second.close()


def test_the_predictions_stand_in_the_file_of_the_original_scripts(model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "generated_predictions.txt"
    result, told = done(request(data, candidate(model), out=str(out), limit=3))
    said = [json.loads(line) for line in out.read_text().splitlines()]
    assert [set(row) for row in said] == [{"labels", "predict"}] * 3 and result["files"] == [str(out)]
    assert [row["labels"] for row in said] == [row["response"] for row in ROWS[:3]]
    by_row = {event["row"]: event["predict"] for event in told}
    assert [row["predict"] for row in said] == [by_row[n] for n in (1, 2, 3)]
    pair = done(request(data, candidate(model), candidate(model, DRAWN), out=str(tmp_path / "p.txt"), limit=2))[0]
    assert [Path(file).name for file in pair["files"]] == ["p-1.txt", "p-2.txt"]
