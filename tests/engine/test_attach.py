"""A real LoRA, trained here with PEFT on the starter model, switched a hundred times in mid-conversation."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import adapter_builders as adapters
import psutil
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.initialization import no_init_weights

from glmchat.core.messages import Sampling
from glmchat.engine import Engine
from glmchat.engine.families import identify
from glmchat.engine.loading import open_weights

# Without the chat template, whose 30 tokens would be read 100 times: what is compared does not depend on it.
QUESTION = "Q: Who are you?\nA:"
ANSWER = " Keeper of the lighthouse."
TURNS = (QUESTION, f"{QUESTION}{ANSWER}\nQ: Where do you live?\nA:")
GREEDY = Sampling(temperature=0, max_tokens=3)
FIRST = Sampling(temperature=0, max_tokens=1)
FRESH = """
import json, sys
from glmchat.core.messages import Sampling
from glmchat.engine import Engine
model, folder, turns = json.loads(sys.argv[1])
greedy = Sampling(temperature=0, max_tokens=3)
said = []
for weight in (0, 1):
    engine = Engine.load(model, dtype="float32", threads=1)
    if weight:
        engine.attach(folder, "trained")
        engine.activate({"trained": 1.0})
    said.append([list(engine.generate(engine.tokenizer.encode(turn), greedy)) for turn in turns])
    engine.close()
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def engine(starter_model: Path) -> Iterator[Engine]:
    found = Engine.load(starter_model, dtype="float32", threads=1)
    yield found
    found.close()


@pytest.fixture(scope="module")
def plain(starter_model: Path) -> LlamaForCausalLM:
    """transformers' own model with the starter model's numbers."""
    checkpoint = identify(starter_model)
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "rms_norm_eps", "rope_theta", "max_position_embeddings")  # fmt: skip
    config = {name: checkpoint.config[name] for name in names}
    with no_init_weights():
        model = LlamaForCausalLM(LlamaConfig(**config, tie_word_embeddings=True))
    weights = open_weights(checkpoint)
    for name in weights.shapes():
        stored = weights.read(name)
        dense = stored if isinstance(stored, torch.Tensor) else stored.dequantise()
        model.get_parameter(name).data = dense.float()
    model.tie_weights()
    return model.eval()


@pytest.fixture(scope="module")
def trained(engine: Engine, plain: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of rank 4 that has learnt one answer by heart."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("trained") / "lighthouse-lora"
    config = LoraConfig(
        r=4,
        lora_alpha=16,
        target_modules=["q_proj", "v_proj", "down_proj"],
        layers_to_transform=list(range(22, 30)),  # the last ones: the backward pass ends there
    )
    model = get_peft_model(plain, config)
    prompt = engine.tokenizer.encode(QUESTION)
    answer = [*engine.tokenizer.encode(ANSWER), *engine.stop_ids[:1]]
    ids, labels = torch.tensor([prompt + answer]), torch.tensor([[-100] * len(prompt) + answer])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in range(5):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.set_num_threads(threads)
    model.save_pretrained(folder)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct"}))
    expected = adapters.peft_logits(model.eval(), prompt)
    torch.save(expected, folder / "expected.logits")
    model.unload()
    return folder


def test_the_trained_adapter_speaks_and_its_logits_are_pefts(engine: Engine, trained: Path) -> None:
    prompt = engine.tokenizer.encode(QUESTION)
    before = engine.logits(prompt)
    engine.attach(trained, "trained")
    engine.activate({"trained": 1.0})
    said = engine.tokenizer.decode(list(engine.generate(prompt, Sampling(temperature=0, max_tokens=6))))
    assert said == ANSWER
    expected = torch.load(trained / "expected.logits")
    # Logits of some 30, after 30 layers: what two orders of summation differ by.
    torch.testing.assert_close(engine.logits(prompt), expected, atol=1e-4, rtol=1e-5)
    engine.detach("trained")
    assert torch.equal(engine.logits(prompt), before)


def test_a_hundred_swaps_answer_like_fresh_engines_in_another_process(
    engine: Engine, trained: Path, starter_model: Path
) -> None:
    task = json.dumps([str(starter_model), str(trained), TURNS])
    done = subprocess.run([sys.executable, "-P", "-c", FRESH, task], capture_output=True, check=True, cwd="/")
    fresh = json.loads(done.stdout)
    assert fresh[1][0][0] != fresh[0][0][0], "the first token already tells which of the two speaks"
    turns = [engine.tokenizer.encode(turn) for turn in TURNS]
    modules = [id(module) for module in engine.model.modules()]
    before = engine.logits([1, 2, 3])
    engine.attach(trained, "trained")
    process, early = psutil.Process(), 0
    for swap in range(100):
        on, turn = (swap + 1) % 2, (swap // 2) % len(TURNS)
        engine.activate({"trained": 1.0} if on else {})
        asked = GREEDY if swap % 50 < 4 else FIRST
        assert list(engine.generate(turns[turn], asked)) == fresh[on][turn][: asked.max_tokens], swap
        if swap == 40:
            early = process.memory_info().rss
    assert process.memory_info().rss - early < 16e6
    engine.activate({})
    assert [id(module) for module in engine.model.modules()] == modules
    assert torch.equal(engine.logits([1, 2, 3]), before)
    engine.detach("trained")


def test_switching_back_finds_the_cache_that_was_left(engine: Engine, trained: Path) -> None:
    engine.attach(trained, "trained")
    engine.activate({})

    messages = [{"role": "user", "content": "Where do you live?"}]

    def cached() -> int:
        return int(list(engine.stream(messages, GREEDY))[-1].facts["cached_n"])

    cached()
    whole = len(engine.render(messages)) - 1
    engine.activate({"trained": 1.0})
    assert cached() == 0
    engine.activate({})
    assert cached() == whole
    engine.activate({"trained": 1.0})
    assert cached() == whole
    engine.attach(trained, "trained")  # the name now means other numbers
    engine.activate({"trained": 1.0})
    assert cached() == 0
    engine.detach("trained")
