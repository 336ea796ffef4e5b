"""Would prompt-lookup speculation pay? How often the last words were said before, times what more rows cost.

    python benchmarks/speculation.py [--shared ../shared] [--threads 2] [--answers 12]

Prompt lookup (Saxena 2023): where the last 3 (else 2) ids stand earlier in the context, the ids behind them are guessed
and verified in one pass of 1 + guesses rows. On written texts the true continuation decides what is accepted, on the
starter model its own greedy answers do. The price of rows is measured on packed matrices of the two sizes; attention,
the search and Python are left out, so the gains are upper bounds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from glmchat.core.messages import Sampling
from glmchat.engine import Engine, load_tokenizer
from glmchat.engine.quantize.linear import QuantLinear

ROOT = Path(__file__).resolve().parent.parent
STARTER = ROOT / ".test-cache" / "data" / "models" / "smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
GUESSES = (1, 2, 3, 4, 7)  # rows 2, 3, 4, 5, 8
MATRICES = {"starter (576 wide)": (3072, 576, 32, 30), "6B (4096 wide)": (27392, 4096, 128, 1)}
QUESTIONS = (
    "Write a short story about a fox.", "Explain how rain forms.", "List ten tips for learning a language.",
    "Write a Python function that sorts a list of names.", "What is the difference between a virus and a bacterium?",
    "Rewrite this politely: give me the report now, I have waited three days for the report.",
    "Summarise: The cat sat on the mat. The dog chased the cat. The cat climbed a tree and the dog waited below.",
    "Plan a weekend in Rome.", "Write an email to a landlord about a broken heater.", "What causes inflation?",
    "Translate to French: Good morning, how are you today?", "Give three arguments for and against homework.",
)  # fmt: skip


class Lookup:
    """Where each pair and each triple of ids stood last; told one id after the other."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self._last: dict[tuple[int, ...], int] = {}

    def push(self, token: int) -> None:
        for size in (2, 3):  # what ended before this id is remembered with it behind
            if len(self.ids) >= size:
                self._last[tuple(self.ids[-size:])] = len(self.ids)
        self.ids.append(token)

    def guess(self, count: int) -> Sequence[int]:
        for size in (3, 2):
            at = self._last.get(tuple(self.ids[-size:]))
            if at is not None:
                return self.ids[at : at + count]
        return ()


def passes(prompt: Sequence[int], answer: Sequence[int], count: int) -> Iterator[tuple[int, int]]:
    """(rows, ids won) of each pass over an answer, with `count` guesses at most."""
    lookup = Lookup()
    for token in prompt:
        lookup.push(token)
    at = 0
    while at < len(answer):
        guessed = lookup.guess(count)
        won = 0
        while won < len(guessed) and at + won < len(answer) and guessed[won] == answer[at + won]:
            won += 1
        for token in answer[at : at + won + 1]:
            lookup.push(token)
        yield 1 + len(guessed), min(won + 1, len(answer) - at)
        at += won + 1


def row_costs(threads: int) -> dict[str, dict[int, float]]:
    """Seconds of a pass of so many rows over that of one row."""
    torch.set_num_threads(threads)
    found = {}
    for name, (outputs, inputs, group, copies) in MATRICES.items():
        layers = []
        for _ in range(copies):  # so many that they do not stay in the caches
            q = torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8)
            scale = torch.full((outputs, inputs // group), 0.01)
            layers.append(QuantLinear.from_int4(q, scale, torch.zeros_like(scale)))
        inputs_of = {rows: torch.randn(rows, inputs) for rows in (1, *(1 + guesses for guesses in GUESSES))}
        times = dict.fromkeys(inputs_of, float("inf"))
        for _ in range(25):  # in turn, so that a busy moment falls on all of them
            for rows, x in inputs_of.items():
                times[rows] = min(times[rows], _seconds(layers, x))
        found[name] = {rows: max(1.0, seconds / times[1]) for rows, seconds in times.items()}
    return found


def _seconds(layers: Sequence[QuantLinear], x: torch.Tensor) -> float:
    started = time.perf_counter()
    for layer in layers:
        layer(x)
    return time.perf_counter() - started


def cost(costs: dict[int, float], rows: int) -> float:
    """Between the measured counts, the next larger one."""
    return next(found for count, found in costs.items() if count >= rows)


def texts(shared: Path) -> dict[str, list[tuple[str, str]]]:
    """(everything before, answer) of chats in the two languages."""
    data = shared / "data"

    def pairs(path: Path) -> list[tuple[str, str]]:
        rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))[:200]
        return [(f"{r['instruction']}\n{r.get('input') or ''}\n", r["output"]) for r in rows if len(r["output"]) > 40]

    turns = []
    for line in (data / "chatglm" / "multiturn_ptuning_readme.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        before = "".join(f"{q}\n{a}\n" for q, a in row.get("history", ()))
        turns.append((before + row["prompt"] + "\n", row["response"]))
    return {
        "Chinese instructions (alpaca_zh_demo)": pairs(data / "llama-factory" / "alpaca_zh_demo.json"),
        "Chinese chat (oaast_sft_zh)": pairs(data / "chatglm-efficient-tuning" / "oaast_sft_zh.json"),
        "Chinese turns (ChatGLM's own sample)": turns,
        "English instructions (alpaca_en_demo)": pairs(data / "llama-factory" / "alpaca_en_demo.json"),
    }


def report(
    name: str, spoken: Sequence[tuple[Sequence[int], Sequence[int]]], costs: dict[str, dict[int, float]]
) -> None:
    total = sum(len(answer) for _, answer in spoken)
    print(f"{name}: {len(spoken)} answers, {total} tokens")
    for guesses in GUESSES:
        done = [one for prompt, answer in spoken for one in passes(prompt, answer, guesses)]
        gains = [
            f"{size} {100 * (total / sum(cost(found, rows) for rows, _ in done) - 1):+.1f} %"
            for size, found in costs.items()
        ]
        print(f"  {guesses} guesses: {total / len(done):.3f} tokens a pass; speed {', '.join(gains)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--answers", type=int, default=len(QUESTIONS))
    options = parser.parse_args()
    costs = row_costs(options.threads)
    for name, found in costs.items():
        print(
            f"{name}: " + ", ".join(f"{rows} rows {share:.2f}" for rows, share in found.items()) + " of one row's time"
        )
    engine = Engine.load(STARTER, threads=1, context=2048)
    for name, spoken in texts(options.shared).items():
        tokenizer = engine.tokenizer
        if "Chinese" in name:
            tokenizer = load_tokenizer(options.shared / "tokenizers" / "chatglm3")
        report(name, [(tokenizer.encode(before), tokenizer.encode(answer)) for before, answer in spoken], costs)
    own = []
    for question in QUESTIONS[: options.answers]:
        ids = engine.render([{"role": "user", "content": question}])
        own.append((ids, list(engine.generate(ids, Sampling(temperature=0, max_tokens=200)))))
    report("the starter model's own greedy answers", own, costs)
    engine.close()


if __name__ == "__main__":
    main()
