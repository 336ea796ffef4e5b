"""ADGEN end to end, as the README's commands do it: before, learning, after, predictions, an answer in the chat.

    python -P benchmarks/adgen.py [--only chatglm2 starter] [--learn 64] [--judge 16] [--steps 16]
                                  [--tokens 32] [--threads N] [--model NAME=FOLDER] [--data dev.json] [--keep FOLDER]

Everything is done by the installed command in a home of its own. The models are the recorded tiny ChatGLMs with the
published vocabularies (../shared/reference, ../shared/tokenizers; random weights: what they write is no language) and
the starter model; `--model` adds one of somebody's own. What is not here is skipped, with the reason. The rows are
AdvertiseGen's dev.json: the first `--learn` are learned, the last `--judge` are judged and never learned.

It ends with 1 if a step is wrong: a command fails, the loss of the learned or of the judged rows does not fall, the
base is not the same before and after, a predictions file has not one line of {"labels", "predict"} for each row, or
the chat says nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
REFERENCE, TOKENIZERS = SHARED / "reference" / "chatglm", SHARED / "tokenizers"
STARTER = ROOT / ".test-cache" / "data"
COMMAND = Path(sys.executable).with_name("glmchat")
QUESTION = "类型#上衣*材质#牛仔布*颜色#白色*风格#简约*图案#刺绣*衣样式#外套*衣款式#破洞"
MEASURES = ("loss", "rouge-1", "rouge-2", "rouge-l", "bleu-4")

LORA: Mapping[str, Sequence[str]] = {"lora": ()}
# Random weights of width 16 take larger steps than a model that knows a language.
_STEP, _LONG_STEP = ("--lr", "1e-2"), ("--lr", "1e-1")
BOTH: Mapping[str, Sequence[str]] = {
    "lora": ("--rank", "16", *_STEP),
    "prefix": ("--method", "prefix", *_LONG_STEP),
}
V1 = {**BOTH, "like": ("--like", "ptuning", *_LONG_STEP)}
# Name -> recorded weights, published vocabulary and name, and what is learned: adapter -> flags. ChatGLM3 has the
# tensors of ChatGLM2, and is told from it by its name.
TINY: Mapping[str, tuple[str, str, str, Mapping[str, Sequence[str]]]] = {
    "chatglm-early": ("v1_old", "chatglm-6b-early", "THUDM/chatglm-6b", V1),
    "chatglm": ("v1_new", "chatglm-6b", "THUDM/chatglm-6b", V1),
    "chatglm2": ("v2_fullvocab", "chatglm2", "THUDM/chatglm2-6b", {**BOTH, "like": ("--like", "chatglm2-ptuning")}),
    "chatglm3": ("v2_fullvocab", "chatglm3", "THUDM/chatglm3-6b", {**BOTH, "like": ("--like", "chatglm3", *_STEP)}),
}


class Wrong(Exception):
    """A step did not do what it should."""


@dataclass(frozen=True)
class Place:
    """Where all of it happens."""

    folder: Path
    learn: Path
    judge: Path
    options: argparse.Namespace

    @property
    def threads(self) -> Sequence[str]:
        return ("--threads", self.options.threads) if self.options.threads else ()

    def glmchat(self, *arguments: str) -> str:
        """Show the command, run it, and give what it prints. Raises Wrong where it fails."""
        print("$ " + shlex.join(["glmchat", *arguments]), flush=True)
        environ = {**os.environ, "GLMCHAT_HOME": str(self.folder / "home")}
        done = subprocess.run(
            [str(COMMAND), *arguments], cwd=self.folder, env=environ, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise Wrong(f"exit {done.returncode}: {(done.stdout + done.stderr)[-1500:]}")
        return done.stdout

    def events(self, *arguments: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.glmchat(*arguments, "--json").splitlines()]


def tiny_model(name: str, folder: Path) -> None:
    """The folder as THUDM published it, with recorded weights. Raises FileNotFoundError for what is not here."""
    weights, words, published, _ = TINY[name]
    folder.mkdir()
    config = json.loads((REFERENCE / weights / "config.json").read_text(encoding="utf-8"))
    config["_name_or_path"] = published
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    shutil.copyfile(REFERENCE / weights / "pytorch_model.bin", folder / "pytorch_model.bin")
    if not (TOKENIZERS / words).is_dir():
        raise FileNotFoundError(TOKENIZERS / words)
    for path in (TOKENIZERS / words).iterdir():
        if path.name in ("ice_text.model", "tokenizer.model", "tokenizer_config.json"):
            shutil.copyfile(path, folder / path.name)


def tune(place: Place, base: str, adapter: str, flags: Sequence[str]) -> str:
    """Learn one adapter, and say how its loss went."""
    steps = ("--steps", str(place.options.steps), *place.threads)
    said = place.events("tune", base, place.learn.name, "--as", adapter, *flags, *steps, "--yes")
    losses = [float(one["loss"]) for one in said if one["event"] == "step"]
    part = max(1, len(losses) // 4)
    first, last = sum(losses[:part]) / part, sum(losses[-part:]) / part
    if not last < first:
        raise Wrong(f"{adapter}: the loss did not fall: {first:.4f}, then {last:.4f}")
    return f"{adapter}: {len(losses)} steps, loss {first:.3f} -> {last:.3f}"


def evaluate(place: Place, candidates: Sequence[str], out: str) -> list[dict[str, Any]]:
    """The table's columns; the predictions are in their files."""
    options = ("--max-tokens", str(place.options.tokens), "--out", out, *place.threads)
    table = place.events("eval", *candidates, place.judge.name, *options)[-1]
    rows = place.judge.read_text(encoding="utf-8").splitlines()
    wanted = [json.loads(row)["summary"] for row in rows]
    path = place.folder / out
    files = [path.with_name(f"{path.stem}-{n}.txt") for n in range(1, len(candidates) + 1)]
    for file in files if len(files) > 1 else [path]:
        told = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        if [one["labels"] for one in told] != wanted or any(set(one) != {"labels", "predict"} for one in told):
            raise Wrong(f"{file.name} has not the {len(wanted)} rows in their order")
    return list(table["candidates"])


