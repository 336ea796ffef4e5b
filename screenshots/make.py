"""Draws the screenshots: the real window, the real starter model, a fixed seed. `make screenshots` runs it.

    python screenshots/make.py [MODEL] [--out FOLDER]

MODEL is an installed model or a GGUF file; without it the starter model. Speeds and memory in the pictures are those of
the machine that draws them. Each picture is an SVG, and a PNG too where `rsvg-convert` is installed.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from glmchat.chat import model_choice
from glmchat.chat.launch import LaunchOptions
from glmchat.core.errors import GlmchatError
from glmchat.tui.app import GlmchatApp

HERE = Path(__file__).resolve().parent
QUESTIONS = (
    "What is the difference between a list and a tuple in Python? Show a short example.",
    "Name three rivers in Europe, with one sentence about each.",
    "Explain in a few paragraphs how a tree grows through the year.",
)


def find_model(name: str | None) -> LaunchOptions:
    """The installed starter model, a named one, or a GGUF file."""
    options = LaunchOptions(sampling={"temperature": 0.2, "seed": 7, "max_tokens": 220})
    if name is not None and Path(name).is_file():
        return LaunchOptions(model="smollm2", folder=Path(name), quant_label="q4_1", sampling=options.sampling)
    return model_choice.launch_installed(options, *model_choice.locate(name or "smollm2"))


async def until(true: Callable[[], object], seconds: float = 180.0) -> None:
    for _ in range(round(seconds / 0.05)):
        if true():
            return
        await asyncio.sleep(0.05)
    raise SystemExit("the window did not get there")


def save(app: GlmchatApp, out: Path, name: str) -> None:
    path = out / f"{name}.svg"
    path.write_text(app.export_screenshot(title="glmchat"), encoding="utf-8")
    if shutil.which("rsvg-convert"):
        subprocess.run(["rsvg-convert", str(path), "-o", str(path.with_suffix(".png")), "-w", "1400"], check=True)


async def ask(app: GlmchatApp, pilot: Any, text: str) -> None:
    app.chat.prompt.set_text(text)
    await pilot.press("enter")
    await until(lambda: app.chat.busy or app.chat.transcript.last("assistant"))
    await until(lambda: not app.chat.busy)
    await pilot.pause()


async def draw(launch: LaunchOptions, out: Path) -> None:
    app = GlmchatApp(launch)
    async with app.run_test(size=(104, 34)) as pilot:
        await pilot.pause()
        app.chat.prompt.cursor_blink = False
        await until(lambda: app.chat.ready and app.chat.session)
        await pilot.pause(2.5)  # the memory in the status line is read every two seconds
        save(app, out, "welcome")
        await ask(app, pilot, QUESTIONS[0])
        save(app, out, "chat-dark")
        for theme in ("light", "contrast"):
            app.change_theme(theme)
            await pilot.pause(0.3)
            save(app, out, f"chat-{theme}")
        app.change_theme("dark")
        await pilot.press("f2")
        await pilot.pause(0.3)
        save(app, out, "sampling")
        await pilot.press("escape")
        await pilot.press("f1")
        await pilot.pause(0.3)
        save(app, out, "help")
        await pilot.press("escape")
        app.chat.prompt.set_text("/c")
        await pilot.pause(0.3)
        save(app, out, "commands")
        app.chat.prompt.set_text("")
        await pilot.press("ctrl+n")
        await ask(app, pilot, QUESTIONS[1])
        await pilot.press("ctrl+b")
        await pilot.pause(0.3)
        save(app, out, "conversations")
        await pilot.press("escape")
        await record(app, pilot, out)
        await pilot.resize_terminal(48, 20)
        await pilot.pause(0.4)
        save(app, out, "narrow")


async def record(app: GlmchatApp, pilot: Any, out: Path) -> None:
    """Three frames: an answer streams, it is stopped, and a search finds an earlier one."""
    await pilot.press("ctrl+n")
    app.chat.prompt.set_text(QUESTIONS[2])
    await pilot.press("enter")
    await until(lambda: app.chat.answering and len(app.chat.transcript.turns[-1].text) > 250)
    save(app, out, "frame-1-streaming")
    await pilot.press("escape")
    await until(lambda: not app.chat.busy)
    await pilot.pause(0.3)
    save(app, out, "frame-2-stopped")
    await pilot.press("ctrl+f")
    await pilot.press(*"tuple")
    await pilot.pause(1.0)
    save(app, out, "frame-3-search")
    await pilot.press("escape", "escape")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--out", type=Path, default=HERE)
    chosen = parser.parse_args()
    if starter := os.environ.get("GLMCHAT_STARTER_HOME"):
        os.environ["GLMCHAT_HOME"] = starter  # where `make starter` has put the model
    try:
        launch = find_model(chosen.model)
    except GlmchatError as error:
        raise SystemExit(f"{error.message}: {error.hint}") from None
    chosen.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="glmchat-screenshots-") as home:
        os.environ["GLMCHAT_HOME"] = home  # a history of its own: nobody's conversations are in the pictures
        os.environ["GLMCHAT_LANG"] = "en"
        asyncio.run(draw(launch, chosen.out))


if __name__ == "__main__":
    main()
