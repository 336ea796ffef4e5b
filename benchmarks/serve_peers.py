"""`glmchat serve` beside other people's servers on the same weights: tokens a second, and the wait for the first one.

    sh benchmarks/install_peers.sh --with-llama-server
    .venv/bin/python -P benchmarks/serve_peers.py SmolLM2-135M-Instruct.Q4_1.gguf --llama .test-cache/llama-server
    sh benchmarks/install_peers.sh --with-vllm
    .venv/bin/python -P benchmarks/serve_peers.py INT4-FOLDER --vllm .test-cache/vllm-venv/bin/python

glmchat comes twice, the second time with `--products int8`. Each server has as many places and threads, and gets the
same prompts as ids over HTTP: no two begin alike, greedy, the end of text ignored. `--counts` so many arrive at once,
`--rounds` times, program after program; then `--poisson` come at random, `--rate` a second, at the same moments for
everybody. All servers are started first; those whose turn it is not are stopped by a signal, so they take nothing of
the processor. Tokens a second are counted from the sending to the end of the last answer, prompts included, the best
round; waits are of all rounds.
"""

from __future__ import annotations

import argparse
import http.client
import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

OURS: dict[str, list[str]] = {"glmchat": [], "glmchat int8": ["--products", "int8"]}  # llama.cpp's activations have 8
ENOUGH_WORDS = 30_000  # ids below are words in every vocabulary that is measured here


@dataclass
class Server:
    """A program that listens: its port, its process and those that it starts, and what was seen of it."""

    name: str
    port: int
    process: subprocess.Popen[bytes]
    speed: dict[int, float] = field(default_factory=dict)
    first: dict[str, list[float]] = field(default_factory=dict)

    def signal(self, number: int) -> None:
        os.killpg(self.process.pid, number)


@dataclass
class Seen:
    """Of one answer, in seconds from when it was sent: its first token and its end; how many tokens it had."""

    first: float
    end: float
    tokens: int


def prompt(number: int, length: int) -> list[int]:
    return [100 + (number * 7919 + i * 104_729) % (ENOUGH_WORDS - 200) for i in range(length)]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def start(name: str, given: argparse.Namespace) -> Server:
    port, places, threads = free_port(), str(given.places), str(given.threads)
    context = given.prompt + given.tokens + 212  # of one answer
    environ = dict(os.environ)
    if name in OURS:
        command = [
            sys.executable,
            "-P",
            "-m",
            "glmchat",
            "serve",
            str(given.model),
            "--port",
            str(port),
            "--no-api-key",
        ]
        command += ["--parallel", places, "--queue", "1000", "--context", str(context), "--threads", threads]
        command += OURS[name]
    elif name == "llama-server":
        command = [str(given.llama), "-m", str(given.model), "--port", str(port), "-np", places, "-t", threads]
        command += ["-tb", threads, "-c", str(context * given.places), "--no-webui", "--no-cache-prompt"]
    else:
        command = [str(given.vllm), "-P", "-m", "vllm.entrypoints.openai.api_server", "--model", str(given.model)]
        command += ["--host", "127.0.0.1", "--port", str(port), "--max-num-seqs", places]
        command += ["--max-model-len", str(context), "--dtype", "bfloat16", "--served-model-name", "one"]
        environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        environ |= {"VLLM_CPU_OMP_THREADS_BIND": f"0-{given.threads - 1}", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
    with given.log.open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environ, cwd="/", start_new_session=True)
    server = Server(name, port, process)
    while True:
        if process.poll() is not None:
            raise SystemExit(f"{name} ended with {process.returncode}; its words are in {given.log}")
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return server
        except OSError:
            pass
        time.sleep(0.3)


def ask(server: Server, number: int, given: argparse.Namespace, seen: list[Seen]) -> None:
    body = {
        "prompt": prompt(number, given.prompt), "max_tokens": given.tokens, "temperature": 0, "ignore_eos": True,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    if server.name == "vLLM":
        body["model"] = "one"
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=600)
    sent, first, tokens = time.perf_counter(), 0.0, 0
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise SystemExit(f"{server.name}: {response.status} {response.read()[:300]!r}")
    for line in response:
        if line.startswith(b"data: {"):
            event = json.loads(line[6:])
            if not first and event["choices"]:
                first = time.perf_counter() - sent
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    seen.append(Seen(first, time.perf_counter() - sent, tokens))
    connection.close()


