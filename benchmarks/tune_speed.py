"""Tokens a second while a LoRA is learned, beside PEFT with transformers' Trainer, on the starter model.

    python benchmarks/tune_speed.py MODEL.gguf ALPACA.json [--rows 64] [--only ours peer grouped parts]
    python benchmarks/tune_speed.py FOLDER --shape chatglm3-6b [--targets all-linear] [--tokens 512] [--steps 2]

The same rows in the same order, batches of 8, LoRA r 8 on every linear layer, no dropout. We learn on the packed file;
the peer on what it says in bfloat16, with batches as they come and grouped by length. Each is a process of its own, and
the first step of each is left out. A token is one of the text: padding is not counted. Beside the clock stands
processor time, which is what counts where others use the machine, too; with --threads 1 it holds no waiting.

With --shape the model is random INT4 weights in the shape of a published one, written into FOLDER by adapters.py where
it is not there yet, and its rows are random words, an eighth of them a question: neither speed nor memory depends on
them. Every step is of one row; a short row comes first and is not counted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BATCH, RANK = 8, 8
CASES = ("ours", "peer", "grouped", "parts")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--shape", help="of adapters.py --make")
    parser.add_argument("--targets", default="query_key_value", help="with --shape: as the guides have it")
    parser.add_argument("--tokens", type=int, default=512, help="with --shape: of a row")
    parser.add_argument("--steps", type=int, default=2, help="with --shape: those that are measured")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--only", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.shape:
        if not given.model.exists():
            make = [
                sys.executable,
                str(Path(__file__).with_name("adapters.py")),
                str(given.model),
                "--make",
                given.shape,
            ]
            subprocess.run(make, check=True)  # a process of its own: the memory that is told is that of learning
        print(json.dumps(_large(given)))
        return
    if given.data is None:
        parser.error("DATA is missing")
    if given.case:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(globals()[f"_{given.case}"](given, Path(folder))))
        return
    speeds: dict[str, float] = {}
    for case in given.only:
        words = [sys.executable, __file__, str(given.model), str(given.data), "--rows", str(given.rows), "--case", case]
        words += ["--dtype", given.dtype, "--threads", str(given.threads)]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        found = json.loads(done.stdout.splitlines()[-1])
        speeds[case] = found["tokens_per_processor_second"]
        print(f"{case:8}", json.dumps(found), flush=True)
    for peer in ("peer", "grouped"):
        if "ours" in speeds and peer in speeds:
            print(f"ours is {speeds['ours'] / speeds[peer]:.2f} times {peer} (by processor time)")


def _examples(given: argparse.Namespace) -> list[Any]:
    """Rows as the engine's own template writes them; the answer and its end are learned."""
    from glmchat.tuning.dataset import read_dataset
    from glmchat.tuning.options import DataOptions
    from glmchat.tuning.prompt_side import load_prompt_side

    side = load_prompt_side(given.model)
    data = read_dataset([str(given.data)], DataOptions(max_length=1024, over_length="cut-answer"), side)
    found = [data.examples[number] for number in range(given.rows)]
    side.close()
    return found


def _settings(given: argparse.Namespace, **changes: Any) -> Any:
    from glmchat.tuning.settings import Settings

    changes |= {"threads": given.threads, "epochs": 1, "learning_rate": 1e-4}
    return Settings(rank=RANK, rows_per_step=BATCH, dtype=given.dtype, **changes)


