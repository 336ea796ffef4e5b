"""Model folders drawn at random: glmchat makes of each what transformers makes of it, or refuses it in one line.

    OMP_NUM_THREADS=1 python benchmarks/folder_sweep.py [--first 0] [--draws 2000] [--seconds 2400] [--seed 17]

Each draw is a family, a vocabulary, a template, shards, an index, ties, ends, a type and a quantiser
(tests/folder_draws.py); compared are ids of a conversation and of a raw text, logits, greedy ids up to the end, the
text, a second turn, and what `show` and the check before a start say (tests/folder_checks.py). `--seed` runs one.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("GLMCHAT_HOME", tempfile.mkdtemp())
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from folder_checks import check, quiet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=2400.0, help="begin no further draw after so long")
    parser.add_argument("--seed", type=int, help="this draw alone")
    given = parser.parse_args()
    seeds = [given.seed] if given.seed is not None else range(given.first, given.first + given.draws)
    until = time.monotonic() + given.seconds
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    with quiet(), tempfile.TemporaryDirectory() as work:
        for seed in seeds:
            if time.monotonic() > until:
                counts["not tried"] += 1
                continue
            found = check(seed, Path(work) / "model")
            counts[found.result] += 1
            if found.result == "refused":
                reasons[found.reason.partition(";")[0].partition(":")[0]] += 1
            if found.result == "differs" or given.seed is not None:
                print(found, flush=True)
    print(f"{len(seeds)} draws: {dict(counts)}; refused: {dict(reasons)}")


if __name__ == "__main__":
    main()
