"""The engines of this user: `glmchat ps` lists them, `glmchat stop` ends them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glmchat.cli import output
from glmchat.core import engine_records
from glmchat.core.engine_records import EngineRecord
from glmchat.core.errors import EngineDied, GlmchatError, UnknownModel, Usage
from glmchat.core.language import tr
from glmchat.core.text import human_bytes, one_line

if TYPE_CHECKING:
    from glmchat.chat.shared_engine import Users


def register(app: typer.Typer) -> None:
    app.command("ps")(ps)
    app.command("stop")(stop)


def complete_engines(incomplete: str) -> list[str]:
    """Names for the shell. Says nothing where something is wrong."""
    with suppress(GlmchatError, OSError):
        return sorted({name for name in (*_names(engine_records.running()), "all") if name.startswith(incomplete)})
    return []


def ps(*, as_json: Annotated[bool, typer.Option("--json", help="JSON lines on stdout.")] = False) -> None:
    """List the engines that run: their memory, their device, who uses them, and how long they stay."""
    rows = [_row(record) for record in engine_records.running()]
    if as_json:
        for row in rows:
            output.json_line(row)
        return
    if not rows:
        output.say(tr("no engine runs"))
        return
    from glmchat.chat.shared_engine import program_of

    output.table(
        [tr("model"), tr("quant"), tr("device"), tr("memory"), "pid", tr("used by"), tr("stays")],
        [
            [
                row["model"], row["quant"] or "-", row["device"], human_bytes(row["memory"] or 0), row["pid"],
                ", ".join(program_of(pid) for pid in row["users"]) or tr("nobody"), _stays(row),
            ]
            for row in rows
        ],
        right=(3,),
    )  # fmt: skip


def _row(record: EngineRecord) -> dict[str, Any]:
    from glmchat.chat.engine_process import process_memory

    users = _users(record)
    pid = engine_records.listener_pid(record) or record.pid
    return {
        "model": record.model,
        "quant": record.quant,
        "device": (users and users.device) or record.device,
        "context": record.context,
        "pid": pid,
        "memory": process_memory(pid),
        "shared": record.shared,
        "state": users.state if users else None,
        "users": list(users.pids) if users else ([] if record.shared else [record.starter]),
        "seconds_left": users.seconds_left if users else None,
        "keep_alive": record.keep_alive,
        "started": record.started,
    }


def _users(record: EngineRecord) -> Users | None:
    """None for an engine that belongs to one program, and for one that does not answer."""
    from glmchat.chat.shared_engine import users_of

    if record.shared:
        with suppress(EngineDied):
            return users_of(Path(record.socket))
    return None


def _stays(row: dict[str, Any]) -> str:
    if row["state"] == "loading":
        return tr("loading")
    if not row["shared"]:
        return tr("as long as its program")
    left = row["seconds_left"]
    if left is None:
        return tr("while it is used") if row["state"] else tr("does not answer")
    return tr("{minutes}:{seconds} more", minutes=int(left) // 60, seconds=f"{int(left) % 60:02}")


def stop(
    *,
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME", help="A model, or all; may be left out where one runs.", autocompletion=complete_engines
        ),
    ] = None,
) -> None:
    """End engines that stay for whoever comes next, and give their memory back."""
    from glmchat.chat.shared_engine import end_engine

    records = engine_records.running()
    if not records:
        output.say(tr("no engine runs"))
        if name not in (None, "all"):
            raise _unknown(str(name), records)
        return
    if name is None and len(_names(records)) > 1:
        raise Usage(
            tr("{n} engines run", n=len(records)),
            hint=tr("name one: {names}; or glmchat stop all", names=one_line(", ".join(_names(records)), 200)),
            code="engine.which",
        )
    chosen = [record for record in records if name in (None, "all", record.model, str(record.pid))]
    if not chosen:
        raise _unknown(str(name), records)
    for record in chosen:
        end_engine(record)
        output.say(tr("{model} stopped", model=one_line(record.model)))


def _names(records: Sequence[EngineRecord]) -> list[str]:
    return list(dict.fromkeys(record.model for record in records))


def _unknown(name: str, records: Sequence[EngineRecord]) -> UnknownModel:
    return UnknownModel(
        tr("no engine runs for {name}", name=one_line(name, 80)),
        hint=tr("running: {names}", names=one_line(", ".join(_names(records)), 200) or tr("none")),
        code="engine.unknown",
    )
