"""A turn: stored before it is asked, streamed, stopped, continued, branched, undone.

Covers chat/turns.py, chat/answering.py, chat/stream.py.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from polling import wait_until
from speakers import LocalSpeaker

from glmchat.chat.answering import Begun, Done, SessionEvent, Trimmed
from glmchat.chat.client.endpoint import Stop
from glmchat.chat.history.history import History
from glmchat.chat.history.rows import StoredMessage, Tree
from glmchat.chat.sampling_choice import SamplingRanks
from glmchat.chat.session import ChatSession, ModelIdentity
from glmchat.core import kv_files
from glmchat.core.errors import DoesNotFit, EngineDied, ServerFailed, Usage
from glmchat.core.messages import Finished, Message, Piece, Started, StreamEvent


def talk(events: Iterable[SessionEvent]) -> list[SessionEvent]:
    return list(events)


def answer_of(events: Iterable[SessionEvent]) -> StoredMessage:
    done = talk(events)[-1]
    assert isinstance(done, Done)
    return done.answer


def said(session: ChatSession) -> list[tuple[str, str, str]]:
    return [(m.role, m.text, m.state) for m in session.tree.path()]


def test_an_answer_goes_from_question_to_done(history: History) -> None:
    speaker = LocalSpeaker("Hel", "lo 你", "好")
    session = ChatSession(history, speaker, identity=ModelIdentity("m", "rev", "int4"))
    events = talk(session.ask("hi"))
    assert [type(e) for e in events] == [Begun, Started, Piece, Piece, Piece, Finished, Done]
    answer = events[-1].answer  # type: ignore[union-attr]
    assert (answer.text, answer.state, answer.token_ids) == ("Hello 你好", "complete", (0, 1, 2))
    assert answer.details["model"] == "m" and answer.details["seed"] == 7
    assert answer.details["sampling"]["temperature"] == 0.95
    assert history.load(session.tree.conversation.id).path()[1] == answer
    talk(session.ask("again"))
    assert speaker.asked[1]["messages"] == [
        Message("user", "hi"), Message("assistant", "Hello 你好"), Message("user", "again")
    ]  # fmt: skip


ASK_BESIDE = """
import sys, time
sys.path[:0] = sys.argv[2:]
from pathlib import Path
from speakers import LocalSpeaker
from glmchat.chat.history.history import History
from glmchat.chat.session import ChatSession
from glmchat.core.errors import Usage
with History.open(Path(sys.argv[1])) as history:
    session = ChatSession(history, LocalSpeaker("their answer"), 1)
    for _ in range(200):
        try:
            list(session.ask("theirs"))
            break
        except Usage:  # refused, it asks again
            time.sleep(0.05)
