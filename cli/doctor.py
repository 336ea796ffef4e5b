"""`glmchat doctor`: what runs here, what does not, and why."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from glmchat.cli import output
from glmchat.core.language import tr
from glmchat.core.text import human_bytes, one_line


def register(app: typer.Typer) -> None:
    app.command("doctor")(doctor)
    app.command("env", hidden=True)(doctor)


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="JSON on stdout.")] = False,
) -> None:
    """Report versions, devices, kernels, threads, memory, paths, database, proxies and the terminal."""
    from glmchat.chat.diagnosis import diagnose

    report = diagnose(on_wait=lambda: output.say(tr("asking the engine about devices and kernels…")))
    if as_json:
        output.json_line(report)
        return
    for section, rows in report.items():
        if section == "problems":
            continue
        output.data(f"{tr(section)}")
        for name, value in rows.items():
            for line in _lines(name, value):
                output.data(f"  {line}")
    problems: list[dict[str, str]] = report["problems"]
    output.data(tr("problems") if problems else tr("no problems found"))
    for problem in problems:
        output.data(f"  {problem['message']}")
        output.data(f"    {tr('hint')}: {problem['hint']}")


def _lines(name: str, value: Any) -> list[str]:
    """One fact, in as many lines as it needs."""
    if name == "kernels" and isinstance(value, list):
        return [line for row in value for line in _kernel(row)]
    if name == "not_chosen" and isinstance(value, dict):
        return [tr("{device} is not used: {reason}", device=one_line(d), reason=one_line(w)) for d, w in value.items()]
    return [f"{name}: {_shown(name, value)}"]


def _kernel(row: dict[str, Any]) -> list[str]:
    """Which kernel multiplies at a width, and below it each better one that was passed over, with the reason."""
    first = tr("{bits} bits on {device}: {kernel}", bits=row["bits"], device=row["device"], kernel=row["kernel"])
    return [
        first,
        *(
            "  " + tr("not {kernel}: {reason}", kernel=one_line(kernel), reason=one_line(str(reason)))
            for kernel, reason in row["passed_over"].items()
        ),
    ]


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
