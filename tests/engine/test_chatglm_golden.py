"""What the original code computed, recorded on tiny checkpoints of the original format (../shared/reference).

Covers engine/models/chatglm.py, engine/models/chatglm2.py.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from glmchat.core.messages import Message
from glmchat.engine import Engine, Sampling
from glmchat.engine.models import chatglm

REFERENCE = Path(__file__).resolve().parents[3] / "shared" / "reference" / "chatglm"
VARIANTS = sorted(path.parent.name for path in REFERENCE.glob("*/golden.json"))
CLOSE = 1e-4

pytestmark = pytest.mark.skipif(not VARIANTS, reason="../shared with the reference vectors is absent")


@dataclass
class Recorded:
    name: str
    engine: Engine
    tensors: dict[str, torch.Tensor]
    facts: dict[str, Any]

    @property
    def prompts(self) -> list[str]:
        return list(self.facts["prompts"])

    def decoded(self, kind: str) -> list[str]:
        """The prompts that are decoded step by step: all where a family's rules are tested, some of its variants'.

        A step costs 28 layers in the first generation; a forced continuation takes the same path as a greedy one.
        """
        everything = ("v1_old", "v1_new_struct", "v2", "v3") if kind == "greedy" else ("v2", "v3")
        some = ("p3", "mask_mid", "cont", "plong", "text_mask")
        return [p for p in self.prompts if self.name in everything or p in some]

    def ids(self, prompt: str) -> torch.Tensor:
        return self.tensors[f"{prompt}.input_ids"][0]

    def stepwise(self, prompt: str, following: list[int]) -> torch.Tensor:
        """Logits [steps, vocab]: behind the prompt, then behind each of `following` but the last, through the cache."""
        ids, model = self.ids(prompt), self.engine.model
        with torch.inference_mode():
            cache = model.new_cache(len(ids) + len(following), torch.float32)
            rows = [model(ids, cache, last_only=True)[0]]
            rows += [model(torch.tensor([token]), cache)[0] for token in following[:-1]]
        return torch.stack(rows)


@pytest.fixture(scope="module", params=VARIANTS)
def recorded(request: pytest.FixtureRequest) -> Recorded:
    folder = REFERENCE / request.param
    engine = Engine.load(folder, dtype="float32", threads=1)
    facts = json.loads((folder / "golden.json").read_text())
    return Recorded(request.param, engine, load_file(folder / "golden.safetensors"), facts)


def differs(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max())


def test_an_uncached_forward_gives_the_recorded_logits(recorded: Recorded) -> None:
    probe = recorded.tensors["probe_ids"]
    for prompt in recorded.prompts:
        logits = recorded.engine.logits(recorded.ids(prompt).tolist())
        # Where the first generation's bare forward and its generate differ, the bare one is recorded apart.
        bare = f"{prompt}.plainfwd.logits_probe" in recorded.tensors
        path = f"{prompt}.plainfwd." if bare else f"{prompt}."
        assert differs(logits[:, probe], recorded.tensors[path + "logits_probe"]) < CLOSE, prompt
        assert differs(logits.logsumexp(-1), recorded.tensors[path + "logits_lse"]) < CLOSE, prompt
        if f"{path}logits_last" in recorded.tensors:
            assert differs(logits[-1], recorded.tensors[path + "logits_last"]) < CLOSE, prompt


def test_the_greedy_continuation_is_the_recorded_one(recorded: Recorded) -> None:
    greedy = Sampling(temperature=0, max_tokens=16, ignore_eos=True)
    for prompt in [p for p in recorded.prompts if p in ("cont", "text_mask", "turns")]:
        said = list(recorded.engine.generate(recorded.ids(prompt).tolist(), greedy))
        assert said == recorded.tensors[f"{prompt}.greedy_ids"].tolist(), prompt


@pytest.mark.parametrize("kind", ["greedy", "forced"])
def test_every_step_through_the_cache_gives_the_recorded_logits(recorded: Recorded, kind: str) -> None:
    probe = recorded.tensors["probe_ids"]
    for prompt in recorded.decoded(kind):
        if f"{prompt}.{kind}_ids" not in recorded.tensors:
            continue
        following = recorded.tensors[f"{prompt}.{kind}_ids"]
        rows = recorded.stepwise(prompt, following.tolist())
        assert kind == "forced" or torch.equal(rows.argmax(-1), following), prompt
        assert differs(rows[:, probe], recorded.tensors[f"{prompt}.{kind}_probe"]) < CLOSE, prompt
        assert differs(rows.logsumexp(-1), recorded.tensors[f"{prompt}.{kind}_lse"]) < CLOSE, prompt


def test_the_cache_holds_the_recorded_keys_and_values(recorded: Recorded) -> None:
    model, ids = recorded.engine.model, recorded.ids("p17")
    with torch.inference_mode():
        cache = model.new_cache(len(ids), torch.float32)
        model(ids, cache)
    for layer in (0, 1, model.spec.layers - 1):
        for name, held in (("past_key", cache.keys), ("past_value", cache.values)):
            expected = recorded.tensors.get(f"p17.{name}.{layer}")
            if expected is not None:
                assert differs(held[layer][:, : cache.length].transpose(0, 1), expected) < CLOSE


def test_the_training_loss_is_the_recorded_one(recorded: Recorded) -> None:
    if "train.input_ids" not in recorded.tensors:
        pytest.skip("no loss was recorded for this variant")
    total, count = 0.0, 0
    for ids, labels in zip(recorded.tensors["train.input_ids"], recorded.tensors["train.labels"], strict=True):
        known = int((labels[1:] != -100).sum())
        total += recorded.engine.loss(ids.tolist(), labels.tolist()) * known
        count += known
    assert total / count == pytest.approx(float(recorded.tensors["train.loss"][0]), abs=CLOSE)


def test_positions_and_masks_of_a_prompt_are_the_recorded_ones(recorded: Recorded) -> None:
    if recorded.engine.family != "chatglm":
        pytest.skip("causal: positions count up and no mask is kept")
    for prompt in recorded.prompts:
        ids, spec = recorded.ids(prompt), recorded.engine.spec
        layout = chatglm.read_layout(ids, spec, generating=True)
        assert torch.equal(layout.positions(0, len(ids)), recorded.tensors[f"{prompt}.position_ids"][0]), prompt
        seen = layout.mask(0, len(ids), 0, torch.device("cpu"))
        assert isinstance(seen, torch.Tensor)
        assert torch.equal(~seen, recorded.tensors[f"{prompt}.attention_mask"][0, 0]), prompt
        # The recorded positions are those of each step's last input: the prompt's end, then one new token at a time.
        steps = recorded.tensors[f"{prompt}.greedy_position_ids"]
        later = [layout.positions(len(ids) + n, 1) for n in range(steps.shape[1] - 1)]
        found = torch.cat([layout.positions(0, len(ids))[:, -1:], *later], dim=1)
        assert torch.equal(found, steps), prompt


def test_the_prefix_encoder_yields_the_recorded_prefix(recorded: Recorded) -> None:
    if "prefix_key_values" not in recorded.tensors:
        pytest.skip("this variant has no prefix")
    prefix = recorded.engine.model.prefix_key_values  # [layers, 2, kv_heads, length, head_dim]
    assert isinstance(prefix, torch.Tensor)
    assert differs(prefix.transpose(2, 3), recorded.tensors["prefix_key_values"]) < 1e-5
    assert prefix.dtype == torch.float32


def test_a_chat_with_the_real_vocabulary_gives_the_recorded_answer(recorded: Recorded, shared: Path) -> None:
    chats = recorded.facts.get("e2e_chat_greedy")
    if not chats:
        pytest.skip("no chat was recorded for this variant")
    folder = {"v1_old": "chatglm-6b-early", "v1_new": "chatglm-6b"}.get(recorded.name)
    folder = folder or ("chatglm2" if recorded.engine.family == "chatglm2" else "chatglm3")
    checkpoint = recorded.engine.checkpoint
    tokenizer = checkpoint.family.load_tokenizer(shared / "tokenizers" / folder, checkpoint.spec)
    prompt = checkpoint.family.prompt(checkpoint.path, tokenizer, checkpoint.spec)
    for chat in chats[:2]:
        said = []
        for turn in chat["history"] or []:
            if isinstance(turn, dict):
                said.append(Message.from_json(turn))
            else:
                said += [
                    Message.from_json({"role": r, "content": c})
                    for r, c in zip(("user", "assistant"), turn, strict=True)
                ]
        ids = prompt.render([*said, Message.from_json({"role": chat.get("role", "user"), "content": chat["query"]})])
        assert ids == chat["input_ids"]
        expected = chat["output_ids_all"][len(ids) :]
        found = list(recorded.engine.generate(ids, Sampling(temperature=0, max_tokens=len(expected))))
        assert found == expected
        # ChatGLM3's chat() drops the last id also when the answer ended by length.
        shown = found[:-1] if recorded.engine.family == "chatglm3" else found
        if isinstance(chat["response"], str):
            assert prompt.clean(tokenizer.decode(shown)) == chat["response"]
