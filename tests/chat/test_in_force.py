"""What is in force, in words, and what fills the context: counts that agree with those of the engine.

Covers chat/in_force.py.
"""

from __future__ import annotations

import pytest
from speakers import LocalSpeaker

from glmchat.chat.history.history import History
from glmchat.chat.in_force import context_rows, marks, rows_in_force
from glmchat.chat.session import ChatSession, ModelIdentity


def open_chat(history: History, limit: int = 10_000) -> ChatSession:
    return ChatSession(history, LocalSpeaker("an ", "answer"), identity=ModelIdentity("m", context=limit))


def test_the_default_has_no_mark_and_each_change_has_one(history: History) -> None:
    chat = open_chat(history)
    assert marks(chat) == ()
    chat.set("temperature", "0.2")
    assert marks(chat) == ("temp 0.2",)
    chat.set("top_p", "0.9")
    chat.system("Be brief.")
    chat.set_context_policy("refuse")
    assert marks(chat) == ("temp 0.2 +1", "system prompt", "refuses when full")
    chat.set("top_k", "0")
    chat.set("min_p", "0")
    assert marks(chat)[0] == "precise"
    chat.reset()
    chat.set("temperature", "0.95")  # what holds anyway
    assert marks(chat) == ("system prompt", "refuses when full")


def test_what_is_in_force_names_value_and_who_gave_it(history: History) -> None:
    chat = open_chat(history)
    assert dict(rows_in_force(chat))["sampling"] == "the model's own"
    chat.set("temperature", "0.2")
    chat.system("Be brief.")
    rows = dict(rows_in_force(chat))
    assert rows["sampling"] == "temperature 0.2 (you)" and rows["system prompt"] == "Be brief."
    assert rows["adapters"] == "none" and rows["full context"] == "drops the oldest turns"


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("questions", [0, 1, 3])
def test_the_parts_add_up_to_what_the_engine_counts_of_the_request_that_is_then_sent(
    history: History, system: str | None, questions: int
) -> None:
    chat = open_chat(history)
    chat.system(system)
    for number in range(questions):
        list(chat.ask(f"question {number}"))
    parts = chat.weigh("the next one")
    assert parts.sent_turns == questions and parts.unsent_turns == 0
    list(chat.ask("the next one"))
    assert parts.tokens == chat.tree.path()[-1].details["prompt_tokens"]
    assert parts.tokens is not None and parts.room == 10_000 - parts.tokens


def test_turns_that_do_not_fit_or_stand_above_a_new_context_are_counted_as_not_sent(history: History) -> None:
    chat = open_chat(history, limit=120)
    for number in range(6):
        list(chat.ask(f"question {number}"))
    parts = chat.weigh("one more")
    assert parts.unsent_turns and parts.unsent and parts.sent_turns + parts.unsent_turns == 6
    assert parts.tokens is not None and parts.tokens <= 120
    chat.clear()
    after = chat.weigh()
    assert (after.sent_turns, after.unsent_turns) == (0, 6) and after.sent == 0
    assert dict(context_rows(after))["turns not sent"].endswith("(6 turns)")
