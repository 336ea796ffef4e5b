"""What is sent for a title, and which of a model's words are one.

Covers chat/turns.py.
"""

from __future__ import annotations

import pytest
from speakers import LocalSpeaker

from glmchat.chat.client.endpoint import Stop
from glmchat.chat.history.history import History
from glmchat.chat.session import ChatSession
from glmchat.chat.turns import TITLE_CELLS, title_in


@pytest.mark.parametrize(
    ("said", "question", "title"),
    [
        ("Cooking with eggs", "What can I cook?", "Cooking with eggs"),
        ('**Title:** "Cooking with eggs."\n\nIt is short.', "What can I cook?", "Cooking with eggs"),
        ("标题：《天空的颜色》", "天空为什么是蓝色的？", "天空的颜色"),
        ("C++ and Rust", "Compare them", "C++ and Rust"),
        ("", "What?", None),
        ("...", "What?", None),
        ("Here is a possible title:\n\nEggs", "What?", None),
        ("<think>The user wants", "What?", None),
        ("Lisbon: The City of the City of the City of Lisbon", "A trip", None),
        ("The sky", "天空为什么是蓝色的？", None),
        ("天空", "Why is the sky blue?", None),
        ("\x1b]0;owned\x07Eggs", "What?", None),
        ("Eggs \u202eevil", "What?", None),
        ("half \ufffd", "What?", None),
        ("word " * 9, "What?", None),
        ("请用不超过十个字为这段对话", "营业到几点？", None),  # what the model was asked, said again
        ("A title for this conversation", "What?", None),
        ("a longer title than anybody wants to read in a list", "What?", None),
        ("天" * (TITLE_CELLS // 2), "天？", "天" * (TITLE_CELLS // 2)),
        ("天" * (TITLE_CELLS // 2 + 1), "天？", None),
    ],
)
def test_a_title_is_a_few_words_in_the_language_of_the_question(said: str, question: str, title: str | None) -> None:
    assert title_in(said, question) == title


def answered(history: History, speaker: LocalSpeaker) -> ChatSession:
    session = ChatSession(history, speaker)
    list(session.ask("What can I cook?"))
    assert session.wants_title
    return session


def test_the_model_is_asked_behind_the_conversation_and_its_words_become_the_title(history: History) -> None:
    speaker = LocalSpeaker("Cooking ", "with eggs")
    session = answered(history, speaker)
    assert session.write_title(Stop(), lambda own: True)
    assert [m.content for m in speaker.asked[1]["messages"][:-1]] == ["What can I cook?", "Cooking with eggs"]
    assert session.tree.conversation.title == "Cooking with eggs"
    head = history.find(session.tree.conversation.id)
    assert head is not None and (head.title, head.renamed) == ("Cooking with eggs", False)
    assert not session.wants_title
    list(session.ask("And then?"))  # a later change brings no older title back
    assert history.load(head.id).conversation.title == "Cooking with eggs"


def test_a_name_that_a_person_gave_stays_also_where_another_window_gave_it_meanwhile(history: History) -> None:
    session = answered(history, LocalSpeaker("Cooking ", "with eggs"))
    other = history.load(session.tree.conversation.id)
    history.rename(other, "Supper")
    assert not session.write_title(Stop(), lambda own: True)
    list(session.ask("And then?"))
    head = history.find(other.conversation.id)
    assert head is not None and (head.title, head.renamed) == ("Supper", True)


def test_an_engine_that_others_wait_for_is_asked_for_no_title(history: History) -> None:
    speaker = LocalSpeaker("Cooking ", "with eggs")
    session = answered(history, speaker)
    assert not session.write_title(Stop(), lambda own: False)
    assert len(speaker.asked) == 1
    slow = LocalSpeaker("Cooking", " with", " eggs", seconds=0.3)
    session.reconnect(slow)
    assert not session.write_title(Stop(), lambda own: own == 0)  # somebody came while it wrote
    assert slow.closed == 1
    assert session.tree.conversation.title == "What can I cook?"


def test_what_is_stopped_or_cut_is_no_title(history: History) -> None:
    session = answered(history, LocalSpeaker("Cooking"))
    stop = Stop()
    stop.now()
    assert not session.write_title(stop, lambda own: True)
    session.reconnect(LocalSpeaker("Cooking with", finish="length"))
    assert not session.write_title(Stop(), lambda own: True)
    assert session.tree.conversation.title == "What can I cook?"
