"""glmchat's face before servers of others: llama-cpp-python's server and `transformers serve`. Not for CI.

    benchmarks/install_peers.sh
    .venv/bin/python benchmarks/real_servers.py

Each server runs here on loopback, llama-cpp-python with the starter model and transformers with a tiny Llama of random
weights. `glmchat run --server` asks once in text and once in JSON lines, goes on with the conversation, and completes a
text; the window asks, stops an answer and continues it. One row of JSON per check; exit code 1 if one fails.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STARTER = ROOT / ".test-cache" / "data" / "models" / "smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
PEERS = ROOT / ".test-cache" / "peers-venv"
SERVE = "import sys; from transformers.cli.transformers import main; sys.argv[0] = 'transformers'; sys.exit(main())"
TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}{% if not loop.last or add_generation_prompt %}</s>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, default=PEERS, help="environment with the servers (install_peers.sh)")
    parser.add_argument("--model", type=Path, default=STARTER, help="GGUF file for llama-cpp-python's server")
    options = parser.parse_args()
    python = options.peers.absolute() / "bin" / "python"
    if not python.exists():
        print(f"no environment at {options.peers}: run benchmarks/install_peers.sh", file=sys.stderr)
        return 1
    failed = 0
    with tempfile.TemporaryDirectory(prefix="glmchat-servers-") as name:
        folder = Path(name)
        os.environ["GLMCHAT_HOME"] = str(folder / "home")
        tiny = write_tiny(folder / "tiny")
        for server, model, command in (
            ("llama-cpp-python", None, ["-m", "llama_cpp.server", "--model", str(options.model), "--n_threads", "1"]),
            ("transformers serve", str(tiny), ["-c", SERVE, "serve", "--host", "127.0.0.1"]),
        ):
            with serving([str(python), "-P", *command], folder / "server.log") as url:
                for check in (once, as_json, goes_on, completes, window):
                    failed += not told(server, check, url, model)
    return 1 if failed else 0


def told(server: str, check: Callable[[str, str | None], str], url: str, model: str | None) -> bool:
    """Run one check and print its row."""
    began, wrong = time.monotonic(), None
    try:
        found = check(url, model)
    except (AssertionError, TimeoutError, subprocess.SubprocessError) as error:
        found, wrong = "", f"{type(error).__name__}: {error}"
    row = {"server": server, "check": check.__name__, "ok": wrong is None, "found": found, "error": wrong}
    print(json.dumps({**row, "seconds": round(time.monotonic() - began, 1)}, ensure_ascii=False), flush=True)
    return wrong is None


# The checks. Each returns what it saw, and raises AssertionError if that is not right.


def once(url: str, model: str | None) -> str:
    done = glmchat(url, model, "-p", "Say hello.", "--max-tokens", "12", "--temp", "0", "--top-k", "5", "--seed", "1")
    assert done.stdout.strip(), "there is no answer"
    return done.stderr.strip()


def as_json(url: str, model: str | None) -> str:
    lines = glmchat(url, model, "-p", "Say hello.", "--max-tokens", "12", "--json").stdout.splitlines()
    events = [json.loads(line) for line in lines]
    assert [events[0]["event"], events[-1]["event"]] == ["start", "end"], events
    assert events[-1]["finish_reason"] in ("stop", "length"), events[-1]
    assert any(e["event"] == "text" for e in events), "there is no text"
    return lines[-1]


def goes_on(url: str, model: str | None) -> str:
    glmchat(url, model, "-c", "-p", "And again.", "--max-tokens", "6")
    heads = json.loads(run([sys.executable, "-P", "-m", "glmchat", "history", "list", "--json"]).stdout)
    last = heads[0]
    assert last["messages"] >= 4, last
    return f"{last['messages']} messages in one conversation"


def completes(url: str, model: str | None) -> str:
    done = glmchat(url, model, "--complete", "-p", "Once upon a time", "--max-tokens", "6")
    assert done.stdout.strip(), "there is no continuation"
    return done.stderr.strip()


def window(url: str, model: str | None) -> str:
    return asyncio.run(_window(url, model))


async def _window(url: str, model: str | None) -> str:
    from glmchat.chat.launch import LaunchOptions
    from glmchat.core.engine_options import EngineOptions
    from glmchat.tui.app import GlmchatApp

    app = GlmchatApp(LaunchOptions(EngineOptions(model=model), server=url, sampling={"max_tokens": 60}))
    async with app.run_test(size=(100, 30)) as pilot:

        async def until(true: Callable[[], object], seconds: float = 90) -> None:
            deadline = time.monotonic() + seconds
            while not true():
                if time.monotonic() > deadline:
                    raise TimeoutError(str([(t.role, t.text[:200]) for t in app.chat.transcript.turns]))
                await pilot.pause(0.05)

        def answer() -> str:
            return next((t.text for t in reversed(app.chat.transcript.turns) if t.role == "assistant"), "")

        await pilot.pause()
        await until(lambda: app.chat.connection.ready and app.chat.talk.session is not None)
        app.chat.prompt.insert("Tell me a long story.")
        await pilot.press("enter")
        await until(lambda: len(answer()) > 3)
        await pilot.press("escape")
        await until(lambda: not app.chat.talk.busy)
        assert app.chat.talk.session is not None
        stopped = app.chat.talk.session.tree.path()[-1]
        app.chat.face.run("continue")
        told = len(app.chat.transcript.turns)
        await until(lambda: not app.chat.talk.busy and app.chat.talk.session.tree.path()[-1] is not stopped)
        last = app.chat.talk.session.tree.path()[-1]
        if any("cannot go on with an unfinished answer" in t.text for t in app.chat.transcript.turns[told - 1 :]):
            assert (last.text, last.state) == (stopped.text, "stopped"), (stopped, last)
            return f"stopped after {len(stopped.text)} characters; the server cannot continue, and that is said"
        assert last.text.startswith(stopped.text) and last.state in ("complete", "cut"), (stopped, last)
        return f"{stopped.state} after {len(stopped.text)} characters, {last.state} after {len(last.text)}"


# The servers.


@contextmanager
def serving(command: list[str], log: Path) -> Iterator[str]:
    """The server on a free port; the URL of its API. Ended by its id."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port)], cwd="/", env=environment, stdout=output, stderr=output
        )
    try:
        deadline = time.monotonic() + 120
        while not answers(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the server did not start:\n" + log.read_text(errors="replace")[-2000:])
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()


def answers(port: int) -> bool:
    try:
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"http://127.0.0.1:{port}/health", timeout=5)
    except urllib.error.HTTPError:  # llama-cpp-python has no such address, and that is an answer
        return True
    except OSError:
        return False
    return True


def write_tiny(folder: Path) -> Path:
    """A Llama of two layers with random weights, and a tokenizer of single bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**names, "chat_template": TEMPLATE}))
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=258, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, bos_token_id=256, eos_token_id=257,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def glmchat(url: str, model: str | None, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run([sys.executable, "-P", "-m", "glmchat", "run", "--server", url, *([model] if model else []), *arguments])


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command, cwd="/", stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr.strip()}"
    return done


if __name__ == "__main__":
    sys.exit(main())