def together(server: Server, numbers: Sequence[int], waits: Sequence[float], given: argparse.Namespace) -> list[Seen]:
    """What became of the prompts with these numbers, each sent so many seconds after the one before it."""
    seen: list[Seen] = []
    clients = [threading.Thread(target=ask, args=(server, number, given, seen)) for number in numbers]
    for client, wait in zip(clients, waits, strict=True):
        time.sleep(wait)
        client.start()
    for client in clients:
        client.join()
    if len(seen) != len(numbers) or any(one.tokens != given.tokens for one in seen):
        raise SystemExit(f"{server.name}: {[one.tokens for one in seen]} tokens of {len(numbers)} answers")
    return seen


def measure(server: Server, given: argparse.Namespace, number: int) -> int:
    """One round of one server; the number of the next prompt."""
    for count in given.counts:
        started = time.perf_counter()
        seen = together(server, range(number, number + count), [0.0] * count, given)
        speed = count * given.tokens / (time.perf_counter() - started)
        server.speed[count] = max(server.speed.get(count, 0.0), speed)
        server.first.setdefault(f"{count} at once", []).extend(one.first for one in seen)
        number += count
    return number


def share(values: Sequence[float], part: float) -> float:
    """The smallest of the values that so large a part of them does not exceed."""
    return sorted(values)[max(0, math.ceil(part * len(values)) - 1)]


def tell(servers: Sequence[Server], given: argparse.Namespace) -> None:
    ours = [server for server in servers if server.name in OURS]
    for server in servers:
        for count, speed in server.speed.items():
            ratios = "".join(
                f", {our.name} {our.speed[count] / speed:.2f} times that" for our in ours if our is not server
            )
            print(f"{server.name:12} {count:3} at once: {speed:7.1f} tokens a second{ratios}")
        for load, waits in server.first.items():
            print(f"{server.name:12} {load}: first token p50 {share(waits, 0.5):.2f} s, p95 {share(waits, 0.95):.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=lambda path: Path(path).absolute(), help="a GGUF file, or a folder for vLLM")
    parser.add_argument("--llama", type=lambda path: Path(path).absolute(), help="llama.cpp's llama-server")
    parser.add_argument("--vllm", type=lambda path: Path(path).absolute(), help="the interpreter of vLLM's environment")
    parser.add_argument("--places", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--counts", type=lambda text: [int(one) for one in text.split(",")], default=[1, 8, 16])
    parser.add_argument("--prompt", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--poisson", type=int, default=24)
    parser.add_argument("--rate", type=float, default=0.6)
    parser.add_argument("--log", type=lambda path: Path(path).absolute(), default=Path("serve_peers.log").absolute())
    given = parser.parse_args()
    peers = ["llama-server"] * bool(given.llama) + ["vLLM"] * bool(given.vllm)
    servers: list[Server] = []
    try:
        for name in (*OURS, *peers):
            servers.append(start(name, given))
            together(servers[-1], [-1], [0.0], given)  # what is done once is done
            servers[-1].signal(signal.SIGSTOP)
        number = 0
        for _ in range(given.rounds):
            for server in servers:
                server.signal(signal.SIGCONT)
                after = measure(server, given, number)
                server.signal(signal.SIGSTOP)
            number = after
        chance = random.Random(1)
        waits = [chance.expovariate(given.rate) for _ in range(given.poisson)]
        for server in servers if waits else ():
            server.signal(signal.SIGCONT)
            seen = together(server, range(number, number + len(waits)), waits, given)
            server.first[f"{len(waits)} at random, {given.rate:g} a second"] = [one.first for one in seen]
            server.signal(signal.SIGSTOP)
        print(f"{given.model.name}, prompts of {given.prompt}, answers of {given.tokens}, {given.threads} threads")
        tell(servers, given)
    finally:
        for server in servers:
            server.signal(signal.SIGKILL)


if __name__ == "__main__":
    main()