"""


def test_between_the_look_for_other_windows_and_the_question_no_other_window_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "history.db"
    with History.open(path) as history:
        session = ChatSession(history, LocalSpeaker("an answer"))
        talk(session.ask("shared"))
        here, append, others = Path(__file__).parent, history.append, []

        def append_slowly(tree: Tree, role: str, text: str = "", **more: Any) -> StoredMessage:
            if text == "mine":
                argv = [sys.executable, "-P", "-c", ASK_BESIDE, str(path), str(here), str(here.parent)]
                others.append(subprocess.Popen(argv))
                with suppress(subprocess.TimeoutExpired):
                    others[0].wait(3.0)  # time for a whole answer
            return append(tree, role, text, **more)

        monkeypatch.setattr(history, "append", append_slowly)
        talk(session.ask("mine"))
        assert others[0].wait(20) == 0
        asked = [m.text for m in history.load(1).path() if m.role == "user"]
        assert asked == ["shared", "mine", "theirs"]
        assert [m.role for m in history.load(1).path()] == ["user", "assistant"] * 3


def test_a_question_that_the_file_does_not_take_is_asked_all_the_same(tmp_path: Path) -> None:
    with History.open(tmp_path / "history.db") as history:
        session = ChatSession(history, LocalSpeaker("an answer"))
        talk(session.ask("saved"))
        history.store.rows("PRAGMA query_only = ON")
        talk(session.ask("not saved"))
        assert [text for _, text, _ in said(session)] == ["saved", "an answer", "not saved", "an answer"]
        assert not history.saved
        history.store.rows("PRAGMA query_only = OFF")
        talk(session.ask("saved again"))
        assert history.saved and len(history.load(session.tree.conversation.id).path()) == 6


def test_the_question_is_on_the_disk_before_the_model_is_asked(history: History) -> None:
    seen: list[list[str]] = []

    class Looking(LocalSpeaker):
        def stream(self, *args: Any, **options: Any) -> Generator[StreamEvent, None, None]:
            seen.append([m.text for m in history.load(1).path()])
            return super().stream(*args, **options)

    talk(ChatSession(history, Looking(), identity=ModelIdentity(context=1000)).ask("remember me"))
    assert seen[0][0] == "remember me"


@pytest.mark.parametrize("silent", [True, False])
def test_stop_from_another_thread_ends_at_once_and_keeps_what_was_said(history: History, silent: bool) -> None:
    speaker = LocalSpeaker(*["word "] * 1000, seconds=0.02, silent=silent)
    session = ChatSession(history, speaker)
    events: list[SessionEvent] = []
    stopped: list[float] = []

    def stop() -> None:
        wait_until(lambda: speaker.asked if silent else any(isinstance(e, Piece) for e in events))
        stopped.append(time.monotonic())
        session.stop()

    threading.Thread(target=stop).start()
    for event in session.ask("go on"):
        events.append(event)
    assert time.monotonic() - stopped[0] < 5
    finished = next(e for e in events if isinstance(e, Finished))
    assert finished.finish_reason == "cancelled"
    pieces = "".join(e.text for e in events if isinstance(e, Piece))
    assert said(session)[-1] == ("assistant", pieces, "stopped")
    assert not session.streaming
    speaker.silent = False
    speaker.pieces = ("fine",)
    talk(session.ask("and now?"))  # the next turn is not stopped by the old stop
    assert said(session)[-1] == ("assistant", "fine", "complete")


def test_closing_the_generator_keeps_what_was_said(history: History) -> None:
    speaker = LocalSpeaker("one ", "two ", "three", seconds=0.01)
    session = ChatSession(history, speaker)
    answer = session.ask("count")
    for event in answer:
        if isinstance(event, Piece):
            break
    answer.close()
    assert said(session)[-1] == ("assistant", "one ", "stopped")
    assert not session.streaming


def test_a_dead_engine_keeps_the_answer_and_the_conversation_goes_on_with_another(history: History) -> None:
    session = ChatSession(history, LocalSpeaker("a", "b", "c", fail_after=2), identity=ModelIdentity("same"))
    with pytest.raises(EngineDied):
        talk(session.ask("hello"))
    assert said(session)[-1] == ("assistant", "ab", "failed")
    assert session.tree.path()[-1].details["error"]["code"] == "engine.died"
    speaker = LocalSpeaker("c")
    session.reconnect(speaker, ModelIdentity("same", quant="int4"))
    talk(session.continue_answer())
    assert "error" not in session.tree.path()[-1].details
    assert said(session)[-1] == ("assistant", "abc", "complete")
    assert speaker.asked[0]["continue_final"] and speaker.asked[0]["continue_ids"] == (0, 1)
    assert speaker.asked[0]["messages"][-1] == Message("assistant", "ab")
    assert session.tree.path()[-1].details["spans"] == [0, 2]


def test_another_model_continues_from_the_text_as_ids_mean_other_words_there(history: History) -> None:
    session = ChatSession(history, LocalSpeaker("a", finish="length"), identity=ModelIdentity("one"))
    talk(session.ask("hello"))
    session.reconnect(speaker := LocalSpeaker("b"), ModelIdentity("other"))
    talk(session.continue_answer())
    assert speaker.asked[0]["continue_ids"] == () and said(session)[-1][1] == "ab"
    assert history.conversations()[0].model == "other"


def test_a_failed_question_is_merged_with_the_next(history: History) -> None:
    session = ChatSession(history, LocalSpeaker(fail_after=0))
    with pytest.raises(EngineDied):
        talk(session.ask("first"))
    session.reconnect(speaker := LocalSpeaker())
    talk(session.ask("second"))
    assert speaker.asked[0]["messages"] == [Message("user", "first\n\nsecond")]


def test_an_answer_cut_at_the_limit_says_so_and_can_be_continued(history: History) -> None:
    session = ChatSession(history, LocalSpeaker("so", finish="length"))
    talk(session.ask("long"))
    assert said(session)[-1][2] == "cut"
    session.reconnect(LocalSpeaker(" on"))
    talk(session.continue_answer())
    assert said(session)[-1] == ("assistant", "so on", "complete")
    with pytest.raises(Usage):
        talk(session.continue_answer())


def test_regenerate_branches_with_a_changed_setting_for_that_answer_alone(history: History) -> None:
    session = ChatSession(history, speaker := LocalSpeaker("first"))
    talk(session.ask("q"))
    speaker.pieces = ("second",)
    talk(session.regenerate({"temperature": 0.0}))
    assert speaker.asked[1]["sampling"].temperature == 0.0
    assert session.sampling().sampling.temperature == 0.95
    assert said(session) == [("user", "q", "complete"), ("assistant", "second", "complete")]
    versions, at = session.branches(session.tree.path()[-1].id)
    assert [v.text for v in versions] == ["first", "second"] and at == 1
    session.switch(versions[0].id)
    assert said(session)[-1][1] == "first"
    talk(session.ask("next"))
    session.switch(versions[1].id)
    session.switch(versions[0].id)
    assert [m.text for m in session.tree.path()] == ["q", "first", "next", "second"]  # as deep as it was left


def test_an_edited_question_keeps_the_old_branch(history: History) -> None:
    session = ChatSession(history, speaker := LocalSpeaker("a"))
    talk(session.ask("one"))
    talk(session.ask("two"))
    first = session.tree.path()[0]
    talk(session.edit(first.id, "uno"))
    assert [m.text for m in session.tree.path()] == ["uno", "a"]
    assert speaker.asked[-1]["messages"] == [Message("user", "uno")]
    session.switch(first.id)
    assert [m.text for m in session.tree.path()] == ["one", "a", "two", "a"]


def test_undo_takes_back_the_last_turn_and_restore_brings_it_back(history: History) -> None:
    session = ChatSession(history, LocalSpeaker("a"))
    talk(session.ask("one"))
    talk(session.ask("two"))
    deletion = session.undo()
    assert [m.text for m in session.tree.path()] == ["one", "a"]
    session.restore(deletion)
    assert [m.text for m in session.tree.path()] == ["one", "a", "two", "a"]
    session.undo()
    session.undo()
    assert session.tree.path() == []
    with pytest.raises(Usage):
        session.undo()


def test_deleting_a_question_takes_its_answer_and_deleting_an_answer_only_itself(history: History) -> None:
    session = ChatSession(history, speaker := LocalSpeaker("a"))
    talk(session.ask("one"))
    talk(session.ask("two"))
    one, _, _, last = session.tree.path()
    session.delete(one.id)
    assert [m.text for m in session.tree.path()] == ["two", "a"]
    deletion = session.delete(last.id)
    assert [m.text for m in session.tree.path()] == ["two"]
    talk(session.regenerate())
    assert [m.text for m in session.tree.path()] == ["two", "a"]
    session.restore(deletion)
    talk(session.ask("three"))
    assert speaker.asked[-1]["messages"][0] == Message("user", "two")


def test_clear_empties_the_context_and_keeps_the_settings(history: History) -> None:
    session = ChatSession(history, speaker := LocalSpeaker("a"), system="Be kind.")
    assert session.clear() is None
    talk(session.ask("one"))
    assert session.clear() is not None
    assert session.clear() is None
    talk(session.ask("two"))
    assert speaker.asked[-1]["messages"] == [Message("system", "Be kind."), Message("user", "two")]
    assert [m.text for m in session.tree.path() if not m.is_clear] == ["one", "a", "two", "a"]
    assert session.new().path() == []
    assert session.system_prompt == "Be kind."  # a flag holds for the whole run
    assert len(history.conversations()) == 1


def test_only_one_answer_at_a_time(history: History) -> None:
    session = ChatSession(history, LocalSpeaker("a", "b", seconds=0.05))
    running = session.ask("one")
    next(running)
    for act in (lambda: talk(session.ask("two")), session.undo, session.clear):
        with pytest.raises(Usage) as wrong:
            act()
        assert wrong.value.code == "chat.busy"
    talk(running)
    talk(session.ask("two"))
    assert len(session.tree.path()) == 4


def test_settings_stay_with_the_conversation(history: History) -> None:
    ranks = SamplingRanks({"flag": {"top_p": 0.5}, "config": {"temperature": 0.1}})
    session = ChatSession(history, speaker := LocalSpeaker(), ranks=ranks)
    assert session.sampling().origins["temperature"] == "config"
    session.set("temp", "1.5")
    session.set("top-p", "0.9")  # the later word of the same person
    with pytest.raises(Usage):
        session.set("temperature", "hot")
    with pytest.raises(Usage):
        session.set("temperature", "99")
    with pytest.raises(Usage):
        session.set("warmth", "1")
    session.system("Answer in Chinese.")
    session.use_adapters([("poet", 0.5)])
    talk(session.ask("hello"))
    assert speaker.asked[0]["sampling"].temperature == 1.5 and speaker.asked[0]["sampling"].top_p == 0.9
    assert speaker.asked[0]["adapters"] == (("poet", 0.5),)
    assert speaker.asked[0]["messages"][0] == Message("system", "Answer in Chinese.")
    again = ChatSession(history, speaker, session.tree.conversation.id)
    assert again.sampling().sampling.temperature == 1.5
    assert again.sampling().origins["temperature"] == "conversation"
    assert again.system_prompt == "Answer in Chinese." and again.adapters == (("poet", 0.5),)
    again.reset("temp")
    assert again.sampling().sampling.temperature == 0.95
    flagged = ChatSession(history, speaker, again.tree.conversation.id, ranks=SamplingRanks({"flag": {"top_p": 0.1}}))
    assert flagged.sampling().sampling.top_p == 0.1


def test_a_server_that_was_chosen_by_adapter_name_keeps_its_adapter(history: History) -> None:
    session = ChatSession(history, far := LocalSpeaker(is_local=False))
    talk(session.ask("x"))
    assert far.asked[0]["adapters"] is None
    session.reconnect(near := LocalSpeaker())
    talk(session.ask("y"))
    assert near.asked[0]["adapters"] == ()


def test_whole_messages_are_sent_as_they_are_and_kept(history: History) -> None:
    given = [
        Message("system", "S"),
        Message("user", "a"),
        Message("user", "b"),
        Message("assistant", ""),
        Message("user", "c"),
    ]
    session = ChatSession(history, speaker := LocalSpeaker("d"))
    talk(session.ask_messages(given))
    assert speaker.asked[0]["messages"] == given
    assert [m.text for m in session.tree.path()] == ["S", "a", "b", "", "c", "d"]
    small = ChatSession(history, LocalSpeaker(context=3), identity=ModelIdentity(context=3))
    with pytest.raises(DoesNotFit) as wrong:
        talk(small.ask_messages(given))
    assert wrong.value.code == "context.exceeded"


def test_tools_that_a_system_message_offered_are_offered_again_in_the_next_turn(history: History) -> None:
    system = Message("system", "S", tools=({"type": "python"},))
    session = ChatSession(history, speaker := LocalSpeaker("a"))
    talk(session.ask_messages([system, Message("user", "q"), Message("tool", "22", "weather")]))
    talk(session.ask("and now?"))
    assert speaker.asked[1]["messages"][0] == system
    assert speaker.asked[1]["messages"][2] == Message("tool", "22", "weather")


def test_without_a_model_the_question_is_kept_and_told(history: History) -> None:
    session = ChatSession(history, None)
    with pytest.raises(Usage) as wrong:
        talk(session.ask("anyone?"))
    assert wrong.value.code == "chat.no_model"
    assert session.tree.path()[0].text == "anyone?"
    session.reconnect(LocalSpeaker("yes"))
    talk(session.regenerate())
    assert [m.text for m in session.tree.path()] == ["anyone?", "yes"]


def test_the_line_of_what_the_model_no_longer_sees_is_told_when_it_moves(history: History) -> None:
    speaker = LocalSpeaker("a" * 30, context=120)
    session = ChatSession(history, speaker, identity=ModelIdentity(context=120), system="S" * 10)
    moved = []
    for number in range(4):
        moved.append([e for e in talk(session.ask(f"{number}" * 20)) if isinstance(e, Trimmed)])
    assert moved[0] == [] and moved[1] == []
    path = session.tree.path()
    assert moved[2][0].unseen == (path[0].id, path[1].id)
    assert moved[3][0].unseen == tuple(m.id for m in path[:4])
    assert session.unseen == moved[3][0].unseen
    sent = speaker.asked[-1]["messages"]
    assert sent[0] == Message("system", "S" * 10) and sent[1] == Message("user", "2" * 20)
    assert session.tree.path()[-1].details["seen_from"] == path[4].id
    assert session.measure("x" * 20).unseen == tuple(m.id for m in path[:6])
    session.clear()
    assert session.unseen == ()


def test_the_refuse_policy_refuses_and_the_conversation_can_drop(history: History) -> None:
    speaker = LocalSpeaker("a" * 30, context=100)
    session = ChatSession(history, speaker, identity=ModelIdentity(context=100), context_policy="refuse")
    talk(session.ask("q" * 40))
    with pytest.raises(DoesNotFit) as wrong:
        talk(session.ask("q" * 40))
    assert wrong.value.exit == 4 and wrong.value.code == "context.exceeded"
    session.set_context_policy("drop")
    talk(session.regenerate())
    assert session.tree.path()[-1].state == "complete"


def test_a_server_that_cannot_count_is_believed_when_it_refuses(history: History) -> None:
    server = LocalSpeaker("a" * 10, counts=False, is_local=False, refuse_over=70)
    session = ChatSession(history, server, identity=ModelIdentity(context=None))
    for number in range(5):
        talk(session.ask(f"{number}" * 20))
    assert session.tree.path()[-1].state == "complete"
    assert sum(len(m.content) for m in server.asked[-1]["messages"]) <= 70
    assert session.unseen
    with pytest.raises(Exception, match="maximum context"):
        talk(session.ask("x" * 100))  # alone it is too long: said, not guessed


def test_an_answer_without_a_visible_word_can_be_replayed_too(history: History) -> None:
    class Wordless(LocalSpeaker):
        def stream(self, *_: object, **__: object) -> Generator[StreamEvent, None, None]:
            yield Started("m", prompt_ids=(5, 6), prompt_tokens=2)
            yield Piece("", (150004, 150004))
            yield Finished("length", facts={"passes": [[0, 2]], "seed": 7})

    session = ChatSession(history, Wordless())
    talk(session.ask("hi"))
    answer = session.tree.path()[-1]
    (record,) = answer.details["stretches"]
    assert answer.token_ids == (150004, 150004) and (record["start"], record["seed"]) == (0, 7)


@pytest.mark.parametrize("told_by", ["a later piece", "the end"])
def test_hashes_that_come_after_the_first_piece_stand_in_the_record(history: History, told_by: str) -> None:
    unknown = {"passes": [[0, 2]], "seed": 7, "weights": None, "settings": None}
    known = {**unknown, "weights": {"hash": "aa"}, "settings": {"config.json": "bb"}}

    class Hashing(LocalSpeaker):
        def stream(self, *_: object, **__: object) -> Generator[StreamEvent, None, None]:
            yield Started("m", prompt_ids=(5, 6), prompt_tokens=2)
            yield Piece("one ", (1,), unknown)
            yield Piece("two", (2,), known if told_by == "a later piece" else {})
            yield Finished("stop", facts=known) if told_by == "the end" else Finished("cancelled")

    session = ChatSession(history, Hashing())
    talk(session.ask("hi"))
    (record,) = history.load(session.tree.conversation.id).path()[-1].details["stretches"]
    assert (record["weights"], record["settings"]) == ({"hash": "aa"}, {"config.json": "bb"})


def test_a_completed_text_stands_in_the_history_but_in_no_other_request(history: History) -> None:
    session = ChatSession(history, speaker := LocalSpeaker(" a time"), system="S")
    talk(session.complete("Once upon"))
    assert speaker.asked[0]["messages"] == [Message("text", "Once upon")]
    assert said(session)[-1] == ("assistant", " a time", "complete")
    talk(session.ask("hello"))
    assert speaker.asked[1]["messages"] == [Message("system", "S"), Message("user", "hello")]
    speaker.finish = "length"
    talk(session.complete("Far"))
    talk(session.continue_answer())
    assert speaker.asked[-1]["messages"] == [Message("text", "Far a time")]
    talk(session.regenerate())
    assert speaker.asked[-1]["messages"] == [Message("text", "Far")]


def test_what_the_model_did_not_see_is_known_again_when_the_conversation_is_opened(history: History) -> None:
    identity = ModelIdentity(context=100)
    session = ChatSession(history, LocalSpeaker("a" * 30), identity=identity)
    for _ in range(3):
        talk(session.ask("q" * 20))
    assert session.unseen
    assert ChatSession(history, None, session.tree.conversation.id).unseen == session.unseen


def test_a_server_decides_what_nobody_set_and_nothing_is_made_up_for_the_record(history: History) -> None:
    ranks = SamplingRanks({"config": {"temperature": 0.1}})
    speaker = LocalSpeaker(is_local=False)
    session = ChatSession(history, speaker, ranks=ranks)
    answer = answer_of(session.ask("hello"))
    assert speaker.asked[0]["asked"] == {"temperature"}
    assert answer.details["sampling"] == {"temperature": 0.1}
    ours = LocalSpeaker()
    session.reconnect(ours)
    answer = answer_of(session.ask("hello"))
    assert ours.asked[0]["asked"] is None and answer.details["sampling"]["top_p"] == 0.7


def test_a_continuation_that_is_refused_leaves_the_answer_as_it_was(history: History) -> None:
    session = ChatSession(history, LocalSpeaker("half ", finish="length"))
    cut = answer_of(session.ask("hello"))
    session.reconnect(LocalSpeaker(refuse_over=0))
    with pytest.raises(ServerFailed):
        talk(session.continue_answer())
    now = session.tree.messages[cut.id]
    assert (now.text, now.state, now.owner) == ("half ", "cut", None) and now.can_continue


def test_a_conversation_that_is_saved_names_itself_for_its_cache_and_no_other_does(history: History) -> None:
    def named(history: History, *, one_shot: bool = False) -> list[str | None]:
        speaker = LocalSpeaker("a title")
        session = ChatSession(history, speaker, identity=ModelIdentity("m"))
        if one_shot:
            session.mark_one_shot()
        talk(session.ask("hi"))
        talk(session.ask("more"))
        talk(session.complete("Once"))
        session.write_title(Stop(), lambda mine: True)
        return [asked["conversation"] for asked in speaker.asked]

    first, second = named(history), named(history)
    assert len(first) >= 3 and len({*first}) == len({*second}) == 1 and first[0] and first[0] != second[0]
    alone, *gone_on = named(history, one_shot=True)
    assert alone is None and None not in gone_on
    with History.open(None) as forgotten:
        assert {*named(forgotten)} == {None}


@pytest.mark.parametrize("what", ["conversation", "answer"])
def test_what_is_deleted_leaves_no_cache_on_the_disk(history: History, what: str) -> None:
    speaker = LocalSpeaker()
    session = ChatSession(history, speaker, identity=ModelIdentity("m"))
    talk(session.ask("hi"))
    name = speaker.asked[0]["conversation"]
    kv_files.open_folder()
    mine, another = kv_files.kv_path("a" * 32, name), kv_files.kv_path("a" * 32, "0" * 32)
    for path in (mine, another):
        path.write_bytes(b"x")
    if what == "conversation":
        history.delete_conversation(session.tree.conversation.id)
    else:
        session.delete(session.tree.path()[-1].id)
    assert not mine.exists() and another.exists()
    assert kv_files.is_forgotten(name, 0.0)
