"""What surrounds a conversation, in a pseudo-terminal: copies, adapters, a shared engine, what other commands list.

Covers chat/in_force.py, cli/completion.py.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from engine_builders import CONFIG, weights, write_folder
from fakes import model_in
from hub_helpers import COMMIT_A, hub_entry, user_catalogue
from safetensors.torch import save_file
from screen import TerminalSession

from glmchat.chat.history.history import History
from glmchat.chat.launch import LaunchOptions
from glmchat.core import locations

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return model_in(tmp_path / "model")


def test_a_note_in_the_corner_leaves_the_prompt_to_what_is_being_typed(model: Path) -> None:
    with TerminalSession("run", model) as terminal:
        terminal.until_ready()
        terminal.say("hello")
        terminal.until_seen("one two")
        terminal.say("/copy")
        terminal.until_seen("copied 7 characters")
        typed = "something long enough to reach the right half of the prompt, where notes used to lie"
        terminal.type(typed)
        terminal.until_seen(typed)
        assert terminal.row_of("copied 7") < terminal.row_of(typed) - 3


@pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")
@pytest.mark.parametrize("columns", [100, 74])  # of 74 the note's last word is one cell too much
def test_a_copy_reaches_a_tmux_with_its_default_settings(model: Path, tmp_path: Path, columns: int) -> None:
    tmux = ("tmux", "-S", str(tmp_path / "tmux"), "-f", "/dev/null")
    try:
        with TerminalSession("run", model, columns=columns, inside=(*tmux, "new-session")) as terminal:
            terminal.until_ready()
            terminal.say("hello")
            terminal.until_seen("one two")
            terminal.say("/copy")
            terminal.until(lambda: re.search(r"copied 7 characters, into tmux\s+(▌ )?too", terminal.text))
            assert subprocess.run([*tmux, "show-buffer"], capture_output=True, check=True).stdout == b"one two"
    finally:
        subprocess.run([*tmux, "kill-server"], check=False)


def test_what_is_typed_in_one_go_behind_a_selection_is_sent(model: Path) -> None:
    with TerminalSession("run", model) as terminal:
        terminal.until_ready()
        terminal.say("hello")
        terminal.until_seen("one two")
        row = terminal.row_of("one two") + 1
        for button, column, end in ((0, 6, "M"), (32, 12, "M"), (0, 12, "m")):
            terminal.type(f"\x1b[<{button};{column};{row}{end}")
        terminal.until_seen("Esc back to the prompt")
        terminal.type("and more\r")
        terminal.until(lambda: terminal.text.count("one two") == 2)


def test_an_adapter_that_is_refused_names_what_can_be_typed_here(adapters_here: LaunchOptions) -> None:
    with TerminalSession("run", adapters_here.engine.folder, columns=160) as terminal:
        terminal.until_ready()
        terminal.say("/adapter medical:0.5")
        terminal.until_seen("trained on me/Other-7M", "attach it anyway: /adapter medical:0.5 --force")


def test_a_new_conversation_says_which_adapters_it_leaves_behind(adapters_here: LaunchOptions) -> None:
    with TerminalSession("run", adapters_here.engine.folder) as terminal:
        terminal.until_ready()
        terminal.say("/adapter poet:0.5")
        terminal.until(lambda: "poet:0.5" in terminal.lines[-1])
        terminal.press("ctrl+n")
        terminal.until_seen("without adapters", "/adapter poet:0.5")
        assert "poet" not in terminal.lines[-1]


def test_a_system_prompt_is_in_sight_after_the_next_start(model: Path) -> None:
    with TerminalSession("run", model) as terminal:
        terminal.until_ready()
        terminal.say("hello")
        terminal.until_seen("one two")
        terminal.say("/system Answer as a pirate.")
        terminal.until(lambda: "system prompt" in terminal.lines[-1])
        terminal.press("ctrl+q")
        terminal.until_ended()
    with TerminalSession("run", model, "-c") as terminal:
        terminal.until_seen("one two")
        terminal.until(lambda: "system prompt" in terminal.lines[-1])
        terminal.press("f9")
        terminal.until_seen("Answer as a pirate.")


def test_where_the_system_prompt_changed_the_transcript_says_so(model: Path) -> None:
    rule, end = "system prompt: Answer as a pirate.", "no system prompt from here on"
    with TerminalSession("run", model, rows=60) as terminal:
        terminal.until_ready()
        for text, said in (("alpha", 1), ("/system Answer as a pirate.", 1), ("bravo", 2), ("charlie", 3),
                           ("/system none", 3), ("delta", 4)):  # fmt: skip
            terminal.say(text)
            terminal.until(lambda said=said: terminal.text.count("one two") == said)  # type: ignore[misc]
            terminal.until_still()
        terminal.press("ctrl+q")
        terminal.until_ended()
        live = terminal.text
    with TerminalSession("run", model, "-c", rows=60) as terminal:
        terminal.until(lambda: terminal.text.count("one two") == 4)
        for text in (live, terminal.text):
            places = [text.find(part) for part in ("▌ alpha", rule, "▌ bravo", "▌ charlie", end, "▌ delta")]
            assert places == sorted(places) and min(places) >= 0, text
            assert text.count(rule) == text.count(end) == 1


def test_two_windows_on_one_model_share_an_engine(model: Path, tmp_path: Path) -> None:
    shared = {"GLMCHAT_KEEP_ALIVE": "5m", "XDG_RUNTIME_DIR": str(tmp_path)}
    try:
        with TerminalSession("run", model, environ=shared) as first:
            first.until_ready()
            with TerminalSession("run", model, environ=shared) as second:
                second.until_ready()
                second.say("hello")
                second.until_seen("one two")
                first.say("hello")
                first.until_seen("one two")
                with TerminalSession("ps", "--json", environ=shared, columns=2000) as engines:
                    engines.until_ended()
                    rows = [json.loads(line) for line in engines.lines if line]
        (engine,) = [row for row in rows if row["model"] == str(model)]  # others may run on this machine
        assert len(engine["users"]) == 2
    finally:
        with TerminalSession("stop", "all", environ=shared) as stop:
            assert stop.until_ended() == 0


def test_what_a_quantised_copy_will_take_is_foretold_also_of_a_small_model(tmp_path: Path) -> None:
    config = {**CONFIG, "vocab_size": 4096, "hidden_size": 128, "intermediate_size": 256, "torch_dtype": "bfloat16"}
    small = write_folder(tmp_path / "small", **config)  # its embedding is half of it, and stays as it is
    save_file({name: one.bfloat16() for name, one in weights(config).items()}, small / "model.safetensors")

    def shown(*words: object) -> str:
        with TerminalSession(*words, columns=120) as terminal:
            assert terminal.until_ended(120) == 0, terminal.text
            return terminal.text

    def found(pattern: str, text: str) -> str:
        match = re.search(pattern, text)
        assert match is not None, text
        return match[1]

    shown("add", small)
    foretold, loaded = shown("show", "small"), shown("show", "small", "--fit")
    made = shown("quantize", "small")
    assert found(r"memory, int4: (.*?) *\n", foretold) == found(r"become (.*?) \(", made)
    assert found(r"memory, int4\S*: (.*?) *\n", shown("show", "small:int4")) == found(r"become (.*?) \(", made)
    in_use = found(r"\n\S+ +256 +(\S+ \S+) ", shown("show", "small:int4", "--fit"))
    assert found(r"\nint4 +256 +(\S+ \S+) ", loaded) == in_use


def test_a_setting_that_no_command_would_take_is_a_problem_for_doctor(model: Path) -> None:
    locations.config_file().parent.mkdir(parents=True, exist_ok=True)
    locations.config_file().write_text("bananas = 3\n")
    with TerminalSession("run", model, "hello", rows=100) as terminal:
        assert terminal.until_ended() == 2
    with TerminalSession("list", columns=300) as terminal:
        assert terminal.until_ended() == 0
        assert "unknown setting 'bananas'" in terminal.text
    with TerminalSession("doctor", columns=300, rows=100) as terminal:  # the path of the file stands before it
        terminal.until_ended()
        assert "unknown setting 'bananas'" in terminal.text and "no problems found" not in terminal.text


def test_a_list_says_of_an_adapter_only_what_an_adapter_has(adapters_here: LaunchOptions) -> None:
    with TerminalSession("list", columns=120) as terminal:
        terminal.until_ended()
        (row,) = [line for line in terminal.lines if line.strip().startswith("poet")]
    assert "adapter" in row and "?" not in row and "none" not in row


def test_tab_offers_what_can_be_meant(adapters_here: LaunchOptions) -> None:
    with History.default() as history:
        history.append(history.new(), "user", "a question of the past")
    with TerminalSession("add", adapters_here.engine.folder) as terminal:
        assert terminal.until_ended() == 0

    def offered(*words: str) -> str:
        environ = {"_GLMCHAT_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(("glmchat", *words, "")),
                   "COMP_CWORD": str(len(words) + 1)}  # fmt: skip
        with TerminalSession(environ=environ) as terminal:
            terminal.until_ended()
            return terminal.text

    removable = offered("rm")
    assert "Tiny-7M" in removable and "chatglm" not in removable
    assert "chatglm" in offered("pull")
    assert "poet" in offered("run", "--adapter")
    assert offered("history", "show").split() == ["1"]
    assert "nord" in offered("run", "--theme")


def test_a_replay_that_parts_where_it_was_asked_to_has_done_what_it_was_asked(tmp_path: Path) -> None:
    small = write_folder(tmp_path / "small")
    settings = ("--seed", 5, "--temperature", 1, "--max-tokens", 12)
    with TerminalSession("run", small, "hello", *settings, real=True) as terminal:
        assert terminal.until_ended(120) == 0
    with TerminalSession("replay", 1, "--set", "temp=0", columns=160, real=True) as terminal:
        assert terminal.until_ended(120) == 0
        assert "first difference at token" in terminal.text


@pytest.mark.parametrize("columns", [120, 80, 40])
def test_a_model_takes_one_line_in_the_list_whatever_its_columns_hold(tmp_path: Path, columns: int) -> None:
    files = {path.name: path.read_bytes() for path in model_in(tmp_path / "tiny").iterdir()}
    entries = [hub_entry(f"tiny-{n}", f"owner/tiny-{n}", COMMIT_A, files) for n in range(3)]
    entries[1] = entries[1].replace('label = "main"', 'label = "main"\nquant = "int4-g128+g64"')
    user_catalogue(*entries)
    with TerminalSession(columns=columns, rows=24) as terminal:
        terminal.until(lambda: sum("tiny-" in line and " fits" in line for line in terminal.lines) == 3)
        rows = [terminal.row_of(f"tiny-{n}") for n in range(3)]
        assert rows == list(range(rows[0], rows[0] + 3))
        assert len({terminal.lines[row].index(" fits") for row in rows}) == 1


def test_every_step_of_a_day_is_played_by_a_test() -> None:
    spec = spec_from_file_location("window_day", ROOT / "benchmarks" / "window_day.py")
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(day := module_from_spec(spec))
    assert list(day.STEPS) == [f"D{n}" for n in range(1, 34)]
    assert all(day.tests_of(step) for step, (_, file, _) in day.STEPS.items() if file)
