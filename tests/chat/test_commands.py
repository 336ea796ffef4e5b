"""The slash commands on a face that notes what it is asked to show: no window, no terminal.

Covers chat/commands/table.py, chat/commands/actions.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from noting_face import NotingFace
from speakers import LocalSpeaker

from glmchat.chat.commands import table
from glmchat.chat.commands.actions import Face
from glmchat.chat.history.history import History
from glmchat.chat.session import ChatSession, ModelIdentity
from glmchat.core.errors import GlmchatError, Usage


@pytest.fixture
def face(history: History) -> NotingFace:
    face = NotingFace(ChatSession(history, LocalSpeaker("an ", "answer"), identity=ModelIdentity("m", context=1000)))
    as_face: Face = face  # the protocol, as mypy sees it
    assert as_face.chat is face.chat
    return face


def messages(face: NotingFace) -> list[str]:
    return [m.text for m in face.chat.tree.path()]


def ask(face: NotingFace, text: str) -> None:
    list(face.chat.ask(text))


def test_what_undo_takes_redo_brings_back_also_from_another_conversation(face: NotingFace) -> None:
    ask(face, "one")
    first = face.chat.tree.conversation.id
    face.run("/undo")
    assert messages(face) == []
    face.run("/redo")
    assert messages(face) == ["one", "an answer"]
    face.run("/undo")
    face.run("/new")
    ask(face, "two")
    face.run("/redo")
    assert face.chat.tree.conversation.id == first and messages(face) == ["one", "an answer"]
    with pytest.raises(Usage, match="nothing to redo"):
        face.run("/redo")


def test_regen_gives_another_version_with_settings_of_its_own(face: NotingFace) -> None:
    ask(face, "one")
    face.run("/regen temp=0.25 top-k=3")
    versions, _ = face.chat.branches(face.chat.tree.path()[-1].id)
    assert [m.details["sampling"]["temperature"] for m in versions] == [0.95, 0.25]
    assert face.chat.sampling().sampling.temperature == 0.95
    with pytest.raises(Usage):
        face.run("/regen temp=99")
    assert len(face.chat.branches(versions[0].id)[0]) == 2


def test_regen_with_a_number_lets_one_of_so_many_answers_be_chosen(face: NotingFace) -> None:
    ask(face, "one")
    face.run("/set seed 7")
    face.run("/regen 3 temp=0.5")
    assert face.told("versions") == [(3, ("temp=0.5",), 7)]
    for line, words in (
        ("/regen 1", "from 2 to 9"), ("/regen 10", "from 2 to 9"), ("/regen 0", "from 2 to 9"),
        ("/regen 3 temp=0", "same"), ("/regen 2 temp=99", "temperature"),
    ):  # fmt: skip
        with pytest.raises(Usage, match=words):
            face.run(line)
    assert len(face.told("versions")) == 1 and len(face.chat.branches(face.chat.tree.path()[-1].id)[0]) == 1


def test_edit_asks_in_the_given_words_or_lets_the_face_edit(face: NotingFace) -> None:
    with pytest.raises(Usage, match="no question to edit"):
        face.run("/edit")
    ask(face, "one")
    face.run("/edit")
    assert face.told("edit") == ["one"]
    face.run("/edit other words")
    assert messages(face) == ["other words", "an answer"]


@pytest.mark.parametrize("line", ["/regen", "/continue", "/edit other", "/complete Once"])
def test_what_needs_a_model_changes_nothing_without_one(face: NotingFace, line: str) -> None:
    ask(face, "one")
    face.is_ready = False
    with pytest.raises(Usage) as refused:
        face.run(line)
    assert refused.value.code == "chat.not_ready"
    assert messages(face) == ["one", "an answer"] and not face.told("event") + face.told("completion")


@pytest.mark.parametrize("line", ["/set temp 0.3", "/set temperature=0.3", "/set parameter temperature 0.3"])
def test_a_setting_is_changed_shown_and_forgotten(face: NotingFace, line: str) -> None:
    face.run("/set temp")
    face.run(line)
    face.run("/set temp")
    face.run("/reset temp")
    assert face.told("line") == [
        "temperature 0.95", "temperature is 0.3, starting with the next answer", "temperature 0.3",
        "temperature is back to its value before /set",
    ]  # fmt: skip
    assert face.chat.sampling().sampling.temperature == 0.95
    face.run("/set")
    assert face.told("dialog") == ["sampling"]


def test_what_the_template_is_told_is_set_by_its_own_name(face: NotingFace) -> None:
    face.run("/set enable_thinking")
    face.run("/set enable_thinking off")
    face.run("/set reasoning-effort low")
    assert face.chat.sampling().sampling.template_variables == {"enable_thinking": False, "reasoning_effort": "low"}
    face.run("/set enable_thinking")
    assert face.told("line")[0] == "enable_thinking not set" and face.told("line")[-1] == "enable_thinking off"
    face.run("/set template_variables style=brief")
    assert face.chat.sampling().sampling.template_variables == {"style": "brief"}
    face.run("/reset template_variables")
    assert not face.chat.sampling().sampling.template_variables


def test_the_system_prompt_is_set_shown_and_removed(face: NotingFace) -> None:
    face.run("/system Be brief.")
    assert face.chat.system_prompt == "Be brief."
    face.run("/system")
    assert "system prompt: Be brief." in face.told("line")
    face.run("/system none")
    assert face.chat.system_prompt is None


def test_the_context_is_measured_cleared_and_its_policy_changed(face: NotingFace) -> None:
    face.run("/clear")
    assert face.told("line") == ["the context is empty already"]
    ask(face, "12345")
    face.run("/context")
    [shown] = face.told("table")
    assert isinstance(shown, tuple)
    title, table, _ = shown
    assert title == "the next request, in tokens" and table["next request"] == "14 of 1,000"
    face.run("/clear")
    assert face.told("mark") == [True] and not face.chat.tree.context()
    face.run("/policy")
    assert face.chat.context_policy == "refuse"
    face.run("/context drop")
    assert face.chat.context_policy == "drop"


def test_conversations_are_named_opened_and_exported(face: NotingFace, tmp_path: Path) -> None:
    ask(face, "one")
    number = face.chat.tree.conversation.id
    face.run("/save 标题")
    assert face.told("title") == ["标题"]
    face.run("/new")
    face.run(f"/load {number}")
    assert messages(face) == ["one", "an answer"]
    face.run("/load")
    face.run("/load words of it")
    assert face.told("dialog") == ["conversations", "conversations words of it"]
    face.run(f"/export md {tmp_path / 'out.md'}")
    assert "an answer" in (tmp_path / "out.md").read_text(encoding="utf-8")
    with pytest.raises(GlmchatError):
        face.run("/load 99")


def test_the_details_of_an_answer_need_an_answer(face: NotingFace) -> None:
    with pytest.raises(Usage, match="there is no answer yet"):
        face.run("/stats")
    ask(face, "one")
    face.run("/stats")
    (details,) = face.told("details")
    assert isinstance(details, dict) and details["model"] == "m"


def test_every_command_without_an_action_says_how_the_same_is_had_without_a_window() -> None:
    window_only = {c.name for c in table.COMMANDS if c.run is None}
    assert window_only == {
        "stop", "copy", "quote", "preset", "model", "compare", "restart", "find", "delete", "theme", "editor", "tune",
        "eval",
    }  # fmt: skip
    assert all(c.instead for c in table.COMMANDS if c.run is None)
