"""An adapter that brings its own words and chat template speaks as PEFT and transformers do with its folder.

Covers engine/adapters/words.py, engine/prompts/adapted.py.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import adapter_builders as adapters
import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from glmchat.chat import connect
from glmchat.chat.adapters_choice import brings_template, folder_of_template, own_texts, require_fit
from glmchat.checkpoints.adapter_check import check_adapter, read_facts
from glmchat.checkpoints.adapter_files import weight_files
from glmchat.checkpoints.chat_template import template_of
from glmchat.core.engine_options import EngineOptions
from glmchat.core.errors import GlmchatError, UnknownModel, Usage
from glmchat.core.messages import Sampling
from glmchat.engine import Engine
from glmchat.engine.adapters.files import read_adapter
from glmchat.engine.adapters.merge import merge
from glmchat.hub.adapters import Origin, companions, find_adapter, keep

TALK = [{"role": "user", "content": "he said the <|turn|> thing"}, {"role": "assistant", "content": "so"},
        {"role": "user", "content": "and then"}]  # fmt: skip


def theirs(base: Path, folder: Path, words: int | None) -> tuple[list[int], torch.Tensor]:
    """transformers' ids of TALK with the adapter's tokenizer, and PEFT's logits behind them."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # A person's <|turn|> is text here, which no option of transformers says in a template: so nobody types one to it.
    talk = [{**m, "content": m["content"].replace("<|turn|>", "@")} for m in TALK]
    ids = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if words is not None:
            model.resize_token_embeddings(words, mean_resizing=False)
        from peft import PeftModel

        tuned = PeftModel.from_pretrained(model, folder).eval()
    return ids, adapters.peft_logits(tuned, ids)


