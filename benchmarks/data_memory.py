"""A data file of 200 MB with twelve planted faults, read and tokenised: time, and memory above the start.

    .venv/bin/python benchmarks/data_memory.py MODEL [MEGABYTES]

MODEL: a folder or GGUF file, of which the tokenizer and the chat format are loaded. FACTS asks for less than 300 MB.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from pathlib import Path

from glmchat.tuning.dataset import DataOptions, read_dataset
from glmchat.tuning.prompt_side import load_prompt_side

FAULTS = (
    b'{"question": "\xff\xfe", "answer": "b"}',
    b'{"question": 7, "answer": "b"}',
    b'{"question": "a"}',
    b'{"question": "a", "answer": ""}',
    b'{"question": "' + b"a b " * 9000 + b'", "answer": "b"}',
    b'{"question": "a", "answer": "b"}]',
    b'{"question": "a", "answer": "c"}\r',
    b'{"question": "a", "answer": [["b"]]}',
    b'{"question": "a", "answer": "b",}',
    b'{"question": "<|im_start|>", "answer": "b"}',
    b'{"question": "a", "answer": "{{name}}"}',
)


WORDS = __doc__.split()


def memory() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    model, size = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 200
    with tempfile.TemporaryDirectory() as folder:
        path, number, planted = Path(folder) / "rows.jsonl", 0, list(FAULTS)
        with path.open("wb") as file:
            file.write(b"\xef\xbb\xbf")
            while file.tell() < size * 1_000_000:
                words = " ".join(WORDS[(number * k + k) % len(WORDS)] for k in range(1, 60))
                row = {"question": f"Question {number}: {words}?", "answer": f"Answer {number}: {words}."}
                file.write(json.dumps(row).encode() + b"\n")
                number += 1
                if planted and file.tell() > (len(FAULTS) - len(planted) + 1) * size * 1_000_000 // 13:
                    file.write(planted.pop(0) + b"\n")
        side = load_prompt_side(model)
        start, began = memory(), time.monotonic()
        dataset = read_dataset([str(path)], DataOptions(over_length="cut-answer"), side, folder=Path(folder))
        facts, seconds = dataset.facts, time.monotonic() - began
        assert facts.read == facts.used + facts.refusals
        print(f"{path.stat().st_size / 1e6:.0f} MB, {facts.read:,} rows, {facts.tokens:,} tokens in {seconds:.0f} s")
        print(f"memory {start:.0f} MB at the start, {memory() - start:.0f} MB more at the most")
        for kind, what in (*facts.refused.items(), *facts.warned.items()):
            print(f"{kind}: {what.count} {what.first[0][len(folder) :][:150]}")
        dataset.close()
        side.close()


if __name__ == "__main__":
    main()
