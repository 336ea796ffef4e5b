"""Many clients of one server for some minutes: they join, read to the end, leave, stop, and are cut off.

`.venv/bin/python -P benchmarks/clients.py MODEL [--minutes 10] [--clients 64] [--threads 2] [--sample 200]`: starts
`glmchat serve` and asks it from so many threads. Tells what became of the requests, the engine's memory after a third
of the time and at its end, and whether a sample of the answers is said again by an engine in this process, one after
the other, id by id. Ends with a verdict, and with 1 if something is missed; none of it depends on how busy the machine
is. Memory is the median of 15 seconds, as a single reading is no size: what an answer needs comes and goes.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glmchat.chat.engine_process import engine_environment
from glmchat.core.messages import Sampling
from glmchat.engine import Engine
from glmchat.jobs.replay import replay

WORDS = ("river", "machine", "山", "question", "letter", "seven", "水", "garden", "number", "light", "书", "winter")
FATES = ("whole", "whole", "whole", "leaves", "cut off", "half a request", "stop string")

EXPECTED = ("read to the end", "leaves", "cut off", "half a request", "status 429")
MOST_GROWTH = 0.02
HALF = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999\r\n\r\n"


@dataclass
class Seen:
    """What all clients saw. answers: a sample of those that were read to the end, each as likely as any other."""

    sample: int
    lock: threading.Lock = field(default_factory=threading.Lock)
    counts: Counter[str] = field(default_factory=Counter)
    answers: list[dict[str, Any]] = field(default_factory=list)
    whole: int = 0

    def keep(self, answer: dict[str, Any], chance: random.Random) -> None:
        with self.lock:
            self.whole += 1
            if len(self.answers) < self.sample:
                self.answers.append(answer)
            elif (place := chance.randrange(self.whole)) < self.sample:
                self.answers[place] = answer

    def count(self, what: str) -> None:
        with self.lock:
            self.counts[what] += 1


def body_of(chance: random.Random, fate: str) -> dict[str, Any]:
    shared = "You are a patient teacher who answers in whole sentences. " * chance.choice((0, 0, 4))
    question = " ".join(chance.choices(WORDS, k=chance.randint(3, 60)))
    opening = [{"role": "system", "content": shared}] if shared else []
    return {
        "messages": [*opening, {"role": "user", "content": question}],
        "temperature": chance.choice((0, 0.8, 1.0)),
        "seed": chance.randrange(2**31),
        "max_tokens": chance.randint(2, 60),
        "stream": True,
        "return_token_ids": True,
        **({"stop": ["e"]} if fate == "stop string" else {}),
    }


def ask(port: int, fate: str, seen: Seen, chance: random.Random) -> None:
    body = json.dumps(body_of(chance, fate)).encode()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    if fate == "half a request":
        with socket.create_connection(("127.0.0.1", port)) as raw:
            raw.sendall(HALF + body[:50])
        seen.count(fate)
        return
    try:
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            seen.count(f"status {response.status}")
            response.read()
            time.sleep(min(5.0, float(response.headers.get("Retry-After", 1))))
            return
        answer: dict[str, Any] = {"said": [], "text": ""}
        reads = chance.randint(1, 8)
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            answer["ids"] = event.get("prompt_token_ids") or answer.get("ids")
            for choice in event["choices"]:
                answer["said"] += choice["token_ids"]
                answer["text"] += choice["delta"].get("content", "")
                answer["reason"] = choice["finish_reason"]
            answer.update({name: event["glmchat"] for name in ("glmchat",) if name in event})
            reads -= 1
            if reads < 0 and fate in ("leaves", "cut off"):
                if fate == "cut off" and connection.sock is not None:
                    connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                seen.count(fate)
                return
        seen.count(f"read to the end ({answer['reason']})")
        seen.keep(answer, chance)
    except (OSError, http.client.HTTPException, ValueError) as error:
        seen.count(f"{type(error).__name__}: {error}"[:100])
    finally:
        connection.close()


def client(number: int, port: int, seen: Seen, until: float) -> None:
    chance = random.Random(number)
    while time.monotonic() < until:
        ask(port, chance.choice(FATES), seen, chance)
        time.sleep(chance.random() * 0.5)


def resident(pid: int) -> float:
    """MB of memory of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def replayed(model: Path, quant: int | None, threads: int, answers: Sequence[dict[str, Any]]) -> int:
    """How many of the answers an engine says again alone, id by id."""
    engine, same = Engine.load(model, quant=quant, threads=threads, context=2048), 0
    for answer in answers:
        told = answer["glmchat"]
        asked = Sampling(**{**told["sampling"], "stop": tuple(told["sampling"].get("stop") or ())})
        parting = replay(engine, answer["ids"], told["passes"], answer["said"], asked, told["seed"])
        same += parting is None
        if parting is not None:
            print(f"differs: {parting}, {told['kernel']}, {told['threads']} threads")
    return same


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--quant", type=int)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sample", type=int, default=200)
    given = parser.parse_args()
    environment = engine_environment(os.environ)
    if dict(os.environ) != environment:  # this process computes too: threads that wait for each other must not spin
        os.execve(sys.executable, sys.orig_argv, environment)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    quant = ["--quant", str(given.quant)] if given.quant else []
    command = [sys.executable, "-P", "-m", "glmchat", "serve", str(given.model), "--port", str(port), "--no-api-key"]
    command += ["--parallel", "16", "--queue", "48", "--context", "2048", "--threads", str(given.threads), *quant]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=dict(os.environ))
    try:
        wait_for(port)
        seen, started = Seen(given.sample), time.monotonic()
        until = started + given.minutes * 60
        threads = [threading.Thread(target=client, args=(n, port, seen, until)) for n in range(given.clients)]
        for thread in threads:
            thread.start()
        memory: list[float] = []
        while time.monotonic() < until:
            time.sleep(min(1.0, max(0.0, until - time.monotonic())))
            memory.append(resident(server.pid))
        for thread in threads:
            thread.join()
    finally:
        server.terminate()
        server.wait()
    third, last = statistics.median(memory[len(memory) // 3 :][:15]), statistics.median(memory[-15:])
    print(f"{given.model.name}, {given.clients} clients, {given.minutes:g} minutes, {given.threads} threads")
    for what, count in sorted(seen.counts.items()):
        print(f"  {what}: {count}")
    print(f"memory: {third:.0f} MB after a third, {last:.0f} MB at the end ({100 * (last / third - 1):+.1f} %), "
          f"most {max(memory):.0f} MB", flush=True)  # fmt: skip
    same = replayed(given.model, given.quant, given.threads, seen.answers)
    print(f"said again alone: {same} of {len(seen.answers)} the same")
    failed = sum(count for what, count in seen.counts.items() if not what.startswith(EXPECTED))
    missed = {
        f"memory grew by more than {MOST_GROWTH:.0%}": last > third * (1 + MOST_GROWTH),
        "answers differ": same < len(seen.answers),
        f"only {len(seen.answers)} answers were read to the end": len(seen.answers) < given.sample,
        f"{failed} requests failed": failed > 0,
    }
    print("verdict:", ", ".join(what for what, is_so in missed.items() if is_so) or "all met")
    sys.exit(any(missed.values()))


def wait_for(port: int) -> None:
    while True:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        time.sleep(0.2)


if __name__ == "__main__":
    main()