CASES: dict[str, tuple[bool, int | None, dict[str, Any]]] = {
    "words-in-spare-rows": (True, None, {"trainable_token_indices": [261, 262, 263]}),
    "words-in-spare-rows-untied": (False, None, {"trainable_token_indices": {"embed_tokens": [261, 262],
                                                                            "lm_head": [261, 263]}}),
    "nothing-but-a-template": (True, None, {}),
    "more-rows-saved": (False, 280, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "more-rows-saved-tied": (True, 280, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "more-rows-as-one": (True, 280, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "more-rows-of-the-embedding-trained": (True, 280, {"modules_to_save": ["embed_tokens"]}),
    "more-rows-untrained": (False, 280, {}),
    "more-rows-untrained-tied": (True, 280, {}),
    "fewer-rows": (False, 264, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "fewer-rows-tied": (True, 264, {}),
    "more-rows-and-low-rank-ends": (False, 280, {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "more-rows-and-a-low-rank-embedding": (True, 280, {"target_modules": ["embed_tokens", "q_proj"]}),
    "more-rows-some-trained": (False, 280, {"trainable_token_indices": [261, 262, 279]}),
    "more-rows-some-trained-tied": (True, 280, {"trainable_token_indices": [261, 262, 279]}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_ids_and_logits_are_those_of_transformers_and_peft(case: str, builders: ModuleType, tmp_path: Path) -> None:
    tied, words, settings = CASES[case]
    base = builders.write_folder(tmp_path / "base", tie_word_embeddings=tied)
    folder = adapters.train(base, tmp_path / "own", words, **settings)
    ids, logits = theirs(base, folder, words)
    engine = Engine.load(base, threads=1, dtype="float32")
    before, said = engine.logits(list(range(3, 40))), engine.render(TALK)
    engine.attach(folder, "own")
    talk = [{**m, "content": m["content"].replace("<|turn|>", "@")} for m in TALK]
    assert engine.render(talk, adapters=[folder]) == ids
    assert engine.render(TALK) == said  # not active yet
    engine.activate({"own": 1.0})
    assert engine.render(talk) == ids
    assert engine.render(TALK).count(261) == 4  # what a person typed is no token
    assert engine.logits(ids).shape == logits.shape
    assert torch.allclose(engine.logits(ids), logits, atol=1e-4, rtol=1e-4)
    assert 262 in engine.stop_ids
    steps = list(engine.generate(ids, Sampling(temperature=0, max_tokens=4, ignore_eos=True)))
    assert steps[0] == int(logits[-1].argmax())
    engine.activate({})
    assert torch.equal(engine.logits(list(range(3, 40))), before)
    assert engine.render(TALK) == said
    assert 262 not in engine.stop_ids
    engine.close()


@pytest.mark.parametrize("case", CASES)
def test_a_merged_folder_speaks_alike_here_and_in_transformers(case: str, builders: ModuleType, tmp_path: Path) -> None:
    tied, words, settings = CASES[case]
    base = builders.write_folder(tmp_path / "base", tie_word_embeddings=tied)
    folder = adapters.train(base, tmp_path / "own", words, **settings)
    ids, logits = theirs(base, folder, words)
    merged = merge(read_adapter(folder), base, tmp_path / "merged", dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(merged)
    talk = [{**m, "content": m["content"].replace("<|turn|>", "@")} for m in TALK]
    assert tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=False) == ids
    twin = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    assert torch.allclose(adapters.peft_logits(twin, ids), logits, atol=1e-4, rtol=1e-4)
    engine = Engine.load(merged, threads=1, dtype="float32")
    assert engine.render(talk) == ids
    assert torch.allclose(engine.logits(ids), logits, atol=1e-4, rtol=1e-4)
    engine.close()


def test_pefts_own_way_to_load_such_a_folder_gives_the_same(builders: ModuleType, tmp_path: Path) -> None:
    base = builders.write_folder(tmp_path / "base", vocab_size=262, tie_word_embeddings=False)
    folder = adapters.train(base, tmp_path / "own", 264, modules_to_save=["embed_tokens", "lm_head"])
    tuned = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    engine = Engine.load(base, threads=1, dtype="float32")
    engine.attach(folder, "own")
    engine.activate({"own": 1.0})
    ids = [262, 5, 9, 263, 40]
    assert torch.allclose(engine.logits(ids), adapters.peft_logits(tuned, ids), atol=1e-4, rtol=1e-4)
    engine.close()


def test_a_base_without_a_template_takes_that_of_the_adapter(builders: ModuleType, tmp_path: Path) -> None:
    base = builders.write_folder(tmp_path / "base", template=None)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    tokenizer.chat_template = builders.TEMPLATE
    folder = adapters.train(base, tmp_path / "chat", None, template=None)
    tokenizer.save_pretrained(folder)
    engine = Engine.load(base, threads=1, dtype="float32")
    with pytest.raises(Usage, match="no chat template"):
        engine.render(TALK[:1])
    engine.attach(folder, "chat")
    engine.activate({"chat": 1.0})
    asked = [{"role": "user", "content": "and then"}]
    assert engine.render(asked) == tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    engine.activate({})
    with pytest.raises(Usage, match="no chat template"):
        engine.render(TALK[:1])
    engine.close()


def test_adapters_that_disagree_are_refused_by_name(builders: ModuleType, tmp_path: Path) -> None:
    base = builders.write_folder(tmp_path / "base")
    own = adapters.train(base, tmp_path / "own", None)
    other = adapters.train(base, tmp_path / "other", None, template=adapters.OWN.replace(": ", "> "))
    plain = adapters.train(base, tmp_path / "plain", None, template=None)
    for path in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (plain / path).unlink(missing_ok=True)
    larger = adapters.train(base, tmp_path / "larger", 280, modules_to_save=["embed_tokens", "lm_head"])
    saved = adapters.train(base, tmp_path / "saved", None, template=None, modules_to_save=["embed_tokens"])
    engine = Engine.load(base, threads=1, dtype="float32")
    for folder in (own, other, plain, larger, saved):
        engine.attach(folder, folder.name)
    engine.activate({"plain": 1.0})
    before = engine.logits([5, 6, 7])
    for both in ({"own": 1.0, "other": 1.0}, {"own": 1.0, "larger": 1.0}, {"own": 1.0, "saved": 1.0}):
        with pytest.raises(Usage, match=", ".join(both)):
            engine.activate(both)
        assert torch.equal(engine.logits([5, 6, 7]), before)
    with pytest.raises(Usage, match=r"larger brings words of its own, so its weight can only be 1"):
        engine.activate({"larger": 0.5})
    engine.activate({"own": 1.0, "plain": 0.5})  # which says nothing
    assert engine.render(TALK[:1])[0] == 261
    engine.close()


def test_words_without_rows_and_words_of_another_model_are_refused(builders: ModuleType, tmp_path: Path) -> None:
    base = builders.write_folder(tmp_path / "base", vocab_size=262)
    engine = Engine.load(base, threads=1, dtype="float32")
    lost = adapters.train(base, tmp_path / "lost", None)  # two words more than rows, and no rows saved
    with pytest.raises(Usage, match="its tokenizer has 264 words, but there are rows for 262"):
        engine.attach(lost, "lost")
    foreign = adapters.train(base, tmp_path / "foreign", None, template=None)
    data = json.loads((foreign / "tokenizer.json").read_text())
    words = {word: index for index, word in enumerate(reversed(data["model"]["vocab"]))}
    (foreign / "tokenizer.json").write_text(json.dumps({**data, "model": {**data["model"], "vocab": words}}))
    with pytest.raises(GlmchatError, match="its tokenizer is another model's: token"):
        engine.attach(foreign, "foreign")
    assert engine.render(TALK[:1])[0] == 1
    engine.close()


def test_one_whose_text_is_refused_is_not_attached_and_leaves_what_had_its_name(
    builders: ModuleType, tmp_path: Path
) -> None:
    base = builders.write_folder(tmp_path / "base", vocab_size=262)
    engine = Engine.load(base, threads=1, dtype="float32")
    lost = adapters.train(base, tmp_path / "lost", None)
    with pytest.raises(Usage, match="its tokenizer has"):
        engine.attach(lost, "lost")
    with pytest.raises(UnknownModel, match="no adapter is attached as 'lost'"):
        engine.activate({"lost": 1.0})
    good = adapters.train(base, tmp_path / "good", None, template=None)
    engine.attach(good, "mine")
    engine.activate({"mine": 1.0})
    before = engine.logits([1, 2, 3])
    with pytest.raises(Usage, match="its tokenizer has"):
        engine.attach(lost, "mine")
    assert torch.equal(engine.logits([1, 2, 3]), before)
    engine.close()


def as_two_files(folder: Path, kind: str) -> Path:
    """The tokenizer of the folder as slow classes saved one: vocab.json, merges.txt and the words beside them."""
    data = json.loads((folder / "tokenizer.json").read_text())
    vocabulary, merges = data["model"]["vocab"], data["model"]["merges"]
    lines = [" ".join(pair) if isinstance(pair, list) else pair for pair in merges]
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["added_tokens_decoder"] = {
        str(word["id"]): {key: word[key] for key in ("content", "special", "normalized", "lstrip", "rstrip")}
        for word in data["added_tokens"]
    }
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": kind}))
    (folder / "tokenizer.json").unlink()
    return folder


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "Qwen2Tokenizer", "Qwen2TokenizerFast"])
def test_words_in_vocab_json_and_merges_txt_are_those_of_transformers(
    kind: str, builders: ModuleType, tmp_path: Path
) -> None:
    base = builders.write_folder(tmp_path / "base", vocab_size=272)
    folder = as_two_files(adapters.train(base, tmp_path / "own", None), kind)
    ids, logits = theirs(base, folder, None)
    engine = Engine.load(base, threads=1, dtype="float32")
    engine.attach(folder, "own")
    engine.activate({"own": 1.0})
    talk = [{**m, "content": m["content"].replace("<|turn|>", "@")} for m in TALK]
    assert engine.render(talk) == ids and torch.allclose(engine.logits(ids), logits, atol=1e-4, rtol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in ("the zebra's 123 45 cats\n\n  e\u0301 \u4f60<|turn|>x", "zebra", "  a zebra  \t"):
        assert engine.complete(text) == tokenizer(text)["input_ids"]
    merged = merge(read_adapter(folder), base, tmp_path / "merged")
    assert AutoTokenizer.from_pretrained(merged)("the zebra")["input_ids"] == tokenizer("the zebra")["input_ids"]
    engine.close()


def test_two_files_of_a_class_that_is_not_put_together_from_them_are_refused_where_the_adapter_is_typed(
    builders: ModuleType, tmp_path: Path
) -> None:
    base = builders.write_folder(tmp_path / "base", vocab_size=272)
    folder = as_two_files(adapters.train(base, tmp_path / "own", None), "CodeGenTokenizer")
    with pytest.raises(Usage, match=r"vocab\.json and merges\.txt, for the class CodeGenTokenizer") as caught:
        check_adapter(folder, base)
    assert "save_pretrained" in caught.value.hint


def store(folder: Path) -> str:
    """The adapter with all that is kept of it; its name in the store."""
    files = [*companions(folder), *weight_files(folder)]
    facts = read_facts(folder).to_json()
    return keep(folder.name, list(dict.fromkeys(files)), facts, Origin(str(folder)), base=None).name


def test_the_store_keeps_them_and_says_before_an_engine_starts_what_they_bring(
    builders: ModuleType, tmp_path: Path
) -> None:
    base = builders.write_folder(tmp_path / "base", tie_word_embeddings=False)
    silent = builders.write_folder(tmp_path / "silent", template=None, tie_word_embeddings=False)
    own, larger = (
        store(adapters.train(base, tmp_path / "own", None)),
        store(adapters.train(base, tmp_path / "larger", 280, modules_to_save=["embed_tokens", "lm_head"])),
    )
    other = store(adapters.train(base, tmp_path / "other", None, template=adapters.OWN.replace(": ", "> ")))
    kept = find_adapter(own).path
    assert template_of(kept) == adapters.OWN and (kept / "tokenizer.json").is_file()
    assert brings_template(own)
    for names, words in (((own, other), "own, other"), ((larger, other), "larger, other")):
        with pytest.raises(Usage, match=f"different chat templates or tokenizers, .*: {words}"):
            require_fit([(name, 1.0) for name in names], base)
    with pytest.raises(Usage, match="larger brings words of its own, so its weight can only be 1"):
        require_fit([(larger, 0.5)], base)
    require_fit([(larger, 1.0)], base)
    assert [sentence.partition(":")[0] for sentence in own_texts([(own, 1.0), (larger, 1.0)], base)] == [
        "own brings a chat template of its own, which is used while it is active",
        "larger brings a chat template of its own, which is used while it is active",
        "larger brings a vocabulary of its own",
    ]
    assert folder_of_template([(own, 1.0)], base) == kept
    require_chat = EngineOptions(folder=silent)
    with pytest.raises(Usage, match="no chat template"):
        connect.require_fit(require_chat, "answer")
    connect.require_fit(require_chat, "answer", [(own, 1.0)])
