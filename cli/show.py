"""`glmchat show`: what a model is, where its files came from; with `--fit` what it takes on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glmchat.cli import output
from glmchat.cli.completion import complete_here
from glmchat.core.cards import card_obstacle, compiler_obstacle, driver_obstacle, installed_torch, look
from glmchat.core.language import tr
from glmchat.core.text import human_bytes, one_line

if TYPE_CHECKING:
    from glmchat.checkpoints.fit import Fit
    from glmchat.hub.installed import Installed


def register(app: typer.Typer) -> None:
    app.command("show")(show)


def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A model or an adapter.", autocompletion=complete_here)],
    fit: Annotated[
        bool, typer.Option("--fit", help="How much memory it needs on this machine, and what fits.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON on stdout.")] = False,
) -> None:
    """Show a model: where it is, its files and where they came from, the memory it needs, its licence.

    And what it was evaluated on last, and of a model that learned here how. Of an adapter it tells what
    `glmchat adapters show` does.
    """
    from glmchat.chat.launch import installed_row, problem_of
    from glmchat.cli import adapters as of_adapters
    from glmchat.hub import adapters, catalogue, trained_models
    from glmchat.hub.installed import details

    if not fit and adapters.by_name(name) is not None:
        of_adapters.show(name, as_json=as_json)
        return
    row = installed_row(name, incomplete=True)
    if fit:
        from glmchat.checkpoints.card_fit import fit_table

        rows = fit_table(row.path)
        if as_json:
            output.json_line({"name": row.name, "fit": [one.to_json() for one in rows]})
        else:
            _show_fit(rows)
        return
    facts = details(row, catalogue.load())
    problem, trained = problem_of(row), trained_models.facts_of(row)
    if as_json:
        told = {"problem": problem.to_json() if problem else None, "evaluations": of_adapters.evaluated(row.name)}
        told |= {"trained": trained} if trained else {}
        output.json_line({**row.to_json(), **facts, **told})
        return
    lines: list[tuple[str, Any]] = [
        (tr("name"), row.name),
        (tr("kind"), row.kind),
        (tr("family"), _family(row, facts["architecture"])),
        (tr("quant"), row.quant),
        (tr("repository"), row.repo),
        (tr("revision"), row.revision),
        (tr("made from"), row.base),
        *(
            (word, None if value is None else one_line(str(value), 400))
            for word, value in of_adapters.trained_lines(trained)
        ),
        (tr("path"), row.path),
        (tr("size"), human_bytes(row.size_bytes) + ("" if row.complete else f" ({tr('incomplete')})")),
    ]
    if facts["licence"]:
        lines.append((tr("licence"), catalogue.Licence(**facts["licence"]).line()))
    if facts["readers"]:
        lines.append((tr("other programs"), facts["readers"]["note"]))
    lines += _network(facts["architecture"])
    for quant, size in (facts["memory"] or {}).items():
        lines.append((tr("memory, {quant}", quant=tr("as it is") if quant == "none" else quant), human_bytes(size)))
    if problem is not None:
        lines += [(tr("does not run"), problem.message), (tr("what helps"), problem.hint)]
    for word, value in lines:
        if value is not None:
            output.data(f"{word}: {value}")
    if facts["files"]:
        output.data("")
        output.table(
            (tr("file"), tr("size"), tr("hash"), tr("from"), tr("date")),
            [
                (f["path"], human_bytes(f["size"]), (f["sha256"] or f["git_blob"] or "?")[:12], f["host"], f["date"])
                for f in facts["files"]
            ],
            right=(1,),
        )
    of_adapters.say_evaluations(row.name)


def _family(row: Installed, facts: Any) -> str | None:
    """With the name that its makers gave it, where it is computed as a member of another family."""
    if not facts:
        return row.family
    kind, family = facts["model_type"], row.family or one_line(facts["family"], 40)
    if kind is None or family.startswith(kind):
        return family
    return tr("{model_type}, computed as {family}", model_type=one_line(kind, 40), family=family)


def _network(facts: Any) -> list[tuple[str, Any]]:
    """What config.json says of the network; text in it comes from outside."""
    if not facts:
        return []
    number = {key: f"{value:,}" for key, value in facts.items() if isinstance(value, int)}
    lines: list[tuple[str, Any]] = [
        (tr("generation"), facts["generation"]),
        (tr("layers"), number.get("layers")),
        (tr("vocabulary"), number.get("vocabulary")),
        (tr("context"), number.get("context")),
        (tr("parameters"), number.get("parameters")),
        (tr("prefix"), number.get("prefix_length")),
    ]
    if facts["ignored_code"]:
        names = one_line(", ".join(facts["ignored_code"]))
        lines.append((tr("code, ignored"), tr("config.json points at {files}; glmchat never runs it", files=names)))
    return lines


def _show_fit(rows: Sequence[Fit]) -> None:
    """The table, width by width and context by context."""
    if not rows:
        output.say(tr("its files do not contain enough information to tell"))
        return
    words = {True: tr("yes"), False: tr("no"), None: "?"}
    sizes = (tr("weights"), tr("KV cache"), tr("scratch"), tr("program"), tr("together"))
    devices = list(dict.fromkeys(row.device for row in rows))
    where = (tr("device"),) if len(devices) > 1 else ()
    output.table(
        (*where, tr("bits"), tr("context"), *sizes, tr("fits")),
        [
            (
                *((row.device,) if where else ()),
                tr(row.quant) if row.quant == "as it is" else row.quant,
                f"{row.context:,}",
                *map(human_bytes, (row.memory.weights, row.memory.cache, row.memory.scratch, row.memory.runtime)),
                human_bytes(row.memory.total),
                words[row.fits],
            )
            for row in rows
        ],
        right=range(len(where) + 1, len(where) + 7),
    )
    for device in devices:
        free = next(row.free for row in rows if row.device == device)
        if free is not None:
            size = human_bytes(free)
            output.say(tr("{device}: {size} free", device=device, size=size) if where else tr("{size} free", size=size))
    _say_obstacles()


def _say_obstacles() -> None:
    """Cards that cannot be used, each with what helps; a machine without any is not worth a word."""
    cards, build = look(), installed_torch()
    if cards.driver is None:
        return
    obstacles = [driver_obstacle(cards, build)]
    if obstacles == [None] and build is not None:
        obstacles = [card_obstacle(card, build) for card in cards.visible]
        obstacles += [compiler_obstacle()]
    for obstacle in obstacles:
        if obstacle is not None:
            output.say(one_line(obstacle.message, 300))
            output.say(f"  {tr('hint')}: {one_line(obstacle.hint, 300)}")
