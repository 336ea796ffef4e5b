"""`run --quant`: the quantised copy in the store, made on its first use."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from glmchat.checkpoints.recipe import Recipe
from glmchat.core import locations
from glmchat.core.errors import DoesNotFit
from glmchat.engine.quantize.plan import plan_quantise
from glmchat.engine.quantize.quantiser import execute

Report = Callable[[str, float], None]


def kept_copy(source: Path, bits: int, out: Path, manifest: Mapping[str, Any], report: Report) -> Path:
    """The folder `out`, quantised now if it is not there. report("quantize", 0..1) while that takes its time.

    Two processes that want the same copy make it once: the second waits. Raises what planning and quantising raise.
    """
    locations.private_dir(locations.data_dir())
    locations.private_dir(out.parent)
    with _only_one(out.with_name(f".{out.name}.lock")):
        if not out.exists():
            report("quantize", 0.0)
            try:
                plan = plan_quantise(source, out, Recipe(bits))
                execute(plan, manifest=manifest, on_progress=lambda p: report("quantize", p.done / max(p.total, 1)))
            except DoesNotFit as error:
                hint = "make room, or add --no-keep to quantise in memory only"
                raise DoesNotFit(error.message, hint=hint, code=error.code) from None
    return out


@contextmanager
def _only_one(lock: Path) -> Iterator[None]:
    number = os.open(lock, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(number, fcntl.LOCK_EX)
        yield
    finally:
        os.close(number)
