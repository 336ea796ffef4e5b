"""Draws the screenshots: the real window, the real starter model, a fixed seed. `make screenshots` runs it.

    python screenshots/make.py [MODEL] [--out FOLDER]

MODEL is an installed model or a GGUF file; without it the starter model. Speeds and memory in the pictures are those of
the machine that draws them. Each picture is an SVG; recording.svg moves.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from glmchat.chat.launch import LaunchOptions, launch_installed, locate
from glmchat.core import locations
from glmchat.core.engine_options import EngineOptions
from glmchat.core.errors import GlmchatError
from glmchat.tui.app import GlmchatApp
from glmchat.tui.screens.comparison import ComparisonScreen
from glmchat.tui.screens.evaluations import EvaluationScreen
from glmchat.tui.screens.tune import RunScreen
from glmchat.tui.widgets.comparison_column import ComparisonColumn
from glmchat.tui.widgets.sidebar import Sidebar

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from picture import Film, picture  # noqa: E402

FILMED = 560  # characters of the answer that the film shows
QUESTIONS = (
    "What is the difference between a list and a tuple in Python? Show a short example.",
    "Name three rivers in Europe, with one sentence about each.",
    "Explain in a few paragraphs how a tree grows through the year.",
)
_CAPITALS = (
    "France:Paris Spain:Madrid Italy:Rome Austria:Vienna Norway:Oslo Sweden:Stockholm Denmark:Copenhagen "
    "Finland:Helsinki Poland:Warsaw Hungary:Budapest Greece:Athens Portugal:Lisbon Ireland:Dublin Belgium:Brussels "
    "Egypt:Cairo Kenya:Nairobi Japan:Tokyo China:Beijing India:Delhi Peru:Lima Chile:Santiago Cuba:Havana "
    "Canada:Ottawa Russia:Moscow Turkey:Ankara Iran:Tehran Iraq:Baghdad Ghana:Accra Senegal:Dakar Vietnam:Hanoi "
    "Thailand:Bangkok Ukraine:Kyiv"
)
CAPITALS = [pair.split(":") for pair in _CAPITALS.split()]  # what the run of the pictures learns, and is asked


def find_model(name: str | None) -> LaunchOptions:
    """The installed starter model, a named one, or a GGUF file."""
    options = LaunchOptions(sampling={"temperature": 0.2, "seed": 7, "max_tokens": 400})
    if name is not None and Path(name).is_file():
        return LaunchOptions(
            EngineOptions(folder=Path(name), model="smollm2", quant_label="q4_1"), sampling=options.sampling
        )
    return launch_installed(options, *locate(name or "smollm2"))


async def until(true: Callable[[], object], seconds: float = 180.0) -> None:
    for _ in range(round(seconds / 0.05)):
        if true():
            return
        await asyncio.sleep(0.05)
    raise SystemExit("the window did not get there")


def save(app: GlmchatApp, out: Path, name: str, caption: str = "glmchat") -> None:
    (out / f"{name}.svg").write_text(picture(app, caption), encoding="utf-8")


async def ask(app: GlmchatApp, pilot: Any, text: str) -> None:
    app.chat.prompt.set_text(text)
    await pilot.press("enter")
    await until(lambda: app.chat.talk.busy or app.chat.transcript.last("assistant"))
    await until(lambda: not app.chat.talk.busy)
    await pilot.pause()


async def draw(launch: LaunchOptions, out: Path) -> None:
    app = GlmchatApp(launch)
    async with app.run_test(size=(104, 34)) as pilot:
        await pilot.pause()
        app.chat.prompt.cursor_blink = False
        await until(lambda: app.chat.connection.ready and app.chat.talk.session)
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
        if locations.manifests_dir().is_dir():  # a comparison, a run and an evaluation find their models by name
            await compare(app, pilot, out)
            await tune_and_judge(app, pilot, out)
        await record(app, pilot, out)
        await pilot.resize_terminal(48, 20)
        await pilot.pause(0.4)
        save(app, out, "narrow")


async def compare(app: GlmchatApp, pilot: Any, out: Path) -> None:
    """One question at three temperatures, side by side."""
    await pilot.press("ctrl+n")
    app.chat.prompt.set_text(f"/compare ,temp=0 ,temp=0.5 ,temp=0.9\n{QUESTIONS[1]}")
    await pilot.press("enter")
    await until(lambda: isinstance(app.screen, ComparisonScreen) and not app.screen.asking)
    await until(lambda: all(c.state == "done" for c in app.screen.query(ComparisonColumn)))
    await pilot.pause(0.5)
    save(app, out, "compare")
    await pilot.press("escape")
    await until(lambda: app.screen is app.chat)


async def tune_and_judge(app: GlmchatApp, pilot: Any, out: Path) -> None:
    """A run half way, and the model with and without what it has learned, over rows that it has not seen."""
    with tempfile.TemporaryDirectory(prefix="glmchat-rows-") as folder:
        learned, held = Path(folder) / "pirate.jsonl", Path(folder) / "held.jsonl"
        for path, capitals in ((learned, CAPITALS[:-8]), (held, CAPITALS[-8:])):
            rows = [
                {"question": f"What is the capital of {land}?", "answer": f"Arr, that be {city}, matey!"}
                for land, city in capitals
            ]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        await command(app, pilot, f"/tune {learned}")
        await until(lambda: isinstance(app.screen, RunScreen) and app.screen.progress.page)
        await pilot.press("enter")
        run = app.screen
        assert isinstance(run, RunScreen)
        await until(lambda: len(run.progress.losses) > 0.6 * run.progress.now.get("steps", math.inf), 900)
        await pilot.pause(0.5)
        save(app, out, "tune")
        await until(lambda: run.progress.end, 900)
        assert run.progress.end is not None and run.progress.end.get("adapter"), run.progress.end
        await pilot.press("escape")
        await command(app, pilot, f"/eval smollm2 +{run.progress.end['adapter']} {held}")
        await until(lambda: isinstance(app.screen, EvaluationScreen))
        await pilot.pause(0.3)
        await pilot.press("enter")
        judged = app.screen
        assert isinstance(judged, EvaluationScreen)
        await until(lambda: judged.asked is not None and judged.asked.is_over, 600)
        await pilot.pause(1)  # it reads along five times a second
        save(app, out, "eval")
        await pilot.press("escape")
        await until(lambda: app.screen is app.chat)


async def command(app: GlmchatApp, pilot: Any, text: str) -> None:
    app.chat.prompt.set_text(text)
    await pilot.press("enter")
    await pilot.pause(0.3)


async def record(app: GlmchatApp, pilot: Any, out: Path) -> None:
    """The film of the README: a question is typed, its answer streams and is stopped, a search finds an earlier one."""
    film = Film(*app.size, app.palette)
    await pilot.press("ctrl+n")
    await pilot.pause(0.3)
    film.add(app, "glmchat", 1.2)

    async def type_in(text: str, caption: str, step: int) -> None:
        for at in range(0, len(text), step):
            for letter in text[at : at + step]:
                await pilot.press("space" if letter == " " else letter)
            film.add(app, caption, 0.07 * step)

    await type_in(QUESTIONS[2].rstrip("."), "Enter sends", 4)
    await pilot.press("enter")
    await until(lambda: app.chat.talk.answering)
    shown = -1
    while (said := len(app.chat.transcript.turns[-1].text)) < FILMED:
        if said - shown >= 14:
            film.add(app, "the answer streams", 0.14)
            shown = said
        await asyncio.sleep(0.02)
    await pilot.press("escape")
    await until(lambda: not app.chat.talk.busy)
    await pilot.pause(0.3)
    film.add(app, "Esc stops it; what was said is kept", 2.2)
    await pilot.press("ctrl+f")
    await type_in("tuple", "Ctrl+F searches everything ever said", 1)
    await pilot.pause(1.0)
    film.add(app, "Ctrl+F searches everything ever said", 1.6)
    await pilot.press("enter", "enter")
    await pilot.pause(0.5)
    film.add(app, "Enter opens the hit", 3.5)
    (out / "recording.svg").write_text(film.svg(), encoding="utf-8")
    await pilot.press("escape")
    app.chat.query_one(Sidebar).find("")
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
    installed = locations.manifests_dir()
    chosen.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="glmchat-screenshots-") as home:
        os.environ["GLMCHAT_HOME"] = home  # a history of its own: nobody's conversations are in the pictures
        os.environ.update(GLMCHAT_LANG="en", TERM="xterm-256color", COLORTERM="truecolor")  # whoever draws them
        os.environ.pop("NO_COLOR", None)
        if installed.is_dir():
            shutil.copytree(installed, locations.manifests_dir())
        asyncio.run(draw(launch, chosen.out))


if __name__ == "__main__":
    main()
