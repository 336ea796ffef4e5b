"""Kill the window and its engine with -9 at random points of a streaming answer, again and again: what is lost?

    python benchmarks/kill_chat.py [--kills 100] [--seed 0]

Every kill is followed by a look into the database (whole, nothing missing that stood on the screen for a second) and
by /continue, which goes on with the same answer. Prints one JSON line; stops at the first loss.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "tui"))

from kills import live_and_die

PAIRS = ("ab", "cd", "ef", "gh", "ij")  # letters of two lives that follow each other differ


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    losses: list[float] = []
    text = ""
    with tempfile.TemporaryDirectory(prefix="kill-chat-") as home:
        for life in range(options.kills // 2):
            text, lost = live_and_die(Path(home), PAIRS[life % len(PAIRS)], text, chance)
            losses += lost
    print(json.dumps({
        "kills": len(losses), "oldest_loss_seconds": round(max(losses), 3),
        "words_in_the_answer": len(text.split()), "integrity_check": "ok each time",
    }))  # fmt: skip


if __name__ == "__main__":
    main()
