"""The sampler's filters against those that the originals ran, top_k 50 of transformers' default included."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from glmchat.engine import Sampling
from glmchat.engine.sampling import filter_logits


@pytest.mark.parametrize("name", ["v1_chat", "v2_v3_chat", "greedyish"])
def test_the_filters_keep_what_the_originals_kept(name: str, shared: Path) -> None:
    folder = shared / "reference" / "chatglm" / "sampling"
    facts = json.loads((folder / "sampling.json").read_text())[name]
    tensors = load_file(folder / "sampling.safetensors")
    for top_k, key in ((facts["top_k"], "kept_per_row"), (0, "kept_per_row_without_top_k")):
        sampling = Sampling(temperature=facts["temperature"], top_p=facts["top_p"], top_k=top_k)
        rows = [filter_logits(row, sampling) for row in tensors["logits"]]
        assert [int(row.isfinite().sum()) for row in rows] == facts[key]
        processed = tensors[f"{name}.processed" if top_k else f"{name}.no_top_k.processed"]
        for row, expected in zip(
            rows[:2], processed[:2], strict=True
        ):  # in the third 395 are equal: any of them may go
            assert torch.equal(row.isfinite(), expected.isfinite())
            assert (row[row.isfinite()] - expected[row.isfinite()]).abs().max() < 1e-5
        if top_k:
            for row, expected in zip(rows[:2], tensors[f"{name}.probs"][:2], strict=True):
                assert (torch.softmax(row, -1) - expected).abs().max() < 1e-6