def show(columns: Sequence[Mapping[str, Any]]) -> None:
    print(f"    {'':34}" + "".join(f"{name:>10}" for name in MEASURES) + "   loss beside the base (95 of 100)")
    for one in columns:
        line = f"    {one['text']:34}" + "".join(f"{one['values'][name]:10.3f}" for name in MEASURES)
        if change := one["differences"].get("loss"):
            line += f"   {change['mean']:+.3f} ({change['low']:+.3f} to {change['high']:+.3f})"
        print(line, flush=True)


def through(place: Place, base: str, learned: Mapping[str, Sequence[str]]) -> None:
    """Before, learning, after, chat. Raises Wrong."""
    before = evaluate(place, [base], f"{base}-before.txt")[0]
    names = {f"adgen-{base}-{kind}": flags for kind, flags in learned.items()}
    for name, flags in names.items():
        print("    " + tune(place, base, name, flags), flush=True)
    columns = evaluate(place, [base, *(f"{base}+{name}" for name in names)], f"{base}-after.txt")
    show(columns)
    if columns[0]["values"] != before["values"]:
        raise Wrong("the base has other scores after than before")
    for one in columns[1:]:
        if not one["differences"]["loss"]["mean"] < 0:
            raise Wrong(f"{one['text']}: the loss of the judged rows did not fall")
    for name in names:
        flags = ("--adapter", name, "--temp", "0", "--max-tokens", str(place.options.tokens), "--keep-alive", "0")
        answer = place.glmchat("run", base, QUESTION, *flags)
        if not answer.strip():
            raise Wrong(f"{name} has no answer in the chat")
        print("    " + " ".join(answer.split())[:160], flush=True)


def models(place: Place) -> Iterator[tuple[str, Mapping[str, Sequence[str]]]]:
    """Each model under its name in the store, and what is learned of it."""
    asked = place.options
    for name, (*_, learned) in TINY.items():
        if asked.only and name not in asked.only:
            continue
        try:
            tiny_model(name, place.folder / name)
        except FileNotFoundError as missing:
            print(f"skipped: {name}: {missing.filename or missing} is not here")
            continue
        place.glmchat("add", name)
        yield name, learned
    if not asked.only or "starter" in asked.only:
        if STARTER.is_dir():
            yield "smollm2", LORA
        else:
            print(f"skipped: the starter model: {STARTER} is not here (`make test` fetches it)")
    for given in asked.model:
        name, _, folder = given.partition("=")
        place.glmchat("add", str(Path(folder).resolve()), "--name", name)
        yield name, LORA


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", nargs="*", default=[], choices=[*TINY, "starter"])
    options.add_argument("--model", action="append", default=[], metavar="NAME=FOLDER")
    options.add_argument("--data", type=Path, default=SHARED / "data" / "advertisegen" / "dev.json")
    options.add_argument("--learn", type=int, default=64, help="rows that are learned")
    options.add_argument("--judge", type=int, default=16, help="rows that are judged")
    options.add_argument("--steps", type=int, default=16)
    options.add_argument("--tokens", type=int, default=32, help="of an answer at most")
    options.add_argument(
        "--threads", help="of learning and judging; 1 is best for the tiny ones where others compute too"
    )
    options.add_argument("--keep", type=Path, help="an empty folder for home, data and predictions, which then stays")
    asked = options.parse_args()
    if not asked.data.is_file():
        sys.exit(f"{asked.data} is not here: nothing to learn from")
    rows = asked.data.read_text(encoding="utf-8").splitlines()
    if len(rows) < asked.learn + asked.judge:
        sys.exit(f"{asked.data} has only {len(rows)} rows")
    with tempfile.TemporaryDirectory(prefix="adgen-") as scratch:
        folder = (asked.keep or Path(scratch)).resolve()
        place = Place(folder, folder / "train.json", folder / "dev.json", asked)
        folder.mkdir(parents=True, exist_ok=True)
        for path, part in ((place.learn, rows[: asked.learn]), (place.judge, rows[-asked.judge :])):
            path.write_text("".join(f"{row}\n" for row in part), encoding="utf-8")
        if STARTER.is_dir():
            shutil.copytree(STARTER, folder / "home" / "data")
        begun, wrong = time.perf_counter(), 0
        for base, learned in models(place):
            print(f"\n{base}", flush=True)
            try:
                through(place, base, learned)
            except Wrong as problem:
                wrong += 1
                print(f"    WRONG: {problem}", flush=True)
        print(f"\n{wrong} wrong, {time.perf_counter() - begun:.0f} s")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
