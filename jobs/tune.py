"""Learns an adapter or a model: a program of its own session, so that no lost terminal and no killed view ends it.

    python -P -m glmchat.jobs.tune RUN [--go]
    accelerate launch … -m glmchat.jobs.tune RUN --go        (docs/tuning.md)

RUN is a run's folder (core/run_folder.py), which says what is to be learned and takes all that comes of it. Without
--go the plan is told and "go" awaited on stdin; at the end of stdin instead, nobody wants it, and the folder goes.
SIGTERM and SIGINT save and stop, a second one stops at once; SIGHUP is nothing to it.

What can be refused by rows and words alone is refused before torch is imported.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path

from glmchat.core.errors import Failed, GlmchatError, Interrupted, refusal
from glmchat.core.language import tr
from glmchat.core.run_folder import Run
from glmchat.core.text import one_line
from glmchat.jobs.telling import NotWanted, Teller
from glmchat.tuning.checking import check_run


def _learn(run: Run, teller: Teller, *, goes: bool) -> None:
    teller({"kind": "stage", "say": tr("reading the rows")})
    check_run(run.recipe())
    begun = time.perf_counter()
    from glmchat.jobs.learn import work

    work(run, teller, goes=goes, beginning=time.perf_counter() - begun)


def _forget(run: Run) -> None:
    """Of a plan that failed nothing stays, once whoever asked for it has heard why, or is gone."""
    sys.stdin.readline()
    run.remove()


def main() -> int:
    """Returns the exit code; what failed stands in the log."""
    run = Run(Path(sys.argv[1]).absolute())
    goes = "--go" in sys.argv[2:]
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    os.umask(0o077)
    teller = Teller(run)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, teller.hear)
    try:
        teller.note("planning")
        _learn(run, teller, goes=goes)
    except NotWanted:
        run.remove()
        return 0
    except GlmchatError as problem:
        teller.end("failed", problem)
        if not goes and not teller.learning:
            _forget(run)
        return problem.exit
    except OSError as error:
        if (refused := refusal(error)) is None:
            raise
        with suppress(OSError):
            teller.end("failed", refused)
        return refused.exit
    except Exception as error:  # noqa: BLE001 (nobody else would hear of it)
        traceback.print_exc()
        wrong = Failed(
            tr("the run failed by a mistake of glmchat: {error}", error=one_line(f"{error!r}", 300)),
            hint=tr("its log is {path}", path=str(run.folder / "job.log")),
            code="tune.bug",
        )
        teller.end("failed", wrong)
        return wrong.exit
    return Interrupted.exit if teller.told else 0


if __name__ == "__main__":
    sys.exit(main())
