"""The runs of `glmchat tune` at a terminal: planned, followed to their end, listed, stopped, deleted."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import typer

from glmchat.cli import output
from glmchat.cli.output import cancelled_by_interrupt
from glmchat.core import typed_ahead
from glmchat.core.errors import Interrupted, Usage
from glmchat.core.language import tr
from glmchat.core.shell import shell_line, shell_word
from glmchat.core.text import duration, short_name

if TYPE_CHECKING:
    from glmchat.core.run_folder import Run


def plan(request: dict[str, Any], *, dry_run: bool, asks: bool, shows_page: bool, as_json: bool) -> Run | None:
    """The run that begins to learn; None where it was only a plan, or where a person said no."""
    from glmchat.chat import tuning, tuning_words

    begun = tuning.Begun(request["name"], request)

    def hear(record: Mapping[str, Any]) -> None:
        for line in tuning_words.record_lines(record):
            output.say(line)

    with cancelled_by_interrupt() as cancelled:
        page = begun.page(cancelled, hear)
    if as_json and shows_page:
        output.json_line({"event": "page", **{key: value for key, value in page.items() if key != "kind"}})
    for line in () if as_json else tuning_words.record_lines(page):
        for part in output.prose(line, sys.stdout):
            output.data(part)
    try:
        if dry_run or (asks and not output.agree(tr("go on?"))):
            begun.give_up()
            if not dry_run:
                output.say(tr("nothing was trained"))
            return None
    except BaseException:
        begun.give_up()
        raise
    return begun.go()


def prepare(request: Mapping[str, Any], processes: int, *, as_json: bool) -> None:
    from glmchat.chat import tuning

    run, command = tuning.prepare(request["name"], request, processes)
    if as_json:
        output.json_line({"event": "prepared", "run": run.id, "folder": str(run.folder), "command": command})
        return
    output.say(tr("prepared: this starts it, and `glmchat tune --attach {name}` shows it", name=shell_word(run.id)))
    output.data(shell_line(command))


def how_to_come_back(run: Run) -> str:
    name = shell_word(run.id)
    return tr(
        "it goes on by itself; `glmchat tune --attach {name}` shows it, `glmchat tune --stop {name}` stops it",
        name=name,
    )


def look(run: Run, *, plain: bool, as_json: bool) -> None:
    """Follow a run to its end, or until it is left. Raises the error that ended it."""
    from glmchat.chat import tuning, tuning_words

    is_terminal = output.interactive() and output.is_terminal(sys.stdout)
    if is_terminal and not plain and not as_json and os.environ.get("TERM") not in ("dumb", "unknown", "", None):
        _window(run)
        if run.at_work:
            output.say(how_to_come_back(run))
            return
        _tell_end(run, tuning.progress_of(run).end or {"state": "dead", **tuning.died(run).to_json()}, as_json=False)
        return
    began = False  # what was said before has been read by whoever agreed
    with _stopping_by_interrupt(run):
        for records in tuning.follow(run):
            for record in records:
                began = began or record.get("kind") == "start"
                if record.get("kind") == "end":
                    last = record
                elif as_json:
                    output.json_line({"event": record.get("kind"), **{k: v for k, v in record.items() if k != "kind"}})
                elif began and record.get("kind") != "page":
                    for line in tuning_words.record_lines(record):
                        output.data(line)
    _tell_end(run, last, as_json=as_json)


def _window(run: Run) -> None:
    before = typed_ahead.hold()
    try:
        from glmchat.tui.app import show_run

        code = show_run(run, before)
    finally:
        typed_ahead.release()
    if code:
        raise typer.Exit(code)


def _tell_end(run: Run, end: Mapping[str, Any], *, as_json: bool) -> None:
    """Raises what ended it, if that was no good end."""
    from glmchat.chat import tuning, tuning_words

    if end.get("state") == "stopped":
        raise Interrupted(
            tr("stopped: {name} is saved", name=run.id),
            hint=f"glmchat tune --resume {shell_word(run.id)}",
            code="tune.stopped",
        )
    if end.get("state") != "done":
        raise tuning.error_of(end)
    if as_json:
        facts = {key: value for key, value in end.items() if key not in ("kind", "state")}
        output.json_line({"event": "done", "run": run.id, **facts})
        return
    for line in tuning_words.end_lines(end):
        for part in output.prose(line, sys.stderr):
            output.say(part)
    recipe = run.recipe()
    if model := end.get("model"):
        completes = " --complete" if recipe.get("method") == "scratch" else ""  # it has no chat template
        output.say(f"glmchat run {shell_word(str(model))}{completes}")
    base = str(recipe.get("base", ""))
    if adapter := end.get("adapter"):
        output.say(f"glmchat run {shell_word(base)} --adapter {shell_word(str(adapter))}")


@contextmanager
def _stopping_by_interrupt(run: Run) -> Iterator[None]:
    """Ctrl-C saves and stops the run; a second one stops it at once. What it says then still comes."""
    from glmchat.chat import tuning

    def interrupt(number: int, frame: object) -> None:
        with suppress(Usage):  # it is at work on another machine: only looking ends here
            tuning.stop(run)
            output.say(tr("saving; Ctrl+C again stops at once"))
            return
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def print_list(*, as_json: bool) -> None:
    from glmchat.chat import tuning, tuning_words
    from glmchat.core.run_folder import runs

    rows = [(run, tuning.progress_of(run)) for run in runs()]
    if as_json:
        output.json_line([tuning_words.run_facts(*row) for row in rows])
    elif not rows:
        output.say(tr("there are no runs yet; `glmchat tune BASE DATA` starts one"))
    else:
        output.table(
            (tr("run"), tr("state"), tr("base"), tr("step"), tr("loss"), tr("time left")),
            [
                (
                    run.id,
                    tuning_words.run_words(run),
                    short_name(str(run.recipe().get("base", ""))),
                    f"{progress.now['step']}/{progress.now.get('steps', '?')}" if progress.now else "",
                    f"{progress.losses[-1][1]:.4f}" if progress.losses else "",
                    duration(progress.now["seconds_left"])
                    if run.at_work and isinstance(progress.now.get("seconds_left"), int | float)
                    else "",
                )
                for run, progress in rows
            ],
        )


def stop(run: Run) -> None:
    """Waits until it is saved."""
    from glmchat.chat import tuning

    if not tuning.stop(run):
        raise Usage(
            tr("the run {name} is not at work", name=run.id), hint="glmchat tune --list", code="run.not_at_work"
        )
    with _stopping_by_interrupt(run):
        for _ in tuning.follow(run):
            pass
    output.say(tr("stopped: {name} is saved", name=run.id))
    output.say(f"glmchat tune --resume {shell_word(run.id)}")


def remove(run: Run) -> None:
    if run.at_work:
        raise Usage(
            tr("the run {name} is at work", name=run.id),
            hint=f"glmchat tune --stop {shell_word(run.id)}",
            code="run.at_work",
        )
    run.remove()
    output.say(tr("{name} is deleted", name=run.id))
