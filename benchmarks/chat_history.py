"""Search in many messages, and a long conversation opened in the window.

    python benchmarks/chat_history.py [--messages 100000] [--long 2000]

A history is written into a scratch folder: conversations of 20 messages, English and Chinese, and one long one. Every
query is asked five times; the median counts, for the first 50 hits with their snippets. The window is the real one, in
this process and without a terminal; opening is from the command until the end of the conversation is on its screen.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / part) for part in ("", "tui")]

from windows import open_window  # noqa: E402

from glmchat.chat.history.history import History  # noqa: E402

WORDS = (
    "a list holds values in order while the river carries sand past",
    "量化 模型 天空 为什么 是蓝色的 上下文 长江 流过 城市",
)
QUERIES = ("needle", "river", "river sand", "针", "天空", "量化模型", "是蓝色的上下文", "absentword")


def write(history: History, messages: int, long: int) -> int:
    """Fill the history; the number of the long conversation. One message in a thousand has a needle."""
    dice, words = random.Random(0), " ".join(WORDS).split()
    with history.batch():
        for first in range(0, messages - long, 20):
            tree = history.new("fake")
            for number in range(first, first + 20):
                text = " ".join(dice.choices(words, k=60)) + (" needle 针" if number % 1000 == 0 else "")
                history.append(tree, "assistant" if number % 2 else "user", text)
        tree = history.new("fake")
        for number in range(long):
            said = f"last words {number}" if number == long - 1 else "**bold** and `code`\n\n- one\n- two\n"
            history.append(tree, "assistant" if number % 2 else "user", said)
    return tree.conversation.id


async def opened(conversation: int, last: str) -> float:
    """Seconds from the command to the end of the conversation on the screen."""
    async with open_window() as window:
        started = time.perf_counter()
        window.chat.face.turn_to(conversation)
        while last not in window.screen_text():
            await asyncio.sleep(0.002)
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=100_000)
    parser.add_argument("--long", type=int, default=2_000)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="glmchat-history-") as home:
        os.environ.update(GLMCHAT_HOME=home, GLMCHAT_LANG="en")
        with History.default() as history:
            conversation = write(history, chosen.messages, chosen.long)
            for query in QUERIES:
                times = []
                for _ in range(5):
                    started = time.perf_counter()
                    hits = history.search(query)
                    times.append(time.perf_counter() - started)
                milliseconds = round(1000 * statistics.median(times), 1)
                print(json.dumps({"query": query, "hits_shown": len(hits), "ms": milliseconds}, ensure_ascii=False))
        seconds = asyncio.run(opened(conversation, f"last words {chosen.long - 1}"))
        print(json.dumps({"messages": chosen.long, "opened_in_window_seconds": round(seconds, 3)}))


if __name__ == "__main__":
    main()
