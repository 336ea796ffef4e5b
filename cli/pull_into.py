"""`glmchat pull --into PATH`: git-lfs pointers become the files they stand for."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

from glmchat.cli import output
from glmchat.core.language import tr
from glmchat.core.text import human_bytes


def pull_into(
    folder: Path,
    name: str | None,
    *,
    revision: str | None,
    endpoints: tuple[str, ...],
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Plan, show, fetch, replace in place."""
    from glmchat.cli.pull import _reporter
    from glmchat.hub import store
    from glmchat.hub.pointers import describe_into, execute_into, plan_into
    from glmchat.hub.references import parse

    plan = plan_into(folder, parse(name, revision=revision) if name else None, endpoints)
    if as_json:
        output.json_line(plan.to_json() if dry_run else {"event": "plan", **plan.to_json()})
    elif dry_run and plan.files:
        rows = [(file.path, human_bytes(file.pointer.size), file.pointer.oid[:12]) for file in plan.files]
        output.table((tr("file"), tr("size"), tr("hash")), rows, right=(1,))
    output.say(describe_into(plan))
    for problem in plan.problems:
        output.say(problem)
    if dry_run or not plan.files:
        return
    try:
        with nullcontext() if quiet or as_json else output.progress() as meter:
            got = execute_into(plan, _reporter(meter, as_json), lambda: False)
    except KeyboardInterrupt:
        raise store.stopped() from None
    if as_json:
        files = [{"path": one.path, "size": one.size, "sha256": one.sha256, "host": one.host} for one in got]
        output.json_line({"event": "done", "into": str(plan.folder), "files": files})
    else:
        output.say(tr("{count} files are in their place, every one verified", count=len(got)))
