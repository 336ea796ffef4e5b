"""Commands, clipboard, status line, themes, languages: the parts without a screen.

Covers tui/theme.py, tui/terminal.py, tui/widgets/status.py, tui/app.py.
"""

from __future__ import annotations

import base64
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from rich.cells import cell_len
from strange_files import STRANGE, put

from glmchat.chat.commands import table as commands
from glmchat.chat.launch import LaunchOptions
from glmchat.core import language, locations
from glmchat.core.settings import THEMES, Settings
from glmchat.tui import terminal
from glmchat.tui.app import speak
from glmchat.tui.model_rows import Row
from glmchat.tui.screens import help
from glmchat.tui.screens.sampling import EXPLAINED, PRESET_WORDS, PRESETS
from glmchat.tui.theme import PALETTES, choose_theme
from glmchat.tui.widgets import actions, sidebar, status
from glmchat.tui.widgets.status import Facts, status_text

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("hello", ("text", "hello", "")),
        ("//etc", ("text", "/etc", "")),
        ("/?", ("command", "help", "")),
        ("/EXIT", ("command", "quit", "")),
        ("/set temp 0.5", ("command", "set", "temp 0.5")),
        ("/system be\nbrief", ("command", "system", "be\nbrief")),
        ("/system\nbe brief", ("command", "system", "be brief")),
        ("/regne", ("unknown", "regne", "regen")),
        ("/etc/hosts", ("unknown", "etc/hosts", "")),
        ("/", ("unknown", "", "")),
        ("a /clear b", ("text", "a /clear b", "")),
    ],
)
def test_lines_are_read_as_commands_text_or_neither(line: str, expected: tuple[str, str, str]) -> None:
    assert commands.parse(line) == expected


def test_every_command_is_made_and_no_two_share_a_word_or_a_key() -> None:
    words = [word for c in commands.COMMANDS for word in (c.name, *c.aliases)]
    keys = [c.key for c in commands.COMMANDS if c.key]
    assert len(words) == len(set(words)) and len(keys) == len(set(keys))
    assert all(c.group in commands.GROUPS for c in commands.COMMANDS)


def test_sentences_that_are_translated_by_a_variable_have_chinese_too() -> None:
    chinese = tomllib.loads((ROOT / "core" / "zh.toml").read_text(encoding="utf-8"))
    used = (
        {words for c in commands.COMMANDS for words in (c.summary, c.lines) if words}
        | set(commands.GROUPS)
        | set(PRESET_WORDS.values())
    )
    used |= {word for pair in EXPLAINED.values() for word in pair} | {what for _, what in help._KEYS}
    used |= {action.word for action in actions.ACTIONS if action.word}
    used |= set(status.STAGES.values()) | set(PRESETS) - {"model"}
    assert not used - set(chinese)


def test_a_copy_goes_to_the_terminal_and_to_a_private_file() -> None:
    copied = terminal.copy("量化", {})
    assert copied.sequence == f"\x1b]52;c;{base64.b64encode('量化'.encode()).decode()}\x07"
    assert copied.file is not None and copied.file.read_text() == "量化"
    assert copied.file.stat().st_mode & 0o077 == 0
    assert str(copied.file) in copied.words()


def test_inside_tmux_the_sequence_is_passed_through() -> None:
    sequence = terminal.osc52("x", {"TMUX": "/tmp/tmux"})
    assert sequence is not None and "\x1bPtmux;\x1b\x1b]52;c;eA==\x07\x1b\\" in sequence
    screen = terminal.osc52("x" * 2000, {"STY": "1"})
    assert screen is not None and all(len(part) <= 516 for part in screen.split("\x1b\\"))


def test_a_text_too_long_for_the_terminal_is_only_in_the_file_and_that_is_said() -> None:
    text = "量" * 30_000
    copied = terminal.copy(text, {})
    assert copied.sequence is None
    assert "too long" in copied.words() and str(terminal.clipboard_file()) in copied.words()


@pytest.mark.parametrize("kind", STRANGE)
def test_what_stands_in_the_place_of_the_clipboards_file_is_left_alone_and_nobody_waits(kind: str) -> None:
    path = locations.private_dir(locations.state_dir()) / "clipboard.txt"
    put(kind, path)
    copied = terminal.copy("x", {})
    assert copied.sequence is not None
    assert copied.file == (path if kind == "terabyte" else None)


def test_a_home_that_cannot_be_written_still_copies_to_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLMCHAT_HOME", "/proc/nowhere")
    copied = terminal.copy("x", {})
    assert copied.file is None and copied.sequence is not None
    assert locations.state_dir() == Path("/proc/nowhere/state")


FULL = Facts(
    "smollm2",
    "b179c9523d0e",
    "q4_1",
    ("poet",),
    speed=41.2,
    first_token=0.12,
    used=312,
    limit=8192,
    memory=412_000_000,
    gpu=(3_000_000_000, 8_000_000_000),
    queued=2,
)


@pytest.mark.parametrize("theme", list(PALETTES))
@pytest.mark.parametrize("width", [1, 5, 12, 20, 40, 60, 80, 100, 160])
def test_the_status_line_fits_any_width_and_keeps_the_model_longest(width: int, theme: str) -> None:
    text = status_text(FULL, width, PALETTES[theme])
    assert text.cell_len <= max(width, 3)
    if width >= 12:
        assert "smollm2" in text.plain
    if width >= 160:
        assert all(
            part in text.plain
            for part in ("@b179c95", "q4_1", "+poet", "41.2 tok/s", "312/8,192", "412.0 MB", "GPU 3.0 GB")
        )


