"""Folders that `glmchat quantize` writes, read by vLLM's CPU build: its logits beside transformers' and ours.

    sh benchmarks/install_peers.sh --with-vllm
    python benchmarks/vllm_logits.py [--python .test-cache/vllm-venv/bin/python] [--kinds llama qwen3 glm4] [--bits 4 8]

The models are transformers' own with random weights. vLLM computes in bfloat16 (its CPU product of packed weights knows
no float32), so it may be three times as far from float32 as transformers itself is in bfloat16: its order of additions
is another one. A kind that vLLM cannot read is said with vLLM's words, beside what `quantize` said before it wrote.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    Glm4Config,
    Glm4ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from glmchat.engine import Engine

IDS = list(range(3, 40))
VOCABULARY = 272
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256,
    "pad_token_id": 0, "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
GPT = {"vocab_size": VOCABULARY, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 256, "eos_token_id": 2}
KINDS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE)),
    "glm4": lambda: Glm4ForCausalLM(Glm4Config(**SHAPE)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT)),
}
NO_PRODUCT = "Failed to find a kernel"  # vLLM's CPU build has one for 4 bits alone; that says nothing of the folder
# Said by vLLM on the last line: the logits behind the last id, in the order of the vocabulary.
CHILD = """
import json, sys
from vllm import LLM, SamplingParams
folder, ids = sys.argv[1], json.loads(sys.argv[2])
llm = LLM(model=folder, dtype="bfloat16", max_model_len=64, enforce_eager=True, skip_tokenizer_init=True,
          max_logprobs=400, logprobs_mode="raw_logits", max_num_seqs=2)
said = llm.generate([{"prompt_token_ids": ids}],
                    SamplingParams(temperature=0, max_tokens=1, logprobs=-1, detokenize=False))
row = said[0].outputs[0].logprobs[0]
print(json.dumps([row[i].logprob for i in sorted(row)]))
"""


def write_model(kind: str, folder: Path) -> None:
    torch.manual_seed(0)
    model = KINDS[kind]()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(VOCABULARY)}, unk_token="w1"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2").save_pretrained(folder)


def quantise(source: Path, out: Path, bits: int) -> str:
    """What the command said of who reads it."""
    command = [sys.executable, "-P", "-m", "glmchat", "quantize", str(source), "--bits", str(bits), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return next((line for line in done.stderr.splitlines() if "only glmchat" in line), "")


def ask_vllm(python: Path, folder: Path) -> torch.Tensor | str:
    """Its logits, or why there are none."""
    environ = {
        **os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    command = [str(python), "-P", "-c", CHILD, str(folder), json.dumps(IDS)]
    done = subprocess.run(command, capture_output=True, text=True, env=environ, cwd="/", check=False)
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if "Error" in line]
        return lines[-1][-160:] if lines else f"it ended with {done.returncode}"
    return torch.tensor(json.loads(done.stdout.splitlines()[-1]))


def transformers_logits(folder: Path, dtype: torch.dtype) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.inference_mode():
        return model(torch.tensor([IDS])).logits[0, -1].float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, default=Path(".test-cache/vllm-venv/bin/python"))
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=KINDS)
    parser.add_argument("--bits", nargs="*", type=int, default=[4, 8])
    options = parser.parse_args()
    python = options.python.absolute()
    wrong = 0
    with tempfile.TemporaryDirectory() as room:
        for kind in options.kinds:
            source = Path(room) / kind
            write_model(kind, source)
            for bits in options.bits:
                folder = Path(room) / f"{kind}-int{bits}"
                warned = quantise(source, folder, bits)
                ours = Engine.load(folder, dtype="float32").logits(IDS)[-1]
                theirs = ask_vllm(python, folder)
                if isinstance(theirs, str):
                    print(f"{kind} int{bits}: vLLM: {theirs}\n  quantize: {warned or 'nothing'}", flush=True)
                    wrong += not warned and NO_PRODUCT not in theirs
                    continue
                exact = transformers_logits(folder, torch.float32)
                coarse = (transformers_logits(folder, torch.bfloat16) - exact).abs().max().item()
                far, apart = (theirs - exact).abs().max().item(), (ours - exact).abs().max().item()
                is_right = far <= 3 * coarse and apart <= coarse
                wrong += not is_right
                verdict, most = "right" if is_right else "WRONG", exact.abs().max().item()
                print(
                    f"{kind} int{bits}: {verdict}: away from transformers' float32 (largest logit {most:.2f}):", end=" "
                )
                print(f"vLLM's bfloat16 {far:.3f}, transformers' bfloat16 {coarse:.3f}, ours {apart:.1e}", flush=True)
    sys.exit(f"{wrong} wrong" if wrong else 0)


if __name__ == "__main__":
    main()
