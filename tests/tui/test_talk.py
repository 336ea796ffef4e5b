"""The conversation of the chat screen without the chat screen: what waits, what is written, and where it goes on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from parts import Stage, on_stage
from speakers import LocalSpeaker

from glmchat.chat.history.history import History
from glmchat.chat.session import ChatSession, ModelIdentity
from glmchat.core.errors import EngineDied, Usage
from glmchat.tui.messages import Ready


@pytest.fixture
def history() -> Iterator[History]:
    with History.default() as history:
        yield history


def session_over(history: History, speaker: LocalSpeaker) -> ChatSession:
    return ChatSession(history, speaker, identity=ModelIdentity("m", context=10_000))


def begin(stage: Stage, history: History, *pieces: str, **how: Any) -> ChatSession:
    speaker = LocalSpeaker(*pieces, **how)
    session = session_over(history, speaker)
    stage.begin(session, speaker)
    return session


SLOW = {"seconds": 0.01}
WORDS = ["word "] * 3000


async def test_a_question_without_a_model_waits_and_is_sent_when_one_is_there(history: History) -> None:
    async with on_stage() as stage:
        stage.talk.ask("early")
        assert list(stage.talk.queue) == ["early"]
        begin(stage, history, "an ", "answer")
        await stage.until(lambda: stage.said("assistant") == ["an answer"] and not stage.talk.busy)
        assert stage.said("user") == ["early"] and not stage.talk.queue


async def test_what_is_asked_while_an_answer_is_written_is_sent_when_it_has_ended(history: History) -> None:
    async with on_stage() as stage:
        begin(stage, history, *WORDS[:30], **SLOW)
        stage.talk.ask("one")
        stage.talk.ask("two")
        assert list(stage.talk.queue) == ["two"]
        await stage.until(lambda: stage.said("user") == ["one", "two"] and not stage.talk.busy)


async def test_a_piece_is_in_the_transcript_as_soon_as_it_is_heard(history: History) -> None:
    async with on_stage() as stage:
        begin(stage, history, *WORDS, **SLOW)
        stage.talk.ask("go")
        await stage.until(lambda: stage.talk.answering and stage.talk.answering.tokens)
        answering = stage.talk.answering
        assert answering is not None and answering.key is not None
        stage.talk.hear(answering)
        layout = stage.transcript.layout_of(answering.key)
        assert layout is not None and layout.turn.text.count("word ") == answering.tokens


async def test_an_answer_goes_on_behind_another_conversation_and_comes_back(history: History) -> None:
    async with on_stage() as stage:
        first = begin(stage, history, *WORDS, **SLOW)
        stage.talk.ask("go")
        await stage.until(lambda: any(stage.said("assistant")))
        stage.talk.turn_to(None)
        assert stage.talk.session is not first and not stage.talk.busy and first.streaming
        assert stage.status.facts.behind == ("go",)
        behind = stage.talk.behind[0]
        before = behind.tokens
        await stage.until(lambda: behind.tokens > before + 10)
        stage.talk.turn_to(first.tree.conversation.id)
        assert stage.talk.session is first and stage.talk.busy and not stage.talk.behind
        assert stage.said("assistant")[0].count("word ") >= before


async def test_what_changes_the_conversation_waits_until_the_answer_has_stopped(history: History) -> None:
    async with on_stage() as stage:
        session = begin(stage, history, *WORDS, **SLOW)
        stage.talk.ask("go")
        await stage.until(lambda: any(stage.said("assistant")))
        done: list[str] = []
        stage.talk.when_quiet(lambda: done.append(session.tree.path()[-1].state))
        assert not done
        await stage.until(lambda: done == ["stopped"])
        stage.talk.when_quiet(lambda: done.append("at once"))
        assert done == ["stopped", "at once"]


async def test_a_stop_before_the_answer_has_begun_is_not_lost(history: History) -> None:
    async with on_stage() as stage:
        session = begin(stage, history, *WORDS, **SLOW)
        stage.talk.ask("go")
        assert stage.talk.stop()
        await stage.until(lambda: not stage.talk.busy)
        assert session.tree.path()[-1].state == "stopped"


async def test_a_second_answer_is_refused_while_one_is_written(history: History) -> None:
    async with on_stage() as stage:
        session = begin(stage, history, *WORDS, **SLOW)
        stage.talk.ask("go")
        with pytest.raises(Usage, match="an answer is being written"):
            stage.talk.answer(session.ask("another"))


async def test_a_failure_after_some_words_keeps_them_and_is_shown(history: History) -> None:
    async with on_stage() as stage:
        begin(stage, history, "some ", "words ", "more", fail_after=2)
        stage.talk.ask("go")
        await stage.until(lambda: stage.errors)
        assert isinstance(stage.errors[0], EngineDied) and stage.said("assistant") == ["some words "]
        assert not stage.talk.busy and stage.connection.ready


async def test_an_engine_that_died_with_its_answer_is_lost_once_and_what_waits_stays(history: History) -> None:
    async with on_stage() as stage:
        session = begin(stage, history, "some ", "words ", "more", fail_after=2)
        stage.talk.ask("go")
        stage.talk.ask("and then")
        stage.link.lost = EngineDied("killed (signal 9)", hint="start it again")
        await stage.until(lambda: stage.errors)
        assert [error.message for error in stage.errors] == ["killed (signal 9)"]
        assert stage.status.facts.lost and not stage.connection.ready and list(stage.talk.queue) == ["and then"]
        speaker = LocalSpeaker("again")
        stage.connection.connected(Ready(speaker, session.identity))
        stage.talk.meet()
        await stage.until(lambda: stage.said("assistant") == ["some words ", "again"])


async def test_a_question_is_edited_and_leaving_it_changes_nothing(history: History) -> None:
    async with on_stage() as stage:
        session = begin(stage, history, "an ", "answer")
        stage.talk.ask("first words")
        await stage.until(lambda: not stage.talk.busy)
        question = session.tree.path()[0]
        stage.talk.edit(question)
        assert stage.prompt.text == "first words" and stage.is_editing
        stage.talk.stop_editing()
        assert not stage.is_editing and len(session.branches(question.id)[0]) == 1
        stage.talk.edit(question)
        stage.talk.ask_edited("other words")
        await stage.until(lambda: not stage.talk.busy and stage.said("user") == ["other words"])
        assert len(session.branches(question.id)[0]) == 2


async def test_nothing_can_be_done_to_a_history_that_is_not_open() -> None:
    async with on_stage() as stage:
        with pytest.raises(Usage, match="still being opened"):
            stage.talk.turn_to(None)