def test_a_folder_is_called_by_its_own_name_and_leaves_room_for_the_rest() -> None:
    text = status_text(Facts("/srv/models/我的模型:int4", memory=412_000_000), 60, PALETTES["dark"]).plain
    assert text.strip().startswith("我的模型:int4") and "412.0 MB" in text
    rows = [Row(name, 1, "q4_1", (), "yes") for name in ("smollm2", "/srv/a/long/way/to/my-chatglm2-6b:int4", "模型")]
    drawn = [row.drawn(PALETTES["dark"], 92).plain for row in rows]
    assert len({cell_len(line) for line in drawn}) == 1 and "my-chatglm2-6b:int4" in drawn[1]


def test_a_lost_engine_is_what_the_status_line_says_first() -> None:
    text = status_text(Facts("smollm2", lost=True, speed=3.0), 60, PALETTES["dark"])
    assert text.plain.strip().startswith("engine stopped · F5")


def test_the_status_line_says_where_the_model_computes_and_why_and_the_reason_goes_first() -> None:
    facts = Facts("m", device="cuda:1", device_reason="RTX 3090, 22.1 GB free", limit=2048)
    assert "cuda:1 · RTX 3090, 22.1 GB free" in status_text(facts, 80, PALETTES["dark"]).plain
    narrow = status_text(facts, 24, PALETTES["dark"]).plain
    assert "cuda:1" in narrow and "RTX" not in narrow
    facts = Facts("smollm2", revision="0.1.2", quant="q4_1", used=112, limit=8192, memory=574_900_000, device="cpu")
    facts.device_reason, facts.speed, facts.first_token = "no NVIDIA driver responds", 93.2, 0.21
    row = status_text(facts, 80, PALETTES["dark"]).plain
    assert "93.2 tok/s" in row and "NVIDIA" not in row  # which is known since the start
    facts = Facts("m", device="cpu", device_reason="the installed torch was built without CUDA")
    assert "CPU · the installed torch was built without CUDA" in status_text(facts, 80, PALETTES["dark"]).plain


def test_progress_shows_a_share() -> None:
    assert "42%" in status_text(Facts("m", activity="loading the weights", progress=0.42), 80, PALETTES["dark"]).plain


@pytest.mark.parametrize(
    ("setting", "environ", "theme"),
    [
        (None, {"TERM": "xterm-256color"}, "dark"),
        ("light", {}, "light"),
        ("light", {"NO_COLOR": "1"}, "plain"),
        (None, {"TERM": "xterm-256color", "COLORFGBG": "0;15"}, "light"),
        (None, {"TERM": "xterm-256color", "COLORFGBG": "15;0"}, "dark"),
        (None, {"TERM": "screen"}, "ansi"),
        (None, {"TERM": "linux"}, "ansi"),
        (None, {"TERM": "screen", "COLORTERM": "truecolor"}, "dark"),
        ("nord", {"TERM": "screen"}, "nord"),
        ("contrast", {"COLORFGBG": "0;15"}, "contrast"),
    ],
)
def test_the_theme_follows_no_color_then_the_setting_then_the_terminal(
    setting: str | None, environ: dict[str, str], theme: str
) -> None:
    assert choose_theme(setting, environ) == theme


@pytest.mark.parametrize("name", [name for name in THEMES if name != "ansi"])
def test_text_can_be_read_on_its_background(name: str) -> None:
    """WCAG's contrast ratio: 7 for text, 4.5 for quiet text and code."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def ratio(a: str, b: str) -> float:
        high, low = sorted((luminance(a), luminance(b)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    p = PALETTES[name]
    assert ratio(p.text, p.background) >= 7 and ratio(p.text, p.surface) >= 7 and ratio(p.text, p.selection) >= 4.5
    assert all(ratio(c, p.background) >= 4.5 for c in (p.muted, p.accent, p.user, p.error, p.warning))
    for kind, colour in p.syntax.items():
        assert ratio(colour, p.code_background) >= (3.5 if kind == "comment" else 4.5), kind


def test_the_language_of_the_command_line_wins_over_the_config() -> None:
    try:
        language.choose("zh")
        speak(LaunchOptions(), Settings(language="en"))
        assert language.language() == "zh"
        language.choose(None)
        speak(LaunchOptions(), Settings(language="zh"))
        assert language.language() == "zh"
    finally:
        language.choose(None)


def test_the_first_frame_loads_neither_the_engines_client_nor_the_database() -> None:
    code = "import sys, glmchat.tui.app; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"httpx2", "sqlite3", "huggingface_hub", "torch", "glmchat.chat.session"} & set(loaded)


def test_a_hit_stands_near_the_beginning_of_its_line_in_the_narrow_list() -> None:
    assert sidebar._lead("one thousand words of a hit", 24) == "one thousand words of a hit".index("of")
    assert sidebar._lead("a" * 60 + "hit", 60) == 60
    assert sidebar._lead("量" * 30 + "化", 30) == 25
    assert sidebar._lead("hit", 0) == 0


def test_a_copy_through_a_tmux_at_the_other_end_says_what_it_takes() -> None:
    """As it comes, tmux drops what programs want copied: measured with 3.3a, `set-clipboard external`."""
    far, near, none = (
        terminal.copy("x", environ).words()
        for environ in ({"TERM": "tmux-256color"}, {"TERM": "tmux-256color", "TMUX": "/gone,1,0"}, {"TERM": "xterm"})
    )
    assert "set-clipboard on" in far and str(terminal.clipboard_file()) in far
    assert "set-clipboard" not in near + none
