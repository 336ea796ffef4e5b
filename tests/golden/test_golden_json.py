"""The form of everything that `--json` prints: keys and types, line by line where it is lines."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forms import form, forms_by_event, merged
from golden_files import Golden

from glmchat.cli.main import run

TESTS = Path(__file__).resolve().parents[1]
sys.path += [str(TESTS), str(TESTS / "engine"), str(TESTS / "hub")]

import adapter_builders as adapters  # noqa: E402
import engine_builders as llamas  # noqa: E402
from loopback_hub import LoopbackHub  # noqa: E402

Say = Callable[..., list[Any]]


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    """`say("list", "--json")`: the JSON lines of one command, run in this process; the engine is a real child."""

    def lines(*arguments: object, code: int = 0) -> list[Any]:
        capsys.readouterr()
        ended = run([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert ended == code, f"{arguments}: {ended}\n{out[-2000:]}\n{err[-2000:]}"
        return [json.loads(line) for line in out.splitlines()]

    return lines


@pytest.fixture
def tiny(tmp_path: Path, say: Say) -> Path:
    """A tiny Llama that is known as `tiny`, and an adapter of it."""
    folder = llamas.write_folder(tmp_path / "tiny-llama")
    assert run(["add", str(folder), "--name", "tiny"]) == 0
    return folder


def test_models_and_adapters(golden: Golden, say: Say, tiny: Path, tmp_path: Path) -> None:
    lora = adapters.write_lora(tmp_path / "poet", adapters.factors(3), base_model_name_or_path="me/Tiny")
    raw = tmp_path / "raw.safetensors"
    shutil.copy(lora / "adapter_model.safetensors", raw)
    forms: dict[str, Any] = {}

    def one(*arguments: object, code: int = 0) -> None:
        words = " ".join(Path(str(a)).name for a in arguments).removesuffix(" --json")
        found = say(*arguments, code=code)
        several = len(found) > 1 and all(isinstance(line, dict) and "event" in line for line in found)
        forms[words] = forms_by_event(found) if several else merged(map(form, found))

    one("add", shutil.copytree(tiny, tmp_path / "copy"), "--name", "again", "--json")
    one("list", "--json")
    one("list", "--known", "--json")
    one("show", "tiny", "--json")
    one("show", "tiny", "--fit", "--json")
    one("verify", "tiny", "--json")
    assert run(["alias", "pet", "tiny"]) == 0
    one("alias", "--json")
    one("quantize", "tiny", "--bits", "4", "--dry-run", "--json")
    one("quantize", "tiny", "--bits", "8", "--json")
    one("quantize", "tiny", "--bits", "8", "--json")
    one("rm", "tiny:int8", "--dry-run", "--json")
    one("rm", "tiny:int8", "--yes", "--json")
    one("prune", "--dry-run", "--json")
    one("adapters", "add", lora, "--json")
    one("adapters", "add", raw, "--name", "rawone", "--alpha", "8", "--json")
    one("adapters", "list", "--json")
    one("adapters", "show", "poet", "--json")
    one("adapters", "verify", "poet", "--json")
    one("adapters", "rm", "poet", "--dry-run", "--json")
    one("show", "nobody-knows-this", "--json", code=2)
    weights = Path(say("adapters", "show", "poet", "--json")[0]["path"]) / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    one("verify", "poet", "--json", code=3)
    golden("json_models.json", forms)


def test_pulls_and_mirrors(golden: Golden, say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = llamas.write_folder(tmp_path / "llama", torch_dtype="float16")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    forms: dict[str, Any] = {}
    with LoopbackHub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        hub.add("tiny/llama", files, tag="v1.0")
        forms["pull --dry-run"] = merged(map(form, say("pull", "tiny/llama", "--dry-run", "--json")))
        forms["pull --quant --dry-run"] = merged(
            map(form, say("pull", "tiny/llama", "--quant", "4", "--dry-run", "--json"))
        )
        forms["pull --quant"] = without_progress(say("pull", "tiny/llama", "--quant", "4", "--json"))
        forms["pull"] = without_progress(say("pull", "tiny/llama", "--json"))
        mirror = tmp_path / "mirror"
        forms["mirror --dry-run"] = merged(map(form, say("mirror", "tiny/llama", mirror, "--dry-run", "--json")))
        forms["mirror"] = without_progress(say("mirror", "tiny/llama", mirror, "--json"))
        forms["mirror list"] = merged(map(form, say("mirror", "list", mirror, "--json")))
        forms["show, pulled"] = merged(map(form, say("show", "tiny/llama", "--json")))
        forms["verify, pulled"] = merged(map(form, say("verify", "tiny/llama", "--json")))
        forms["not there"] = merged(map(form, say("pull", "tiny/nothing", "--json", code=1)))
    golden("json_pulls.json", forms)


def without_progress(lines: list[Any]) -> dict[str, Any]:
    """Progress comes twice a second; a small pull may be over before."""
    return forms_by_event(line for line in lines if line["event"] != "progress")


def test_conversations(golden: Golden, say: Say, tiny: Path, tmp_path: Path) -> None:
    asked = ("-p", "hello", "--threads", "1", "-n", "3", "--seed", "5", "--json")
    forms: dict[str, Any] = {"run": forms_by_event(say("run", "-m", "tiny", *asked))}
    answers = ("--set", "seed=3", "--set", "max_tokens=2", "--json")
    forms["compare"] = forms_by_event(say("compare", "-p", "hello", "tiny", ",temp=0", *answers))
    forms["replay"] = forms_by_event(say("replay", "1", "--json"))
    forms["history list"] = merged(map(form, say("history", "list", "--json")))
    forms["history show"] = merged(map(form, say("history", "show", "1", "--json")))
    forms["history search"] = merged(map(form, say("history", "search", "hello", "--json")))
    kept = tmp_path / "kept.json"
    assert run(["history", "export", "1", "-f", "json", "-o", str(kept)]) == 0
    forms["history export"] = form(json.loads(kept.read_text()))
    forms["history import"] = merged(map(form, say("history", "import", kept, "--json")))
    forms["history rm"] = merged(map(form, say("history", "rm", "1", "--yes", "--json")))
    forms["history restore"] = merged(map(form, say("history", "restore", "1", "--json")))
    forms["unknown"] = merged(map(form, say("history", "show", "99", "--json", code=2)))
    golden("json_conversations.json", forms)


def test_measurements(golden: Golden, say: Say, tiny: Path) -> None:
    forms = {"bench": forms_by_event(say("bench", "tiny", "--threads", "1", "--json"))}
    (report,) = say("doctor", "--json")
    # What stands in a section depends on the machine; which sections and facts there are does not.
    forms["doctor"] = {section: sorted(rows) if isinstance(rows, dict) else [] for section, rows in report.items()}
    golden("json_measurements.json", forms)
