"""`glmchat show NAME --fit`: what a model takes on this machine, width by width and context by context."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from glmchat.cli import output
from glmchat.core.language import tr
from glmchat.core.text import human_bytes


def fit_json(path: Path) -> list[dict[str, Any]]:
    """The lines of the table, for `--json`."""
    from glmchat.checkpoints.fit import fit_table

    return [row.to_json() for row in fit_table(path)]


def show_fit(path: Path) -> None:
    from glmchat.checkpoints.fit import fit_table

    rows = fit_table(path)
    if not rows:
        output.say(tr("its files do not contain enough information to tell"))
        return
    words = {True: tr("yes"), False: tr("no"), None: "?"}
    sizes = (tr("weights"), tr("KV cache"), tr("scratch"), tr("program"), tr("together"))
    output.table(
        (tr("bits"), tr("context"), *sizes, tr("fits")),
        [
            (
                tr(row.quant) if row.quant == "as it is" else row.quant,
                f"{row.context:,}",
                *map(human_bytes, (row.memory.weights, row.memory.cache, row.memory.scratch, row.memory.runtime)),
                human_bytes(row.memory.total),
                words[row.fits],
            )
            for row in rows
        ],
        right=range(1, 7),
    )
    if rows[0].free is not None:
        output.say(tr("{size} free", size=human_bytes(rows[0].free)))
