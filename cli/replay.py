"""`glmchat replay`: an answer said again in a fresh process, and whether it is the same."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glmchat.cli import output
from glmchat.cli.output import cancelled_by_interrupt
from glmchat.core.errors import Usage
from glmchat.core.language import tr
from glmchat.core.messages import parse_sampling_value, sampling_name
from glmchat.core.text import one_line

if TYPE_CHECKING:
    from glmchat.chat.replay.replay import Outcome, ReplayPlan


def register(app: typer.Typer) -> None:
    app.command("replay")(replay)


def replay(
    target: Annotated[
        str, typer.Argument(metavar="ID", help="A conversation (its last answer), or m and the number of an answer.")
    ],
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Try another sampling setting; repeatable."),
    ] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Try another number of threads.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines on stdout.")] = False,
) -> None:
    """Repeat a stored answer with its weights, seed and passes, and compare the token ids.

    Exit code 0: identical, or it parts as --set or --threads asked it to. 1: it parts; the token, the logit margin
    there, and every recorded fact that differs (weights, adapter, template, setting, threads, kernel, version) are
    named. Identity is promised on the same kernels and threads only.
    """
    from glmchat.chat.history.history import History
    from glmchat.chat.replay.replay import Outcome, Replaying, plan_replay, run_replay

    with History.default() as history:
        plan = plan_replay(history, target, changes=sampling_changes(setting or []), threads=threads)
    if as_json:
        stretches = [s.to_json() for s in plan.stretches]
        facts = {"message": plan.message, "conversation": plan.conversation, "model": plan.model}
        output.json_line({"event": "start", **facts, "tokens": plan.tokens, "stretches": stretches})
    else:
        output.say(_described(plan))
    outcome: Outcome | None = None
    with cancelled_by_interrupt() as cancelled, closing(run_replay(plan, cancelled)) as events:
        for event in events:
            if isinstance(event, Replaying) and as_json:
                output.json_line({"event": "stretch", "number": event.number, "tokens": event.tokens})
            elif isinstance(event, Outcome):
                outcome = event
    assert outcome is not None
    if as_json:
        output.json_line({"event": "end", **outcome.to_json()})
    else:
        _tell(outcome)
    is_asked_for = bool(setting) or threads is not None
    raise typer.Exit(0 if outcome.identical or is_asked_for else 1)


def sampling_changes(given: list[str]) -> dict[str, Any]:
    """What `--set NAME=VALUE …` asks for: field -> value. Raises Usage."""
    changes = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise Usage(
                tr("{text} does not set anything", text=repr(one_line(text, 60))),
                hint=tr("--set NAME=VALUE, for example --set temperature=0"),
                code="replay.set",
            )
        field = sampling_name(name)
        changes[field] = parse_sampling_value(field, value)
    return changes


def _described(plan: ReplayPlan) -> str:
    reused = sum(int(s.facts.get("cached_n") or 0) for s in plan.stretches)
    return tr(
        "{model}: {tokens} tokens in {stretches} segments; {read} prompt tokens read, {reused} reused",
        model=one_line(plan.model or "?"),
        tokens=plan.tokens,
        stretches=len(plan.stretches),
        read=sum(len(s.prompt) for s in plan.stretches) - reused,
        reused=reused,
    )


def _tell(outcome: Outcome) -> None:
    if outcome.identical:
        output.data(tr("identical: {tokens} tokens", tokens=outcome.tokens))
    else:
        output.data(
            tr(
                "first difference at token {token} of {tokens}: {then} then, {now} now",
                token=outcome.token,
                tokens=outcome.tokens,
                then=_word(outcome.then, outcome.then_text),
                now=_word(outcome.now, outcome.now_text),
            )
        )
        output.data(
            tr(
                "logits there: the first leads the second by {margin}, the new token leads the old one by {distance}",
                margin=f"{outcome.margin:.4f}",
                distance=f"{outcome.distance:.4f}",
            )
        )
    for difference in outcome.differences:
        output.data(difference.sentence())
    if not outcome.differences and not outcome.identical:
        output.data(tr("nothing in the record differs"))


def _word(token: int | None, text: str | None) -> str:
    return f"{token}" if text is None else f"{token} {one_line(repr(text), 40)}"
