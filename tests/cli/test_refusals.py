"""What is no model, and what is no adapter for one: refused before an engine starts, in the same words by every face.

Covers checkpoints/architectures.py, checkpoints/adapter_check.py, checkpoints/chat_template.py,
checkpoints/tokenizer_files.py.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import odd_models
import pytest
from odd_models import ADAPTERS, MODELS, Build, llama

HERE = Path(__file__).resolve().parent
SECONDS = 1.0  # of processor time: what a refusal may take


def built(cases: Mapping[str, tuple[Build, str, int]], root: Path) -> dict[str, str]:
    paths = {}
    for number, (name, (build, _, _)) in enumerate(cases.items()):
        folder = root / f"case{number}"
        folder.mkdir(parents=True)
        paths[name] = str(build(folder))
    return paths


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What each face said of each case; all in one process, in which nobody else has loaded torch."""
    root = tmp_path_factory.mktemp("odd")
    request = {
        "models": built(MODELS, root / "models"),
        "adapters": built(ADAPTERS, root / "adapters"),
        "base": str(llama(root / "base", _name_or_path="acme/base-7b")),
    }
    homes = {"GLMCHAT_HOME": str(root / "home"), "HF_HOME": str(root / "hf"), "HOME": str(root), "GLMCHAT_LANG": "en"}
    done = subprocess.run(
        [sys.executable, "-P", str(HERE / "refuse_all.py")],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": os.environ["PATH"], **homes},
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_a_sound_model_is_not_refused_by_any_face(told: Any) -> None:
    assert told["base"]["run"]["exit"] == "started" and told["base"]["window"]["started"]
    assert told["base"]["show"]["said"]["problem"] is None


@pytest.mark.parametrize("name", MODELS)
def test_what_is_no_model_is_refused_in_the_same_words_by_every_face(name: str, told: Any) -> None:
    _, code, number = MODELS[name]
    faces = told["models"][name]
    said = faces["run"]["said"]
    assert (said["code"], said["exit"], faces["run"]["exit"]) == (code, number, number)
    assert said["message"] and said["hint"]
    assert faces["run"]["lines"] == [f"glmchat: {said['message']}", f"  hint: {said['hint']}"]
    shown = faces["show"]["said"]
    for other in (shown.get("problem", shown), faces["window"]["said"]):
        assert (other["message"], other["hint"], other["code"]) == (said["message"], said["hint"], code)
    assert max(face["seconds"] for face in faces.values()) < SECONDS


@pytest.mark.parametrize("name", MODELS)
def test_what_does_not_run_gets_no_name_without_a_word(name: str, told: Any) -> None:
    run, add = told["models"][name]["run"]["said"], told["models"][name]["add"]
    assert isinstance(add["exit"], int)
    if name == "a pickle that runs code" or add["exit"] != 0:
        assert add["exit"] in (2, 3) and len(add["lines"]) == 2 and not add["said"].get("name")
    else:
        assert add["lines"] == [f"does not run: {run['message']}", f"what helps: {run['hint']}"]
    assert add["seconds"] < SECONDS


@pytest.mark.parametrize("name", ADAPTERS)
def test_what_is_no_adapter_for_a_model_is_refused_where_it_is_typed(name: str, told: Any) -> None:
    _, code, number = ADAPTERS[name]
    faces = told["adapters"][name]
    said = faces["run"]["said"]
    assert (said["code"], faces["run"]["exit"]) == (code, number) and said["message"] and said["hint"]
    assert faces["run"]["lines"] == [f"glmchat: {said['message']}", f"  hint: {said['hint']}"]
    assert faces["add"]["said"]["message"] == said["message"] and faces["add"]["exit"] == number
    assert max(face["seconds"] for face in faces.values()) < SECONDS


def test_nothing_heavy_was_loaded_and_nothing_came_into_the_store(told: Any) -> None:
    assert told["loaded"] == [] and told["store"] == []


@pytest.mark.parametrize("name", ["vision alone", "AQLM", "a tokenizer cut off", "GGUF of a mixture", "a picture"])
def test_the_command_itself_ends_within_a_second_of_processor_time(name: str, tmp_path: Path) -> None:
    build, _, number = MODELS[name]
    path = build(tmp_path)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-P", "-m", "glmchat", "run", str(path), "hi"], capture_output=True, text=True, check=False
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    lines = done.stderr.splitlines()
    assert done.returncode == number and done.stdout == "" and len(lines) == 2, done.stderr
    assert lines[0].startswith("glmchat: ") and lines[1].startswith("  hint: ")
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < SECONDS


def test_a_text_is_completed_by_a_model_whose_template_is_broken_or_missing(tmp_path: Path) -> None:
    from glmchat.chat.connect import require_fit
    from glmchat.core.engine_options import EngineOptions
    from glmchat.core.errors import GlmchatError

    broken = MODELS["a template that cannot be parsed"][0](tmp_path / "broken")
    base = odd_models.llama(tmp_path / "base")
    for folder, code in ((broken, "template.broken"), (base, "prompt.no_template")):
        require_fit(EngineOptions(folder=folder), "completion")
        with pytest.raises(GlmchatError) as caught:
            require_fit(EngineOptions(folder=folder), "answer")
        assert caught.value.code == code
    require_fit(EngineOptions(folder=base), "chat")


def test_a_variable_that_the_chat_format_never_reads_is_refused_with_those_that_it_reads(tmp_path: Path) -> None:
    from glmchat.checkpoints.fit import refuse_unheard, variables_at
    from glmchat.core.errors import FieldError

    template = "{% set date = date or 'x' %}{% if enable_thinking %}{{ messages[0].role }}{% endif %}{{ bos_token }}"
    chat = odd_models.write(odd_models.llama(tmp_path / "chat"), {"chat_template.jinja": template})
    assert variables_at(chat) == frozenset({"date", "enable_thinking"})
    refuse_unheard(chat, ("enable_thinking",))
    with pytest.raises(FieldError, match="does not read mood, tone") as caught:
        refuse_unheard(chat, ("tone", "mood", "date"))
    assert caught.value.hint == "it reads date, enable_thinking" and caught.value.param == "chat_template_kwargs"
    glm = odd_models.write(tmp_path / "glm", {"config.json": {"model_type": "chatglm"}})
    with pytest.raises(FieldError, match="does not read enable_thinking") as caught:
        refuse_unheard(glm, ("enable_thinking",))
    assert caught.value.hint.startswith("it reads none")


def test_what_the_settings_tell_every_template_is_told_only_to_those_that_read_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from glmchat.chat.sampling_choice import ranks_for_launch

    monkeypatch.setenv("GLMCHAT_TEMPLATE_VARIABLES", "enable_thinking=false")
    deaf = odd_models.write(odd_models.llama(tmp_path / "deaf"), {"chat_template.jinja": "{{ messages }}"})
    reads = odd_models.write(odd_models.llama(tmp_path / "reads"), {"chat_template.jinja": "{{ enable_thinking }}"})
    told = [ranks_for_launch({}, folder=folder).rank("environment") for folder in (deaf, reads)]
    assert [rank.get("template_variables", {}) for rank in told] == [{}, {"enable_thinking": False}]
