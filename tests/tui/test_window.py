"""The window over the real session and endpoint; a fake engine in a real child process answers.

Covers tui/screens/chat.py, tui/screens/help.py, tui/screens/sampling.py, tui/composer.py, tui/widgets/actions.py,
tui/widgets/prompt.py, tui/widgets/sidebar.py, tui/widgets/suggestions.py, tui/answering.py, tui/connection.py,
tui/conversation.py, tui/face.py, tui/messages.py, tui/reading.py, tui/talk.py, tui/view.py, tui/steady.py.
"""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.color import Color
from textual.geometry import Offset
from textual.widgets import OptionList
from windows import ENDLESS, LAUNCH, Window, hold_reading, make_app, open_window

from glmchat.chat import connect
from glmchat.chat.commands.table import COMMANDS
from glmchat.chat.history.history import History
from glmchat.core import language, locations
from glmchat.core.settings import Settings
from glmchat.tui import terminal
from glmchat.tui.screens.help import HelpScreen
from glmchat.tui.screens.sampling import PRESETS, PresetLine, SamplingScreen
from glmchat.tui.widgets.actions import TurnActions
from glmchat.tui.widgets.sidebar import Sidebar
from glmchat.tui.widgets.suggestions import Suggestions

SLOW: dict[str, Any] = {"pieces": ["word "] * 400, "seconds_per_token": 0.02}


async def test_a_question_is_answered_and_stored() -> None:
    async with open_window(child=True, pieces=["Hel", "lo ", "**you**", " 你", "好"]) as window:
        await window.ask("hi")
        assert window.said("user") == ["hi"]
        assert window.said("assistant") == ["Hello **you** 你好"]
        facts = window.chat.status.facts
        assert facts.speed is not None and facts.first_token is not None and facts.used is not None
        assert facts.limit == 4096
    with History.default() as history:
        last = history.last()
        assert last is not None and last.title == "hi"
        assert [m.text for m in history.load(last.id).path()] == ["hi", "Hello **you** 你好"]


async def test_the_window_is_drawn_and_takes_text_before_the_model_is_there() -> None:
    async with open_window(wait=False, seconds_to_load=1) as window:
        assert not window.chat.connection.ready
        await window.send("early")
        assert list(window.chat.talk.queue) == ["early"]
        await window.until(lambda: "early" in window.screen_text())
        await window.until(lambda: window.said("assistant") == ["one two"])
        assert not window.chat.talk.queue


@pytest.mark.parametrize("key", ["escape", "ctrl+c"])
async def test_stopping_keeps_what_was_said_and_continue_goes_on(key: str) -> None:
    async with open_window(**SLOW) as window:
        await window.send("go")
        await window.until(lambda: "word" in window.said("assistant")[-1] if window.said("assistant") else False)
        await window.press(key)
        await window.until(lambda: not window.chat.talk.busy)
        said = window.said("assistant")[-1]
        assert said.startswith("word")
        assert "stopped" in window.turns[-1].note
        await window.send("/continue")
        await window.until(lambda: len(window.said("assistant")[-1]) > len(said))
        await window.press("escape")
        await window.until(lambda: not window.chat.talk.busy)
        assert window.said("user") == ["go"]


