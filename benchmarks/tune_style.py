"""The starter model is taught to answer in one sentence that begins with "In short:", and is asked before and after.

    python -P benchmarks/tune_style.py [--rows 160] [--keep FOLDER]

Rows are made of LLaMA-Factory's alpaca_en_demo.json (outside the repository): its questions, and of its answers the
first sentence. Held out are 40 rows that are not learned; general text is c4_demo.jsonl. Printed: losses with the
intervals of their differences, the share of answers that have the style and that stopped by themselves, and some
answers before and after.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from installed_command import glmchat

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data" / "llama-factory"
STYLE = "In short: "
HELD, GENERAL = 40, 60


def style_rows(count: int) -> list[dict[str, str]]:
    """Questions without an input whose answers begin with a sentence of an ordinary length."""
    rows = []
    for row in json.loads((DATA / "alpaca_en_demo.json").read_text(encoding="utf-8")):
        sentence = re.match(r"[A-Z][^.!?\n]{20,160}[.!?](?=\s|$)", row["output"])
        if not row["input"] and sentence and len(row["instruction"]) < 160:
            rows.append({"question": row["instruction"], "answer": STYLE + sentence[0][0].lower() + sentence[0][1:]})
    return rows[:count]


def has_style(answer: str) -> bool:
    """One sentence, begun as it was taught."""
    return answer.startswith(STYLE) and "\n" not in answer.strip()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rows", type=int, default=160, help="learned rows")
    options.add_argument("--keep", type=Path, help="a folder for home and data, which then stays")
    asked = options.parse_args()
    if not DATA.is_dir():
        sys.exit(f"{DATA} is not here: nothing to learn from")
    folder = asked.keep or Path(tempfile.mkdtemp(prefix="style-"))
    folder.mkdir(parents=True, exist_ok=True)
    home = folder / "home"
    if not home.is_dir():
        shutil.copytree(ROOT / ".test-cache" / "data", home / "data")
    rows = style_rows(asked.rows + HELD)
    for name, part in (("learn", rows[HELD:]), ("held", rows[:HELD])):
        (folder / f"{name}.json").write_text(json.dumps(part, ensure_ascii=False, indent=1), encoding="utf-8")
    begun = time.perf_counter()
    glmchat("tune", "smollm2", str(folder / "learn.json"), "--as", "in-short", "--yes", "--plain",
            "--eval", str(folder / "held.json"), home=home)  # fmt: skip
    print(f"{len(rows) - HELD} rows learned in {time.perf_counter() - begun:.0f} s")
    held = compared(folder / "held.json", home, "--max-tokens", "80")
    general = compared(DATA / "c4_demo.jsonl", home, "--limit", str(GENERAL), "--max-length", "512")
    for what, (_, table) in (("held-out rows", held), ("general text", general)):
        before, after = (one["values"]["perplexity"] for one in table["candidates"])
        change = table["candidates"][1]["differences"]["loss"]
        between = f"loss {change['mean']:+.3f}, between {change['low']:+.3f} and {change['high']:+.3f}"
        print(f"{what}: perplexity {before:.3f} -> {after:.3f} ({after / before - 1:+.1%}); {between}")
    answers, table = held
    for place, one in enumerate(table["candidates"]):
        mine = [answer["predict"] or "" for answer in answers if answer["candidate"] == one["text"]]
        share = sum(map(has_style, mine)) / len(mine)
        stopped = one["values"]["stopped"]
        print(f"{('before', 'after')[place]}: {share:.0%} in the style, {stopped:.0f}% stopped by themselves")
        for row, answer in zip(rows[:3], mine, strict=False):
            print(f"    {row['question']}\n        {' '.join(answer.split())[:150]}")


def compared(data: Path, home: Path, *options: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Every answer of the model without and with the adapter, and the table."""
    said = glmchat("eval", "smollm2", "+in-short", str(data), "--json", *options, home=home)
    events = [json.loads(line) for line in said.splitlines()]
    answers = sorted((one for one in events if one["event"] == "answer"), key=lambda one: int(one["row"]))
    return answers, events[-1]


if __name__ == "__main__":
    main()
