"""Has candidates answer the rows of some data, and compares what they wrote, for `glmchat eval`.

request: candidates: [{text, model, engine: arguments of EngineOptions, adapters: [[name, folder, weight]], sampling}];
data; also: other data, each with a table of its own; format, columns, system, max_length, limit, bleu, seed; again:
answer anew what was answered; rows: how many are shown on each side; out: where the predictions of `data` go, None for
nowhere.

Each answer is on the disk before the next one is counted, so a run that was stopped or killed goes on where it was.
What is asked and what came of it stands in a folder for each data (core/eval_folder.py).
Data of which no row can be used are refused before torch is imported.
"""

from __future__ import annotations

import sys
from typing import Any

from glmchat.jobs.lines import Request, Tell, run
from glmchat.tuning.checking import check_questions


def work(request: Request, tell: Tell) -> dict[str, Any]:
    """The result: that of `judge`."""
    for data in (request["data"], *([each] for each in request.get("also", ()))):
        check_questions(data, request.get("format"), request.get("columns") or {}, request.get("system"))
    from glmchat.jobs.judging import judge

    return judge(request, tell)


if __name__ == "__main__":
    sys.exit(run(work))