def _ours(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from glmchat.tuning.trainer import train

    events: list[dict[str, Any]] = []
    ends: list[float] = []

    def hear(event: dict[str, Any]) -> None:
        events.append(event)
        if event["kind"] == "step":
            ends.append(time.process_time())

    result = train(given.model, _examples(given), _settings(given), folder, hear, lambda: False)
    predicted = events[0]["prediction"]
    every = sum(event["tokens"] / event["tokens_per_second"] for event in events if event["kind"] == "step")
    steps = [event for event in events if event["kind"] == "step"][1:]
    seconds = sum(event["tokens"] / event["tokens_per_second"] for event in steps)
    tokens = sum(event["tokens"] for event in steps)
    return {"tokens_per_second": tokens / seconds, "tokens_per_processor_second": tokens / (ends[-1] - ends[0]),
            "tokens": tokens, "seconds": seconds, "loss": steps[-1]["loss"],
            "checkpointing": events[0]["checkpointing"],
            "memory": {"predicted": predicted["peak"], "seen": result.facts["peak"]},
            "all_seconds": {"predicted": predicted["seconds"], "seen": every}}  # fmt: skip


def _large(given: argparse.Namespace) -> dict[str, Any]:
    """What of a run takes time on a large base, without what it writes: passes with their updates, one row a step."""
    import torch

    from glmchat.tuning import predict
    from glmchat.tuning.forward import Flat, load_base
    from glmchat.tuning.methods import method_of
    from glmchat.tuning.optimiser import optimiser_of
    from glmchat.tuning.setup import Learner

    settings = _settings(given, targets=given.targets if given.targets == "all-linear" else (given.targets,))
    begun = time.perf_counter()
    checkpoint, model, threads = load_base(given.model, settings, "cpu")
    method = method_of(checkpoint, model, settings)
    model.train()
    extra, noise = checkpoint.spec.extra, torch.Generator().manual_seed(0)
    start = [extra["gmask_id"], checkpoint.spec.bos_id] if "gmask_id" in extra else [5, 60]
    growth = predict.measure(method, start)
    found = predict.choose(growth, [given.tokens], "auto", 0, "cpu")
    loaded = time.perf_counter() - begun
    learner, optimiser = Learner(method), optimiser_of(list(method.parameters.values()), settings)
    learner.by_layer = found.by_layer

    def row(tokens: int) -> Flat:
        ids = torch.cat([torch.tensor(start), torch.randint(5, 60_000, (tokens - len(start),), generator=noise)])
        learned = torch.arange(tokens // 8, tokens)
        return Flat(ids, (tokens,), learned - 1, ids[learned])

    def step(flat: Flat) -> float:
        loss = learner(flat)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return float(loss.detach()) / len(flat.targets)

    step(row(16))
    clock, processor = time.perf_counter(), time.process_time()
    losses = [step(row(given.tokens)) for _ in range(given.steps)]
    seconds, spent = time.perf_counter() - clock, time.process_time() - processor
    tokens = given.steps * given.tokens
    return {"shape": given.shape, "targets": given.targets, "tokens": tokens, "threads": threads,
            "dtype": str(method.dtype).removeprefix("torch."), "learning": method.count()[0],
            "tokens_per_second": tokens / seconds, "tokens_per_processor_second": tokens / spent, "seconds": seconds,
            "loading_seconds": loaded, "losses": losses, "checkpointing": found.by_layer,
            "memory": {"predicted": found.peak, "seen": predict.peak_bytes("cpu")}}  # fmt: skip


def _peer(given: argparse.Namespace, folder: Path, *, grouped: bool = False) -> dict[str, Any]:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from glmchat.tuning.order import order_of

    torch.set_num_threads(given.threads)

    examples = _examples(given)
    dtype = getattr(torch, given.dtype)
    base = _dequantised(given.model, dtype)
    model = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    rows = [examples[number] for number in order_of(len(examples), 0, 1)]
    real: list[int] = []
    ends: list[tuple[float, float]] = []

    def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
        longest = max(len(row["input_ids"]) for row in batch)
        real.append(sum(len(row["input_ids"]) for row in batch))
        fill = [longest - len(row["input_ids"]) for row in batch]
        pairs = list(zip(batch, fill, strict=True))
        return {
            "input_ids": torch.tensor([row["input_ids"] + [0] * n for row, n in pairs]),
            "attention_mask": torch.tensor([[1] * len(row["input_ids"]) + [0] * n for row, n in pairs]),
            "labels": torch.tensor([row["labels"] + [-100] * n for row, n in pairs]),
        }

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *given: Any, **more: Any) -> None:
            ends.append((time.perf_counter(), time.process_time()))

    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH,
        num_train_epochs=1,
        learning_rate=1e-4,
        train_sampling_strategy="group_by_length" if grouped else "sequential",
        remove_unused_columns=False,
        bf16=given.dtype == "bfloat16",
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    data = [{"input_ids": list(row.ids), "labels": row.labels} for row in rows]
    Trainer(model=model, args=arguments, train_dataset=data, data_collator=collate, callbacks=[Clock()]).train()
    tokens = sum(real[1 : len(ends)])
    seconds, processor = (last - first for first, last in zip(ends[0], ends[-1], strict=True))
    return {"tokens_per_second": tokens / seconds, "tokens_per_processor_second": tokens / processor,
            "tokens": tokens, "seconds": seconds}  # fmt: skip


def _dequantised(model: Path, dtype: Any) -> Any:
    """transformers' network with the numbers of the file laid out: it reads GGUF packed, and then refuses to learn."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from glmchat.engine.families import identify
    from glmchat.engine.formats.weights import Int4, Int8
    from glmchat.engine.loading import match_names, open_weights

    config = AutoConfig.from_pretrained(str(model.parent), gguf_file=model.name)
    network = AutoModelForCausalLM.from_config(config, dtype=dtype)
    checkpoint = identify(model)
    source = open_weights(checkpoint)
    numbers = {}
    for parameter, name in match_names(source, checkpoint).items():
        stored = source.read(name)
        numbers[parameter] = (stored.dequantise() if isinstance(stored, Int4 | Int8) else stored).to(dtype)
    missing = set(network.load_state_dict(numbers, strict=False).missing_keys)
    assert missing <= {"lm_head.weight"}, missing
    network.tie_weights()
    return network


def _grouped(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    return _peer(given, folder, grouped=True)


def _parts(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Shares of one pass: the layers forward, the head with its gradient, the layers backward."""
    import torch

    from glmchat.tuning.forward import flatten, head_of, hidden, load_base
    from glmchat.tuning.lora import LoraShape, attach, prepare
    from glmchat.tuning.products import head_loss

    _, model, threads = load_base(given.model, _settings(given), "cpu")
    prepare(model)
    attach(model, LoraShape(rank=RANK), seed=0)
    flat = flatten(_examples(given)[:BATCH])
    spent = {"forward": 0.0, "head": 0.0, "backward": 0.0}
    for round_ in range(3):
        begun = time.process_time()
        states = hidden(model, flat)
        forward = time.process_time()
        loss = head_loss(states, flat.targets, head_of(model))
        head = time.process_time()
        torch.autograd.backward(loss)
        end = time.process_time()
        if round_:
            for name, seconds in zip(spent, (forward - begun, head - forward, end - head), strict=True):
                spent[name] += seconds
    total = sum(spent.values())
    shares = {name: round(seconds / total, 3) for name, seconds in spent.items()}
    return {"shares": shares, "tokens_per_processor_second": 2 * len(flat.ids) / total, "learned": len(flat.targets),
            "tokens": len(flat.ids), "threads": threads}  # fmt: skip


if __name__ == "__main__":
    main()
