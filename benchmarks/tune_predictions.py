"""What the plan of `glmchat tune` says of memory and time, beside what the run took: every method, several bases.

    python -P benchmarks/tune_predictions.py [STARTER.gguf] [--only NAME …] [--rows 64] [--threads 1]

Each case is a run of the installed command in a home of its own, to the result in the store. Memory is the most that
the process of the run held; time is from "go" to the end, reading back in a fresh process included, so it depends on
what else the machine does: the load stands beside. A GGUF is packed, so whole weights learn on a folder that is written
from it (starter_folder.py). `wide` is random INT4 weights of ChatGLM3-6B's width, four layers of them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from tiny_checkpoints import originals
from tiny_talker import write_talker

from glmchat.core.run_folder import find_run
from glmchat.core.run_log import LogReader
from glmchat.hub.adapters import by_name, facts_of
from glmchat.hub.lookup import find_installed
from glmchat.hub.references import parse

ROOT = Path(__file__).resolve().parents[1]
LORA = ("--method", "lora")
CASES = {
    "tiny lora": ("tiny", LORA),
    "tiny lora, evaluated": ("tiny", (*LORA, "--eval", "10%", "--sample", "Who are you?")),
    "tiny dora": ("tiny", (*LORA, "--dora")),
    "tiny prefix": ("tiny", ("--method", "prefix", "--prefix-length", "32")),
    "tiny full": ("tiny", ("--method", "full")),
    "tiny dpo": ("tiny", ("--method", "dpo")),
    "scratch": ("scratch", ("--method", "scratch")),
    "starter lora": ("starter", LORA),
    "starter lora, layers twice": ("starter", (*LORA, "--checkpointing", "on")),
    "starter dora": ("starter", (*LORA, "--dora")),
    "starter prefix": ("starter", ("--method", "prefix", "--prefix-length", "32")),
    "starter dpo": ("starter", ("--method", "dpo")),
    "starter full": ("whole", ("--method", "full")),
    "wide lora": ("wide", (*LORA, "--targets", "query_key_value")),
    "wide prefix": ("wide", ("--method", "prefix", "--prefix-length", "32")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("starter", type=Path, nargs="?")
    parser.add_argument("--only", nargs="+", choices=CASES)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    names = given.only or [n for n, (base, _) in CASES.items() if given.starter or base not in ("starter", "whole")]
    print("| | memory told | seen | | time told | seen | | load |\n|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="tune-predictions-") as folder:
        home = Path(folder)
        os.environ["GLMCHAT_HOME"] = str(home / "glmchat")
        for number, name in enumerate(names):
            kind, asked = CASES[name]
            print(line(name, run(number, base_of(kind, home, given.starter), rows_of(home, kind, asked, given.rows),
                                 asked, given)), flush=True)  # fmt: skip


def base_of(kind: str, home: Path, starter: Path | None) -> list[str]:
    """The base as words of the command, made where it is not there yet."""
    folder = home / kind
    if kind == "starter":
        return [str(starter)]
    if kind == "scratch":
        measures = {"n_layer": 3, "n_head": 4, "n_embd": 128, "n_positions": 256}
        (home / "scratch.json").write_text(json.dumps({"model_type": "gpt2", **measures}))
        return ["train:300", "--config", str(home / "scratch.json")]
    if not folder.exists():
        if kind == "tiny":
            write_talker(folder)
        elif kind == "whole":
            script = str(Path(__file__).with_name("starter_folder.py"))
            subprocess.run([sys.executable, "-P", script, str(starter), str(folder)], check=True)
        else:
            wide(folder, home)
    return [str(folder)]


def wide(folder: Path, home: Path) -> None:
    config = dict(originals.CONFIGS["chatglm3-6b"]) | {"num_layers": 4}
    originals.write_checkpoint(home / "wide-dense", config)
    command = [sys.executable, "-P", "-m", "glmchat", "quantize", str(home / "wide-dense"), "--bits", "4"]
    subprocess.run([*command, "--out", str(folder)], check=True, stdout=subprocess.DEVNULL)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(ROOT.parent / "shared" / "tokenizers" / "chatglm3" / name, folder / name)


def rows_of(home: Path, kind: str, asked: tuple[str, ...], count: int) -> Path:
    """Rows of very different lengths, which is what a prediction from the longest has to hold for."""
    if kind == "scratch":
        folder = home / "novels"
        folder.mkdir(exist_ok=True)
        (folder / "one.txt").write_text("张三，在山上，读书。\n李四在河边喝茶，到天黑。\n" * count, encoding="utf-8")
        return folder
    pairs = "dpo" in asked
    path = home / ("pairs.jsonl" if pairs else "rows.jsonl")
    unit = 2 if kind == "tiny" else 6
    with path.open("w", encoding="utf-8") as file:
        for n in range(count):
            answer = f"I am number {n}. " + "I say it again and again. " * (unit * (n * 7 % 13) // 4)
            row = {"question": f"Who are you, {n}?", "answer": answer.strip()}
            if pairs:
                row = {"prompt": row["question"], "chosen": row["answer"], "rejected": f"No. {row['answer']}"}
            file.write(json.dumps(row) + "\n")
    return path


def run(number: int, base: list[str], rows: Path, asked: tuple[str, ...], given: argparse.Namespace) -> dict[str, Any]:
    name = f"case-{number}"
    command = [sys.executable, "-P", "-m", "glmchat", "tune", base[0], str(rows), *base[1:], *asked, "--as", name,
               "--steps", str(given.steps), "--threads", str(given.threads), "--json", "--yes"]  # fmt: skip
    found = {"load": os.getloadavg()[0]}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for text in child.stdout:
            record = json.loads(text)
            if record.get("event") == "start":
                begun = time.perf_counter()
    if child.returncode:
        sys.exit(f"{' '.join(command)} ended with {child.returncode}")
    log = LogReader(find_run(name).log).read()
    plan = next(record["plan"] for record in log if record["kind"] == "page")
    seconds = time.perf_counter() - begun
    found["memory"] = (plan["prediction"]["peak"], trained(log[-1])["facts"]["peak"])
    found["seconds"] = (plan["prediction"]["seconds"], seconds)
    return found


def trained(end: dict[str, Any]) -> dict[str, Any]:
    """What the store knows of the result."""
    if "model" in end:
        row = find_installed(parse(end["model"]))
        assert row is not None
        return json.loads((row.path / "glmchat.json").read_text())["trained"]
    adapter = by_name(end["adapter"])
    assert adapter is not None
    return facts_of(adapter)["trained"]


def line(name: str, found: dict[str, Any]) -> str:
    (told, seen), (said, took) = found["memory"], found["seconds"]
    return (
        f"| {name} | {told / 1e6:,.0f} MB | {seen / 1e6:,.0f} MB | {told / seen - 1:+.0%} | {said:.1f} s | {took:.1f} s"
        f" | {said / took - 1:+.0%} | {found['load']:.1f} |"
    )


if __name__ == "__main__":
    main()
