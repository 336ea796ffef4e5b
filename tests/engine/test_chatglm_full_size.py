"""Full-size architectures on the meta device: the names of the released files, the counts that are published."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from glmchat.checkpoints.families import parse
from glmchat.engine.families import family_of
from glmchat.engine.models import chatglm
from glmchat.engine.models.base import LanguageModel
from glmchat.engine.tokenizers.chatglm import ChatGLMTokenizer


def build(config: dict[str, object]) -> LanguageModel:
    family, spec = family_of(config)
    with torch.device("meta"):
        return family.build(spec)


@pytest.mark.parametrize(
    ("folder", "ignored"),
    [
        (
            "chatglm-6b",
            {"lm_head.weight", *(f"transformer.layers.{n}.attention.rotary_emb.inv_freq" for n in range(28))},
        ),
        ("chatglm3", {"transformer.rotary_pos_emb.inv_freq"}),
    ],
)
def test_every_name_of_the_released_index_has_its_place(shared: Path, folder: str, ignored: set[str]) -> None:
    source = shared / "tokenizers" / folder
    config = json.loads((source / "config.json").read_text())
    index = json.loads((source / "pytorch_model.bin.index.json").read_text())["weight_map"]
    (family, _), model = family_of(config), build(config)
    names = {name: family.rename(name) for name in index}
    assert {name for name, parameter in names.items() if parameter is None} == ignored
    assert {p for p in names.values() if p is not None} == {name for name, _ in model.named_parameters()}


def test_our_random_checkpoints_have_the_names_of_the_released_ones(
    shared: Path, random_checkpoints: ModuleType
) -> None:
    for folder, name in (("chatglm-6b", "chatglm-6b"), ("chatglm3", "chatglm3-6b")):
        index = json.loads((shared / "tokenizers" / folder / "pytorch_model.bin.index.json").read_text())
        written = dict(random_checkpoints.stored_tensors(random_checkpoints.CONFIGS[name]))
        assert set(written) == set(index["weight_map"])


def test_the_first_generation_counts_as_published(random_checkpoints: ModuleType) -> None:
    model = build(dict(random_checkpoints.CONFIGS["chatglm-6b-early"]))
    assert sum(p.numel() for p in model.parameters()) == 6_255_206_400


class LowRank(nn.Module):
    """A LoRA pair beside a frozen layer, as PEFT counts it."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, device="meta")
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, device="meta")


def test_a_lora_of_the_guide_counts_as_the_guide_prints(shared: Path, random_checkpoints: ModuleType) -> None:
    facts = json.loads((shared / "reference" / "lora-guide" / "facts.json").read_text())["parameters"]
    model = build(dict(random_checkpoints.CONFIGS["chatglm-6b-early"])).requires_grad_(False)
    targets = facts["lora"]["target_modules"]
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in targets:
            holder, _, place = name.rpartition(".")
            setattr(model.get_submodule(holder), place, LowRank(module, facts["lora"]["r"]))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == facts["trainable"]
    assert sum(p.numel() for p in model.parameters()) == facts["total_with_lora"]


def test_the_guides_example_has_its_ids_mask_and_positions(shared: Path, random_checkpoints: ModuleType) -> None:
    facts = json.loads((shared / "reference" / "lora-guide" / "facts.json").read_text())
    tokenizer = ChatGLMTokenizer(shared / "tokenizers" / "chatglm-6b-early" / "ice_text.model")
    assert tokenizer.vocab_size == facts["tokenizer"]["vocab_size"]
    special = facts["special_ids"]
    assert (tokenizer.sop_id, tokenizer.eop_id, tokenizer.mask_id, tokenizer.gmask_id) == (
        special["bos"], special["eop"], special["mask"], special["gmask"]
    )  # fmt: skip
    for text, ids in facts["encode"].items():
        assert tokenizer.encode(text) == ids["plain"]
        assert [*tokenizer.encode(text), tokenizer.gmask_id, tokenizer.sop_id] == ids["with_special"]
    for token, text in facts["decode"].items():
        assert tokenizer.decode([int(token)]) == text
    qa = facts["qa"]
    ids = tokenizer.encode(qa["prompt_pattern"].format(qa["question"])) + tokenizer.encode(qa["separator"])
    ids += [tokenizer.gmask_id, tokenizer.sop_id, *tokenizer.encode(qa["answer"]), tokenizer.eop_id]
    assert ids == qa["input_ids"]
    spec = parse(random_checkpoints.CONFIGS["chatglm-6b-early"])
    layout = chatglm.read_layout(torch.tensor(ids), spec)
    # As the code of that revision counts: <sop> is position 1 of its block; the guide's printed row is one behind.
    assert layout.positions(0, 21).tolist() == [list(range(21)), [0] * 15 + [1, 2, 3, 4, 5, 6]]
    seen = layout.mask(0, 21, 0, torch.device("cpu"))
    assert isinstance(seen, torch.Tensor)
    assert seen[:15, :15].all()
    assert not seen[:15, 15:].any()
    assert torch.equal(seen[15:], torch.ones(21, 21, dtype=torch.bool).tril()[15:])
