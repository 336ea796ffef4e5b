"""`glmchat doctor`: what runs here, what does not, and why."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from glmchat.cli import output
from glmchat.core.language import tr
from glmchat.core.text import human_bytes


def register(app: typer.Typer) -> None:
    app.command("doctor")(doctor)
    app.command("env", hidden=True)(doctor)


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="JSON on stdout.")] = False,
) -> None:
    """Report versions, devices, kernels, threads, memory, paths, database, proxies and the terminal."""
    from glmchat.chat.diagnosis import diagnose

    found = diagnose(on_wait=lambda: output.say(tr("asking the engine about devices and kernels…")))
    if as_json:
        output.json_line(found)
        return
    for section, rows in found.items():
        if section == "problems":
            continue
        output.data(f"{tr(section)}")
        for name, value in rows.items():
            output.data(f"  {name}: {_shown(name, value)}")
    problems: list[dict[str, str]] = found["problems"]
    output.data(tr("problems") if problems else tr("no problems found"))
    for problem in problems:
        output.data(f"  {problem['message']}")
        output.data(f"    {tr('hint')}: {problem['hint']}")


def _shown(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return tr("yes") if value else tr("no")
    if isinstance(value, int) and name.endswith("bytes"):
        return human_bytes(value)
    if isinstance(value, list):
        return "; ".join(_shown(name, item) for item in value) or "-"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(key, item)}" for key, item in value.items())
    return str(value)
