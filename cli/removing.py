"""A removal is shown, asked for and carried out, of models and of adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from glmchat.cli import output
from glmchat.core.language import tr
from glmchat.core.text import human_bytes

if TYPE_CHECKING:
    from glmchat.hub.removal import RemovalPlan


def carry_out(plan: RemovalPlan, *, yes: bool, dry_run: bool, as_json: bool) -> None:
    from glmchat.hub.removal import execute

    if as_json:
        output.json_line({"event": "plan", **plan.to_json()} if not dry_run else plan.to_json())
    else:
        for step in plan.steps:
            size = human_bytes(step.size_bytes) if step.size_bytes else ""
            output.data(f"{step.path}  {size}".rstrip())
    for kept in plan.keeps:
        output.say(kept)
    if not plan.steps:
        output.say(tr("there is nothing to remove"))
        return
    size = human_bytes(plan.bytes_freed)
    if dry_run:
        output.say(tr("{size} would be freed", size=size))
        return
    names = ", ".join(plan.names) or tr("{count} leftovers", count=len(plan.steps))
    if not output.confirm(tr("remove {names} and free {size}?", names=names, size=size), assume_yes=yes):
        output.say(tr("nothing was removed"))
        return
    execute(plan)
    output.say(tr("{size} freed", size=size))
    if as_json:
        output.json_line({"event": "done", "bytes_freed": plan.bytes_freed})
