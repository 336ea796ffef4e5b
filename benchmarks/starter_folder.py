"""The starter model as a folder of 16-bit weights, from which `glmchat quantize` makes what other programs can read.

    .venv/bin/python -P benchmarks/starter_folder.py SmolLM2-135M-Instruct.Q4_1.gguf OUT
    .venv/bin/glmchat quantize OUT --bits 4 --out OUT-INT4

From the file itself the copy would be one without loss, whose zero points are no whole numbers: only glmchat reads it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM


def main() -> None:
    source, out = map(Path, sys.argv[1:])
    names = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    read = AutoModelForCausalLM.from_pretrained(**names, dtype=torch.bfloat16)
    measures = {name: value for name, value in read.config.to_dict().items() if name != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**measures)).bfloat16()  # what was read itself cannot be saved
    model.load_state_dict(read.state_dict())
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(**names).save_pretrained(out)


if __name__ == "__main__":
    main()