@pytest.mark.parametrize(("keys", "title"), [(("enter",), "bravo question"), (("2", "enter"), "alpha question")])
async def test_the_last_conversations_are_listed_and_chosen_before_a_session_can_be_opened(
    keys: tuple[str, ...], title: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with History.default() as history:
        for name in ("alpha", "bravo"):
            history.append(history.new(), "user", f"{name} question")
    go_on = hold_reading(monkeypatch, connect, "open_session")
    async with open_window(wait=False) as window:
        await window.until(lambda: "bravo question" in window.screen_text())
        await window.press(*keys)
        assert window.chat.talk.session is None and not window.said("user")
        go_on.set()
        await window.until(lambda: window.said("user") == [title])
        assert window.chat.prompt.text == ""


async def test_while_an_answer_streams_text_is_queued_and_commands_act_at_once() -> None:
    async with open_window(**SLOW) as window:
        await window.send("go")
        await window.until(lambda: window.chat.talk.answering)
        await window.send("next question")
        assert list(window.chat.talk.queue) == ["next question"]
        await window.until(lambda: "next question" in window.screen_text())
        await window.send("/context refuse")
        assert "refused" in window.notices
        await window.press("up")
        await window.until(lambda: window.chat.prompt.text == "next question" and not window.chat.talk.queue)
        await window.press("enter")
        await window.send("/stop")
        await window.until(lambda: window.said("user") == ["go", "next question"])


async def test_an_unknown_command_stays_in_the_prompt_and_never_reaches_the_model() -> None:
    async with open_window() as window:
        await window.send("/hlep me")
        assert "there is no command /hlep" in window.notices and "/help" in window.notices
        assert window.chat.prompt.text == "/hlep me"
        assert not window.said("user")
        window.chat.prompt.set_text("")
        await window.ask("//etc/hosts")
        assert window.said("user") == ["/etc/hosts"]


async def test_the_bare_words_of_other_programs_are_sent_as_text_with_a_hint() -> None:
    async with open_window() as window:
        await window.ask("clear")
        assert window.said("user") == ["clear"]
        assert "the command is /clear" in window.notices


async def test_every_command_is_done_by_the_window() -> None:
    async with open_window() as window:
        window_only = {c.name for c in COMMANDS if c.run is None}
        assert window_only == set(window.chat.face._own)


async def test_clear_begins_an_empty_context_and_deletes_nothing() -> None:
    async with open_window(echo=True) as window:
        await window.ask("first")
        await window.press("ctrl+l")
        await window.ask("second")
        session = window.chat.talk.session
        assert session is not None
        assert [m.text for m in session.tree.context()] == ["second", "second"]
        assert window.said("user") == ["first", "second"]
        assert "new context" in window.said("rule")


async def test_new_begins_another_conversation() -> None:
    async with open_window() as window:
        await window.ask("first")
        await window.press("ctrl+n")
        assert not window.said("user")
        await window.ask("second")
    with History.default() as history:
        assert [c.title for c in history.conversations()] == ["second", "first"]


async def test_quitting_needs_a_word_or_a_key_of_its_own() -> None:
    async with open_window() as window:
        await window.press("ctrl+c")
        await window.press("escape")
        assert window.app.is_running
        await window.type("x")
        await window.press("ctrl+d")
        assert window.app.is_running
        window.chat.prompt.set_text("")
        await window.press("ctrl+d")
        await window.until(lambda: not window.app.is_running)


async def test_the_earlier_conversations_are_listed_before_anything_is_asked() -> None:
    async with open_window(echo=True) as window:
        await window.ask("an earlier one")
    async with open_window(echo=True) as window:
        await window.press("ctrl+b")
        await window.until(lambda: "an earlier one" in window.screen_text())


@pytest.mark.parametrize("keys", [("ctrl+q",), ("f1", "ctrl+q"), ("f2", "ctrl+q"), ("f4", "ctrl+q")], ids=str)
async def test_ctrl_q_leaves_from_everywhere_and_keeps_what_stands_in_the_prompt(keys: tuple[str, ...]) -> None:
    async with open_window(echo=True) as window:
        await window.ask("one")
        await window.type("half a thought")
        session = window.chat.talk.session
        assert session is not None
        await window.press(*keys)
        await window.until(lambda: window.app.return_value == 0)
        await window.until(lambda: session.tree.conversation.draft == "half a thought")


@pytest.mark.parametrize("line", ["/quit", "/bye", "/exit"])
async def test_the_words_for_leaving(line: str) -> None:
    async with open_window() as window:
        await window.send(line)
        await window.until(lambda: window.app.return_value == 0)


async def test_a_killed_engine_is_told_and_restarted_with_the_conversation_kept() -> None:
    async with open_window(child=True, **SLOW) as window:
        await window.send("go")
        await window.until(lambda: "word" in window.said("assistant")[-1] if window.said("assistant") else False)
        process = window.chat.connection.link.process
        assert process is not None
        os.kill(process.pid, signal.SIGKILL)
        await window.until(lambda: window.chat.status.facts.lost)
        assert "killed (signal 9)" in window.notices
        assert window.said("assistant")[-1].startswith("word")
        await window.send("again")
        await window.until(lambda: "press F5 to start the engine and send it" in window.screen_text())
        await window.press("f5")
        await window.ready()
        await window.until(lambda: len(window.said("assistant")) == 2 and window.said("assistant")[-1])
        assert window.said("user") == ["go", "again"]


async def test_an_engine_that_cannot_load_says_why() -> None:
    failure = {"code": "engine.memory", "message": "needs 13.4 GB, 8.0 GB free", "hint": "try --quant 4", "exit": 4}
    async with open_window(wait=False, child=True, load_failure=failure) as window:
        await window.until(lambda: window.chat.status.facts.lost)
        assert "needs 13.4 GB" in window.notices and "--quant 4" in window.notices


async def test_a_setting_changes_the_next_answer() -> None:
    async with open_window() as window:
        await window.send("/set temp 0.3")
        await window.send("/set top-p=0.5")
        session = window.chat.talk.session
        assert session is not None
        chosen = session.sampling()
        assert (chosen.sampling.temperature, chosen.sampling.top_p) == (0.3, 0.5)
        await window.send("/set temp 99")
        assert "must be between 0 and 5" in window.notices
        await window.ask("x")
        assert session.tree.path()[-1].details["sampling"]["temperature"] == 0.3
        await window.send("/reset")
        assert session.sampling().origins["temperature"] != "set"


async def test_the_sampling_panel_sets_explains_and_refuses() -> None:
    async with open_window() as window:
        await window.press("f2")
        panel = window.app.screen
        assert isinstance(panel, SamplingScreen)
        await window.until(lambda: panel.focused)
        await window.press(*"0.25", "enter")
        session = window.chat.talk.session
        assert session is not None
        await window.until(lambda: session.sampling().sampling.temperature == 0.25)
        await window.press(*"7", "enter")
        assert session.sampling().sampling.top_p != 7
        await window.press("f7")
        await window.until(lambda: session.sampling().sampling.min_p == 0.05)
        await window.press("escape")
        await window.until(lambda: not isinstance(window.app.screen, SamplingScreen))


async def test_regenerate_keeps_both_answers_and_one_walks_between_them() -> None:
    async with open_window(echo=True) as window:
        await window.ask("one")
        await window.send("/regen temp=0.1")
        await window.until(lambda: not window.chat.talk.busy and "version 2 of 2" in window.turns[-1].note)
        window.chat.transcript.make_current(window.turns[-1].key)
        await window.settle()
        await window.press("left")
        await window.until(lambda: "version 1 of 2" in window.turns[-1].note)


async def test_an_edited_question_is_a_new_branch() -> None:
    async with open_window(echo=True) as window:
        await window.ask("first words")
        await window.send("/edit")
        assert window.chat.prompt.text == "first words"
        window.chat.prompt.set_text("other words")
        await window.press("enter")
        await window.until(lambda: window.said("assistant") == ["other words"] and not window.chat.talk.busy)
        assert window.said("user") == ["other words"]
        assert "version 2 of 2" in window.turns[0].note


async def test_an_edited_question_waits_in_the_prompt_while_no_engine_answers() -> None:
    async with open_window(child=True, echo=True) as window:
        await window.ask("first words")
        await window.send("/edit")
        process = window.chat.connection.link.process
        assert process is not None
        os.kill(process.pid, signal.SIGKILL)
        await window.until(lambda: window.chat.status.facts.lost)
        window.chat.prompt.set_text("other words")
        await window.press("enter")
        await window.until(lambda: "the model is not ready" in window.notices)
        assert window.chat.prompt.text == "other words" and not window.chat.talk.queue
        await window.until(lambda: "editing a question" in window.screen_text())
        await window.press("f5")
        await window.ready()
        await window.press("enter")
        await window.until(lambda: window.said("assistant") == ["other words"] and not window.chat.talk.busy)
        assert window.said("user") == ["other words"] and "version 2 of 2" in window.turns[0].note


async def test_a_question_edited_while_the_engine_loads_is_not_sent_as_a_new_one() -> None:
    with History.default() as history:
        tree = history.new()
        history.append(tree, "user", "first words")
        conversation = tree.conversation.id
    launch = replace(LAUNCH, resume=conversation)
    async with open_window(launch=launch, wait=False, seconds_to_load=2, echo=True) as window:
        await window.until(lambda: window.said("user") == ["first words"])
        await window.send("/edit")
        window.chat.prompt.set_text("other words")
        await window.press("enter")
        await window.until(lambda: "the model is still loading" in window.notices)
        assert not window.chat.connection.ready and not window.chat.talk.queue
        assert window.chat.prompt.text == "other words"
        await window.ready()
        await window.press("enter")
        await window.until(lambda: window.said("assistant") == ["other words"] and not window.chat.talk.busy)
        assert window.said("user") == ["other words"]


async def test_undo_takes_back_a_turn_and_redo_brings_it_back() -> None:
    async with open_window() as window:
        await window.ask("one")
        await window.send("/undo")
        assert not window.said("user")
        await window.send("/redo")
        assert window.said("user") == ["one"]


async def test_a_paste_of_ten_thousand_chinese_characters_is_one_message() -> None:
    text = ("量化把权重压缩到四位整数。\n" * 770)[:10_000]
    async with open_window(echo=True, context=20_000) as window:
        window.app.post_message(events.Paste(text.replace("\n", "\r\n")))
        await window.until(lambda: len(window.chat.prompt.text) == len(text))
        assert window.chat.prompt.size.height <= 12
        await window.press("enter")
        await window.until(lambda: window.said("user") == [text])
        await window.until(lambda: not window.chat.talk.busy)
        assert text.startswith(window.said("assistant")[0][:2000])


@pytest.mark.parametrize("elsewhere", ["transcript", "sidebar"])
async def test_a_paste_reaches_the_prompt_wherever_the_focus_is(elsewhere: str) -> None:
    async with open_window() as window:
        await window.ask("one")
        if elsewhere == "transcript":
            window.chat.transcript.focus()
        else:
            await window.press("ctrl+b")
        prompt = window.chat.prompt
        await window.until(lambda: not prompt.has_focus)
        window.app.post_message(events.Paste("a\tb\r\nc"))
        await window.until(lambda: prompt.text == "a\tb\nc")
        assert prompt.has_focus
        await window.press("x", "ctrl+underscore")  # what a shell takes back with it; Ctrl+Z stops the window
        await window.until(lambda: prompt.text == "a\tb\nc")


async def test_typing_a_slash_suggests_and_tab_takes() -> None:
    async with open_window() as window:
        await window.press("/", "s", "y")
        suggestions = window.chat.query_one(Suggestions)
        await window.until(lambda: suggestions.chosen is not None and suggestions.chosen.shown == "/system")
        await window.press("tab")
        await window.until(lambda: window.chat.prompt.text == "/system " and not suggestions.display)
        await window.type("Be brief.")
        await window.press("enter")
        assert window.chat.talk.session is not None and window.chat.talk.session.system_prompt == "Be brief."


async def test_newlines_and_earlier_prompts() -> None:
    async with open_window() as window:
        await window.type("a")
        await window.press("ctrl+j")
        await window.type("b")
        assert window.chat.prompt.text == "a\nb"
        await window.ask("")
        await window.type("draft")
        await window.press("up")
        await window.until(lambda: window.chat.prompt.text == "a\nb")
        await window.press("down", "down")
        await window.until(lambda: window.chat.prompt.text == "draft")


async def test_enter_can_be_a_newline_for_people_who_write_with_an_input_method() -> None:
    async with open_window(settings=Settings(enter_sends=False)) as window:
        await window.type("你")
        await window.press("enter")
        await window.type("好")
        assert window.chat.prompt.text == "你\n好"
        await window.press("alt+enter")
        await window.until(lambda: window.said("user") == ["你\n好"])
        await window.until(lambda: not window.chat.talk.busy)
        await window.type("再见")
        await window.press("f5")  # restarts the engine only where the prompt is empty
        await window.until(lambda: window.said("user")[-1] == "再见" and not window.chat.talk.busy)
        assert window.chat.connection.ready


async def test_keys_can_be_remapped_in_the_config() -> None:
    async with open_window(settings=Settings(keys={"new": "f8"})) as window:
        await window.ask("one")
        await window.press("f8")
        assert not window.said("user")


async def test_an_interrupted_conversation_is_offered_in_one_line_and_continued() -> None:
    with History.default() as history:
        tree = history.new("smollm2")
        question = history.append(tree, "user", "unfinished business")
        history.begin_answer(tree, parent=question.id)
        answer = tree.path()[-1]
        history.add_piece(tree, answer, "half an ans")
        history.finish_answer(tree, answer, "interrupted")
    async with open_window() as window:
        await window.until(lambda: "unfinished business" in window.notices)
        await window.send("/resume")
        assert window.said("assistant") == ["half an ans"]
        await window.send("/continue")
        await window.until(lambda: not window.chat.talk.busy and window.said("assistant") == ["half an ansone two"])


async def test_a_model_that_knows_only_english_says_so_once_to_a_chinese_question() -> None:
    async with open_window() as window:
        await window.ask("你好吗")
        await window.ask("再见")
        assert window.notices.count("speaks only English") == 1


async def test_the_interface_speaks_chinese() -> None:
    language.choose("zh")
    try:
        async with open_window() as window:
            assert "发送" in window.screen_text()
            assert "speaks only English" not in window.notices and window.notices
    finally:
        language.choose(None)


async def test_the_sidebar_finds_opens_renames_and_deletes_with_undo() -> None:
    async with open_window(echo=True) as window:
        await window.ask("量化是什么")
        await window.press("ctrl+n")
        await window.ask("weather")
        await window.press("ctrl+b")
        sidebar = window.chat.query_one(Sidebar)
        assert len(sidebar.targets) == 2
        await window.press("d")
        assert len(sidebar.targets) == 1
        await window.press("u")
        assert len(sidebar.targets) == 2
        await window.press("escape")
        await window.send("/find 量化")
        await window.until(lambda: sidebar.targets)
        await window.press("enter", "enter")
        await window.until(lambda: "量化是什么" in window.said("user"))
        await window.press("escape")
        await window.send("/save 新标题")
        assert window.chat.talk.session is not None and window.chat.talk.session.tree.conversation.title == "新标题"


@pytest.mark.parametrize("keys", [("d",), ("p",), ("r",), ("enter",)])
async def test_a_conversation_that_another_window_removed_is_told_and_leaves_the_list(keys: tuple[str, ...]) -> None:
    async with open_window(echo=True) as window:
        await window.ask("removed elsewhere")
        await window.press("ctrl+n")
        await window.ask("stays")
        await window.press("ctrl+b")
        sidebar = window.chat.query_one(Sidebar)
        listing = sidebar.query_one(OptionList)
        await window.until(lambda: len(sidebar.targets) == 2 and listing.has_focus)
        listing.highlighted = 1
        with History.default() as elsewhere:
            elsewhere.delete_conversation(sidebar.targets[1][0])
        await window.press(*keys)
        await window.until(lambda: len(sidebar.targets) == 1)
        await window.until(lambda: "there is no conversation" in window.toasts + window.notices)
        assert window.said("user") == ["stays"]
        await window.press("escape")
        await window.ask("and goes on")
        assert window.said("user") == ["stays", "and goes on"]


async def test_a_conversation_that_is_removed_while_its_title_is_written_is_told() -> None:
    async with open_window(echo=True) as window:
        await window.ask("removed elsewhere")
        await window.press("ctrl+n")
        await window.ask("stays")
        await window.press("ctrl+b")
        sidebar = window.chat.query_one(Sidebar)
        listing = sidebar.query_one(OptionList)
        await window.until(lambda: len(sidebar.targets) == 2 and listing.has_focus)
        listing.highlighted = 1
        await window.press("r", "x")
        with History.default() as elsewhere:
            elsewhere.delete_conversation(sidebar.targets[1][0])
        await window.press("enter")
        await window.until(lambda: len(sidebar.targets) == 1 and listing.has_focus)
        await window.until(lambda: "there is no conversation" in window.toasts + window.notices)


async def test_a_catalogue_that_cannot_be_read_is_told_and_the_window_stays() -> None:
    async with open_window(echo=True) as window:
        file = locations.config_dir() / "models.toml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("models = 3 = 4")
        await window.press("f4")
        await window.until(lambda: "fix the file or move it out of the way" in window.screen_text())
        await window.press("escape")
        await window.until(lambda: window.app.screen is window.chat)
        await window.ask("still here")
        assert window.said("assistant") == ["still here"]


async def test_a_file_goes_into_the_prompt_and_a_binary_one_does_not(tmp_path: Path) -> None:
    note = tmp_path / "笔记.txt"
    note.write_text("hello ``` world")
    blob = tmp_path / "x.bin"
    blob.write_bytes(b"\xff\xfe\x00")
    async with open_window() as window:
        await window.send(f"/file {note}")
        assert "hello ``` world" in window.chat.prompt.text and "````" in window.chat.prompt.text
        assert not window.said("user")
        window.chat.prompt.set_text("")
        await window.send(f"/file {blob}")
        assert "not UTF-8" in window.notices
        await window.send(f"/file {tmp_path}/none")
        assert "cannot be read" in window.notices
        blob.write_bytes(b"x" * 1_000_001)
        await window.send(f"/file {blob}")
        assert f"{blob} is larger than 1.0 MB" in window.notices and not window.chat.prompt.text


async def test_the_help_is_made_from_the_table() -> None:
    async with open_window(size=(100, 60)) as window:
        await window.press("f1")
        await window.until(lambda: "/regen" in window.screen_text())
        assert isinstance(window.app.screen, HelpScreen)
        assert "/regen" in window.screen_text() and "Ctrl+N" in window.screen_text()
        await window.press("escape")


@pytest.mark.parametrize("size", [(1, 1), (8, 4), (40, 12), (300, 80)])
async def test_every_size_works_while_an_answer_streams(size: tuple[int, int]) -> None:
    async with open_window(pieces=["**w** 量化 "] * 500, seconds_per_token=0.02) as window:
        await window.send("go")
        await window.until(lambda: any(window.said("assistant")))
        await window.pilot.resize_terminal(*size)
        await window.until(lambda: window.app.screen.size == size)
        before = len(window.said("assistant")[0])
        await window.until(lambda: len(window.said("assistant")[0]) > before + 50)
        await window.pilot.resize_terminal(80, 24)
        await window.press("escape")
        await window.until(lambda: not window.chat.talk.busy)
        assert window.said("assistant")[0].startswith("**w** 量化 ")
        assert "stopped" in window.screen_text()


async def test_without_history_nothing_is_written() -> None:
    async with open_window(launch=replace(LAUNCH, history=False)) as window:
        await window.ask("secret")
    with History.default() as history:
        assert history.last() is None


async def test_a_draft_is_there_again_after_the_window_was_closed() -> None:
    async with open_window() as window:
        await window.ask("one")
        await window.type("half a thought")
        session = window.chat.talk.session
        assert session is not None
        await window.until(lambda: session.tree.conversation.draft == "half a thought")
        conversation = session.tree.conversation.id
    async with open_window(launch=replace(LAUNCH, resume=conversation)) as window:
        await window.until(lambda: window.chat.prompt.text == "half a thought")


@pytest.mark.parametrize("theme", ["dark", "light", "contrast", "ansi", "NO_COLOR"])
async def test_the_window_opens_in_every_theme(theme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if theme == "NO_COLOR":
        monkeypatch.setenv("NO_COLOR", "1")
    app = make_app(settings=Settings(theme=None if theme == "NO_COLOR" else theme))
    async with app.run_test(size=(60, 16)) as pilot:
        assert app.palette.name == ("plain" if theme == "NO_COLOR" else theme)
        assert "Ask anything" in Window(app, pilot).screen_text()


def test_no_color_leaves_the_terminal_its_own_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    app = make_app(settings=Settings())
    drawn = [Segment("text", Style.parse("default on default")), Segment("key", Style.parse("bold red on blue"))]
    for line_filter in app._filters:
        if line_filter.enabled:
            drawn = line_filter.apply(drawn, Color.parse("black"))
    for segment in drawn:
        assert segment.style is not None
        assert segment.style.color is not None and segment.style.color.is_default
        assert segment.style.bgcolor is not None and segment.style.bgcolor.is_default


async def test_without_colours_the_chosen_row_of_a_list_is_underlined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    async with open_window(settings=Settings()) as window:
        await window.press("f4")
        await window.until(lambda: window.app.screen.query("#models"))
        models = window.app.screen.query_one("#models", OptionList)
        await window.until(lambda: models.highlighted is not None and models.size.height)
        underlined = [
            any(segment.style is not None and segment.style.underline for segment in models.render_line(y))
            for y in range(models.size.height)
        ]
        assert underlined.count(True) == 1


async def test_a_new_conversation_comes_at_once_and_the_answer_goes_on_in_its_own() -> None:
    async with open_window(**ENDLESS) as window:
        await window.send("first question")
        await window.until(lambda: window.said("assistant")[-1:] and window.said("assistant")[-1])
        first = window.chat.talk.session
        await window.send("/new")
        assert window.turns[0].role == "welcome"
        assert window.chat.talk.session is not first and not window.chat.talk.busy
        assert first is not None and first.streaming
        assert window.chat.status.facts.behind == ("first question",)
        await window.send(f"/load {first.tree.conversation.id}")
        before = window.said("assistant")[-1]
        assert window.chat.talk.busy and before.startswith("word word ")
        await window.until(lambda: len(window.said("assistant")[-1]) > len(before) + 50)
        await window.press("escape")
        await window.until(lambda: not window.chat.talk.busy)
        answer = first.tree.path()[-1]
        assert answer.state == "stopped" and window.said("assistant")[-1] == answer.text
        assert "/continue" in window.turns[-1].note


async def test_a_question_in_another_conversation_waits_in_the_engines_line_and_escape_frees_it() -> None:
    async with open_window(**ENDLESS) as window:
        await window.send("first")
        await window.until(lambda: window.said("assistant")[-1:] and window.said("assistant")[-1])
        await window.press("ctrl+n")
        await window.send("second")
        await window.until(lambda: "waiting" in window.chat.status.facts.activity)
        await window.send("/stop")
        await window.until(lambda: not window.chat.talk.busy)
        await window.press("escape")
        await window.until(lambda: not window.chat.talk.behind)


async def test_what_changes_the_conversation_stops_its_answer_and_is_done() -> None:
    async with open_window(**ENDLESS) as window:
        session = window.chat.talk.session
        assert session is not None
        for command, is_done in (
            ("/clear", lambda: window.turns[-1].role == "rule"),
            ("/undo", lambda: session.tree.path()[-1].is_clear),
        ):
            await window.send("question")
            await window.until(lambda: window.said("assistant")[-1:] and window.said("assistant")[-1])
            await window.send(command)
            await window.until(is_done, 3)
            assert not window.chat.talk.busy
        await window.send("/redo")
        assert session.tree.path()[-1].state == "stopped"
        await window.send("/regen")
        await window.until(lambda: window.chat.talk.busy and window.said("assistant")[-1])
        await window.send("/regen temp=0.3")
        await window.until(lambda: len(session.branches(session.tree.path()[-1].id)[0]) == 3)


async def test_deleting_a_conversation_stops_its_answer_and_redo_opens_it_again() -> None:
    async with open_window(**ENDLESS) as window:
        await window.send("question")
        await window.until(lambda: window.said("assistant")[-1:] and window.said("assistant")[-1])
        await window.send("/delete")
        assert window.turns[0].role == "welcome"
        await window.until(lambda: not window.chat.talk.behind)
        await window.send("/redo")
        assert window.said("user") == ["question"] and "stopped" in window.turns[-1].note


async def test_what_waits_stays_with_the_conversation_it_was_written_in() -> None:
    async with open_window(**ENDLESS) as window:
        first = window.chat.talk.session
        await window.send("question")
        await window.until(lambda: window.chat.talk.answering)
        await window.send("waiting")
        await window.press("ctrl+n")
        assert not window.chat.talk.queue and first is not None and first.tree.conversation.draft == "waiting"


async def test_one_key_changes_what_happens_when_the_context_is_full() -> None:
    async with open_window() as window:
        session = window.chat.talk.session
        assert session is not None and session.context_policy == "drop"
        await window.press("f8")
        assert session.context_policy == "refuse" and "refused" in window.notices
        await window.press("f8")
        assert session.context_policy == "drop"


async def test_what_can_be_done_with_a_turn_has_a_key_and_a_place_to_click() -> None:
    async with open_window(pieces=["```python\nx = 1\n```\n"]) as window:
        await window.ask("question")
        await window.send("/regen")
        await window.until(lambda: not window.chat.talk.busy and "version 2 of 2" in window.turns[-1].note)
        await window.press("ctrl+up")
        offered = window.chat.query_one(TurnActions)
        await window.until(lambda: offered.display and "versions" in window.screen_text())

        async def click(act: str) -> None:
            row, column = next((y, x) for y, x, a in offered.places(offered.content_size.width) if a.act == act)
            await window.pilot.click(TurnActions, offset=(column + offered.styles.padding.left, row))

        await click("previous")
        assert "version 1 of 2" in window.turns[-1].note
        await click("quote")
        assert window.chat.prompt.text.startswith("> ```python")
        await click("copy code")
        assert terminal.clipboard_file().read_text() == "x = 1"
        await click("delete")
        await window.until(lambda: "deleted" in window.notices)
        assert len(window.said("assistant")) == 1 and "version" not in "".join(t.note for t in window.turns)
        await window.until(lambda: not offered.display)


async def test_markup_in_a_question_is_shown_and_never_obeyed() -> None:
    question = "[red]x[/] [@click=app.quit]y [/"
    async with open_window(**ENDLESS) as window:
        await window.send(question)
        await window.until(lambda: window.said("assistant")[-1:] and window.said("assistant")[-1])
        await window.press("ctrl+n")
        await window.until(lambda: "[red]x[/] [@click" in window.screen_text())  # the status line, on the way
        assert [n.message for n in window.app._notifications if question in n.message and not n.markup]
        await window.press("ctrl+b")
        await window.until(lambda: window.screen_text().count("[red]x[/]") > 1)


async def test_a_disk_that_fills_while_an_answer_streams_is_told_and_the_answer_goes_on() -> None:
    async with open_window(**ENDLESS) as window:
        session = window.chat.talk.session
        assert session is not None
        await window.send("question")
        await window.until(lambda: window.said("assistant")[-1:] and window.said("assistant")[-1])
        store = session.history.store
        pages = store.rows("PRAGMA page_count")[0][0]
        store.rows(f"PRAGMA max_page_count = {pages}")
        await window.until(lambda: window.chat.status.facts.unsaved)
        assert "is not being saved" in window.notices and "not saved" in window.screen_text()
        before = len(window.said("assistant")[-1])
        await window.until(lambda: len(window.said("assistant")[-1]) > before + 100)
        store.rows("PRAGMA max_page_count = 1000000")
        await window.press("escape")
        await window.until(lambda: not window.chat.talk.busy and not window.chat.status.facts.unsaved)
        assert "saving again" in window.notices
        text = window.said("assistant")[-1]
        conversation = session.tree.conversation.id
    with History.default() as history:
        assert history.load(conversation).path()[-1].text == text


async def test_a_damaged_history_is_set_aside_and_the_window_says_where() -> None:
    path = locations.private_dir(locations.data_dir()) / "history.db"
    path.write_bytes(b"not a database, whatever it was before" * 1000)
    async with open_window() as window:
        assert "history.db.corrupt-" in window.notices
        await window.ask("question")
        assert window.chat.talk.session is not None and window.chat.talk.session.history.saved


async def test_what_was_said_before_the_window_stood_is_said_in_it() -> None:
    async with open_window(launch=replace(LAUNCH, note="The history was damaged.")) as window:
        assert "The history was damaged." in window.notices


async def test_a_home_that_takes_no_files_is_said_and_stays_said() -> None:
    locations.data_dir().parent.mkdir(parents=True, exist_ok=True)
    locations.data_dir().write_text("a file where a folder should be")
    async with open_window() as window:
        assert "not being saved" in window.notices
        await window.ask("question")
        assert window.chat.status.facts.unsaved
        assert "saving again" not in window.notices


async def test_two_windows_write_one_conversation_and_each_keeps_what_it_said() -> None:
    async with open_window(echo=True) as one:
        await one.ask("first")
        assert one.chat.talk.session is not None
        number = one.chat.talk.session.tree.conversation.id
        async with open_window(echo=True, launch=replace(LAUNCH, resume=number)) as two:
            assert two.said("user") == ["first"]
            await two.ask("second from two")
            await one.ask("third from one")
            await two.ask("fourth from two")
    with History.default() as history:
        said = {m.text for m in history.load(number).messages.values() if m.role == "user"}
        assert said == {"first", "second from two", "third from one", "fourth from two"}


async def test_what_is_typed_right_after_enter_belongs_to_the_next_message() -> None:
    async with open_window(echo=True) as window:
        for key in ("o", "n", "e", "enter", "t", "w", "o"):
            window.chat.prompt.post_message(events.Key(key, "\r" if key == "enter" else key))
        await window.until(lambda: window.chat.prompt.text == "two" and window.said("user") == ["one"])


async def test_the_sidebar_shows_who_when_and_the_title_above_what_was_said() -> None:
    async with open_window(echo=True) as window:
        await window.ask("鲸鱼在哪里")
        await window.ask("鲸鱼吃什么")
        await window.send("/find 鲸鱼")
        sidebar = window.chat.query_one(Sidebar)
        await window.until(lambda: len(sidebar.targets) == 4)

        def titled() -> list[str]:
            rows = [row[:34] for row in window.screen_text().split("\n")]
            return [row for row in rows if ":" in row and "鲸鱼在哪里" in row]  # the time stands before the title

        await window.until(titled)
        assert sorted("you" in row for row in titled()) == [False, False, True, True]
        assert len({message for _, message in sidebar.targets}) == 4
        await window.press("down", "enter")  # while the field has the focus
        await window.until(lambda: window.chat.transcript.current)
        assert window.chat.transcript.current is not None
        assert window.chat.transcript.current.key == str(sidebar.targets[1][1])


@pytest.mark.parametrize("key", ["", "ctrl+r", "ctrl+f", "ctrl+p", "f2"], ids=str)
async def test_the_terminals_cursor_stands_in_the_input_that_has_the_focus(key: str) -> None:
    """An input method opens its window there, before a single character has arrived."""
    async with open_window() as window:
        await window.type("第一行\n量化 x")
        if key:
            await window.press(key)
        await window.until(lambda: not key or window.app.focused not in (None, window.chat.prompt))
        widget = window.app.focused
        assert widget is not None
        await window.until(lambda: widget.content_region.area)
        await window.until(lambda: widget.content_region.contains_point(window.app.cursor_position))
        if not key:
            await window.until(lambda: window.app.cursor_position == widget.content_region.offset + Offset(6, 1))


@pytest.mark.parametrize(("width", "below"), [(45, True), (120, False)])
@pytest.mark.parametrize("key", ["f2", "f4"])
async def test_the_keys_of_a_dialog_can_be_read_in_a_narrow_window(width: int, below: bool, key: str) -> None:
    async with open_window(size=(width, 30)) as window:
        await window.press(key)
        await window.until(lambda: window.app.screen.query("#keys"))
        line = window.app.screen.query_one("#keys")
        await window.until(lambda: line.display == below)
        await window.until(lambda: "Esc" in window.screen_text() and "closes" in window.screen_text())


@pytest.mark.parametrize("size", [(45, 20), (60, 20)])
@pytest.mark.parametrize("key", ["f2", "f4", "f7"])
async def test_nothing_of_a_dialog_is_out_of_sight_in_a_low_window(size: tuple[int, int], key: str) -> None:
    async with open_window(size=size) as window:
        await window.press(key)
        await window.until(lambda: window.app.screen.query("#keys"))
        panel = window.app.screen.query_one("#panel")
        keys = window.app.screen.query_one("#keys")
        await window.until(lambda: not keys.display or panel.content_region.contains_region(keys.region))
        words = ["Esc", "closes"] + (["range: 0 to 5", "built in"] if key == "f2" else [])
        await window.until(lambda: all(word in window.screen_text() for word in words))


@pytest.mark.parametrize(("width", "alone"), [(45, True), (120, False)])
async def test_the_conversations_take_the_place_of_the_chat_in_a_narrow_window(width: int, alone: bool) -> None:
    async with open_window(size=(width, 20)) as window:
        await window.press("ctrl+b")
        sidebar = window.chat.query_one(Sidebar)
        main = window.chat.query_one("#main")
        await window.until(lambda: sidebar.outer_size.width and (sidebar.outer_size.width == width) == alone)
        assert main.display != alone
        await window.until(lambda: window.app.focused is sidebar.query_one(OptionList))
        await window.press("escape")
        await window.until(lambda: main.display and window.app.focused is window.chat.prompt)


async def test_every_preset_can_be_read_and_clicked_in_a_narrow_window() -> None:
    async with open_window(size=(45, 30)) as window:
        await window.press("f2")
        await window.until(lambda: "the model's own" in window.screen_text())
        line = window.app.screen.query_one(PresetLine)

        def rows() -> list[str]:
            region = line.content_region
            return [row[region.x :] for row in window.screen_text().split("\n")[region.y : region.bottom]]

        await window.until(lambda: "range: 0 to 5" in window.screen_text())  # the dialog has its height now
        await window.until(lambda: len(rows()) == 2 and rows()[1].startswith("F7 creative"))
        for _ in range(50):  # a click that meets a dialog that is being laid out again is lost
            await window.pilot.click(PresetLine, offset=(len("F7 c"), 1))
            if window.chat.talk.session and window.chat.talk.session.settings.sampling:
                break
        assert window.chat.talk.session is not None
        assert dict(window.chat.talk.session.settings.sampling) == dict(PRESETS["creative"])
