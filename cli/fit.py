"""`glmchat show NAME --fit`: what a model takes on this machine, width by width and context by context."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from glmchat.cli import output
from glmchat.core.cards import card_obstacle, compiler_obstacle, driver_obstacle, installed_torch, look
from glmchat.core.language import tr
from glmchat.core.text import human_bytes, one_line


def fit_json(path: Path) -> list[dict[str, Any]]:
    """The lines of the table, for `--json`."""
    from glmchat.checkpoints.card_fit import fit_table

    return [row.to_json() for row in fit_table(path)]


def show_fit(path: Path) -> None:
    from glmchat.checkpoints.card_fit import fit_table

    rows = fit_table(path)
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
