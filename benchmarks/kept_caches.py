"""What a conversation that is opened again waits for its next answer, with its cache on the disk and without.

`.venv/bin/python -P benchmarks/kept_caches.py MODEL [--quant 4] [--threads 2] [--lengths 64,512,2048,4000]`: a
conversation of so many tokens is read once and written; then `--rounds` times in turn the first token of its next
question, 12 tokens longer, is waited for: read again, from the disk with the file in the system's memory ("warm"), and
with it dropped from there ("cold"). The best of each. The ids of the three answers are compared.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

from glmchat.core import kv_files
from glmchat.engine import Engine, Sampling
from glmchat.engine.decoding.sequences import Sequences

NAME = "0" * 32
ANSWER = Sampling(temperature=0, max_tokens=8, ignore_eos=True)


def prompt(length: int, vocabulary: int) -> list[int]:
    return [100 + (i * 104729) % (min(vocabulary, 30_000) - 200) for i in range(length)]


def forget(engine: Engine, *, keeps: bool) -> None:
    """Nothing is in memory any more, as after a start."""
    engine.sequences = Sequences(engine.model, engine.context, engine.device)
    if keeps:
        engine.keep_caches(10**12, idle_seconds=0.0)


def ask(engine: Engine, ids: list[int]) -> tuple[float, list[int]]:
    """Seconds to the first token, and the ids of the answer."""
    started, first = time.perf_counter(), 0.0
    said: list[int] = []
    for chunk in engine.stream_tokens(ids, ANSWER, conversation=NAME):
        said += chunk.token_ids if chunk is not None else ()
        first = first or (time.perf_counter() - started if said else 0.0)
    return first, said


def drop(path: Path) -> None:
    """Out of the system's memory: the next reading is from the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def measure(engine: Engine, length: int, rounds: int) -> None:
    ids = prompt(length + 12, engine.spec.vocab_size)
    forget(engine, keeps=True)
    before = ids[:length]
    ask(engine, before)
    started = time.perf_counter()
    engine.leave(60.0)  # which writes
    written = time.perf_counter() - started
    files = kv_files.kv_files()
    if not files:
        print(f"{length:6} tokens: not kept")
        return
    data = files[0].path.read_bytes()
    best: dict[str, float] = {}
    answers = set()
    for _ in range(rounds):
        for way in ("read again", "warm", "cold"):
            forget(engine, keeps=way != "read again")
            if way != "read again":
                files[0].path.write_bytes(data)  # the answer before wrote a longer one
            if way == "cold":
                drop(files[0].path)
            seconds, said = ask(engine, ids)
            best[way] = min(best.get(way, seconds), seconds)
            answers.add(tuple(said))
            engine.leave(60.0)
    again = best["read again"]
    ways = [f"{best[way]:.3f} s {way} ({again / best[way]:.1f} times sooner)" for way in ("warm", "cold")]
    same = "one answer" if len(answers) == 1 else "answers that differ"
    print(f"{length:6} tokens, {len(data) / 1e6:.1f} MB, written in {written:.2f} s")
    print(f"       first token after {again:.3f} s read again, {', '.join(ways)}; {same}", flush=True)
    for path in kv_files.everything():
        path.unlink()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--quant", type=int)
    parser.add_argument("--dtype")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lengths", default="64,128,256,512,1024,2048,4000")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    lengths = [int(length) for length in given.lengths.split(",")]
    engine = Engine.load(
        given.model, quant=given.quant, dtype=given.dtype, threads=given.threads, context=max(lengths) + 32
    )
    print(f"{given.model.name}: {engine.facts()['kernel']}, {engine.facts()['dtype']}, {given.threads} threads")
    with tempfile.TemporaryDirectory(dir=".") as home:
        os.environ["GLMCHAT_HOME"] = home
        for length in lengths:
            measure(engine, length, given.rounds)


if __name__ == "__main__":
    main()
