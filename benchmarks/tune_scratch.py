"""A GPT-2 learns a small Chinese novel from nothing, is judged by lines that it has not seen, and goes on with a text.

    python -P benchmarks/tune_scratch.py [--lines 1500] [--minutes 1.5] [--keep FOLDER]

The novel is made: sentences of people, places, times and things that are put together by rules, so that a model can
learn how a sentence goes on, and no model can know who comes next. Printed: what the run tells of loss and token
accuracy in held-out lines, before and after; what the installed command continues; and how many of the continued
sentences follow the rules.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from installed_command import glmchat

WHO = ("张三", "李四娘", "王五", "赵老人", "小和尚", "女侠", "书生", "渔夫")
WHEN = ("清晨", "黄昏时分", "月下", "大雪之夜", "三日之后")
WHERE = ("山上", "河边", "古寺里", "城门外", "竹林中", "酒楼上")
WHAT = {"饮": ("一壶酒", "半盏茶"), "读": ("一卷旧书", "一封家信"), "练": ("一套剑法", "一路拳脚"), "等": ("一位故人",)}
HOW = ("忽然听见远处的钟声", "心中想起了故乡", "抬头望见一轮明月", "不觉落下泪来")
SENTENCE = re.compile(
    f"({'|'.join(WHEN)})，({'|'.join(WHO)})在({'|'.join(WHERE)})"
    f"({'|'.join(verb + thing for verb, things in WHAT.items() for thing in things)})，({'|'.join(HOW)})。"
)
MEASURES = {"model_type": "gpt2", "n_layer": 3, "n_head": 4, "n_embd": 128, "n_positions": 256}
BEGIN = "黄昏时分，"


def novel(lines: int, seed: int) -> str:
    """Each line is a paragraph of one to six sentences."""
    draw = random.Random(seed)
    made = []
    for _ in range(lines):
        sentences = []
        for _ in range(draw.randint(1, 6)):
            verb = draw.choice(list(WHAT))
            sentences.append(f"{draw.choice(WHEN)}，{draw.choice(WHO)}在{draw.choice(WHERE)}{verb}"
                             f"{draw.choice(WHAT[verb])}，{draw.choice(HOW)}。")  # fmt: skip
        made.append("".join(sentences))
    return "\n".join(made) + "\n"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--lines", type=int, default=1500, help="of the novel; a tenth more are held out")
    options.add_argument("--minutes", type=float, default=1.5, help="that it learns")
    options.add_argument("--keep", type=Path, help="a folder for home and data, which then stays")
    asked = options.parse_args()
    folder = asked.keep or Path(tempfile.mkdtemp(prefix="novel-"))
    try:
        measure(folder, asked.lines, asked.minutes)
    finally:
        if asked.keep is None:
            shutil.rmtree(folder, ignore_errors=True)


def measure(folder: Path, lines: int, minutes: float) -> None:
    texts, home = folder / "novels", folder / "home"
    texts.mkdir(parents=True, exist_ok=True)
    (texts / "one.txt").write_text(novel(lines, 1), encoding="utf-8")
    (folder / "held.txt").write_text(novel(max(1, lines // 10), 2), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(MEASURES), encoding="utf-8")
    begun = time.perf_counter()
    said = glmchat("tune", "train:1000", str(texts), "--method", "scratch", "--config", str(folder / "config.json"),
                   "--eval", str(folder / "held.txt"), "--max-length", "128", "--tokens-per-step", "1024",
                   "--minutes", f"{minutes:g}", "--as", "novel", "--json", home=home)  # fmt: skip
    took = time.perf_counter() - begun
    events = [json.loads(line) for line in said.splitlines()]
    steps = [event for event in events if event.get("event") == "step"]
    judged = [event for event in events if event.get("event") == "evaluation"]
    print(f"{len(steps)} steps, {sum(step['tokens'] for step in steps):,} tokens in {took:.0f} s with all around")
    print(f"first step: loss {steps[0]['loss']:.3f}, token accuracy {steps[0]['token_accuracy']:.1%}")
    for event in (judged[0], judged[-1]):
        print(f"held out, step {event['step']}: loss {event['loss']:.3f}, perplexity {event['perplexity']:.2f}, "
              f"token accuracy {event['token_accuracy']:.1%}")  # fmt: skip
    go_on(home)


def go_on(home: Path) -> None:
    """Continue a text, and hold what comes against the rules."""
    text = glmchat(
        "run", "novel", "--complete", BEGIN, "--max-tokens", "120", "--temp", "0.8", "--seed", "1", home=home
    )
    whole = text if text.startswith(BEGIN) else BEGIN + text
    print(whole.strip())
    sentences = re.findall(r"[^。\n]+。", whole)
    right = sum(bool(SENTENCE.fullmatch(sentence)) for sentence in sentences)
    print(f"{right} of {len(sentences)} whole sentences follow the rules")


if __name__ == "__main__":
    main()
