"""GPT-2 against transformers, and the Chinese GPT-2 of CPM: its vocabulary and its way of completing a text.

Covers engine/models/gpt2.py, engine/tokenizers/gpt2.py.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from glmchat.core.errors import Damaged, Usage
from glmchat.core.messages import Message
from glmchat.engine import Engine, Sampling, load_tokenizer
from glmchat.engine.tokenizers.gpt2 import EOD, NEWLINE, SEP, UNK, CPMTokenizer, _cutter

TEXTS = (
    "家乡的四季,最美不过了",
    "第一行\n第二行  两个空格",
    "价格是1,234,567,很贵 ``引号'' é ①",
    "hello world, 2023年!",
)


@pytest.fixture(scope="module")
def cpm(shared: Path) -> CPMTokenizer:
    return CPMTokenizer(shared / "tokenizers" / "cpm-gpt2" / "chinese_vocab.model")


def test_gpt2_computes_what_transformers_computes(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(5)
    twin = GPT2LMHeadModel(GPT2Config(vocab_size=400, n_embd=32, n_head=4, n_layer=2, n_positions=64)).eval()
    for parameter in twin.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    twin.save_pretrained(tmp_path)
    engine = Engine.load(tmp_path, dtype="float32", threads=1)
    ids = torch.randint(0, 400, (30,)).tolist()
    with torch.inference_mode():
        expected = twin(torch.tensor([ids])).logits[0]
    assert (engine.logits(ids) - expected).abs().max() < 1e-4
    said = list(engine.generate(ids[:5], Sampling(temperature=0, max_tokens=20, ignore_eos=True)))
    with torch.inference_mode():
        rows = twin(torch.tensor([[*ids[:5], *said]])).logits[0]
    assert said == rows[4:-1].argmax(-1).tolist()


def test_names_of_openais_own_files_are_understood(tmp_path: Path, random_checkpoints: ModuleType) -> None:
    """Without `transformer.`, with the causal masks, without the head."""
    whole, bare = tmp_path / "whole", tmp_path / "bare"
    config = random_checkpoints.tiny("cpm-gpt2", vocab_size=300)
    (path,) = random_checkpoints.write_checkpoint(whole, config)
    tensors = torch.load(path, weights_only=True)
    bare.mkdir()
    shutil.copy(whole / "config.json", bare)
    kept = {n.removeprefix("transformer."): t for n, t in tensors.items() if n != "lm_head.weight"}
    masks = {f"h.{n}.attn.bias": torch.ones(1, 1, 4, 4) for n in range(3)}
    torch.save(kept | masks | {"h.0.attn.masked_bias": torch.tensor(-1e4)}, bare / "pytorch_model.bin")
    ids = [5, 6, 7]
    assert torch.equal(
        Engine.load(whole, dtype="float32", threads=1).logits(ids),
        Engine.load(bare, dtype="float32", threads=1).logits(ids),
    )


def test_cpm_ids_are_those_of_the_tokenizer_it_was_trained_with(
    cpm: CPMTokenizer, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers' CpmTokenizer behind jieba's cut, blanks and newlines as signs, joined by blanks."""
    monkeypatch.setitem(sys.modules, "rjieba", ModuleType("rjieba"))  # it imports another jieba and does not use it
    from transformers.models.cpm.tokenization_cpm import CpmTokenizer

    theirs = CpmTokenizer(str(shared / "tokenizers" / "cpm-gpt2" / "chinese_vocab.model"))
    ids = json.loads((shared / "tokenizers" / "cpm-gpt2" / "vocab.json").read_text(encoding="utf-8"))
    signs = str.maketrans(" \n", "\u2582\u2583")
    lines = (shared / "data" / "advertisegen" / "dev.json").read_text(encoding="utf-8").splitlines()[:40]
    for text in [*TEXTS, *(json.loads(line)["summary"] for line in lines)]:
        words = [word.translate(signs) for word in _cutter().cut(text, cut_all=False)]
        pieces = theirs._tokenize(" ".join(words))
        assert cpm.encode(text) == [ids.get(piece, UNK) for piece in pieces], text


def test_cpm_blanks_and_newlines_come_back(cpm: CPMTokenizer) -> None:
    text = "第一行\n第二行 有空格"
    assert cpm.decode(cpm.encode(text)) == text
    assert b"".join(cpm.token_bytes(token) for token in cpm.encode(text)).decode() == text


def test_cpm_control_tokens_are_text_unless_a_completion_asks_for_them(cpm: CPMTokenizer) -> None:
    typed = cpm.encode("标题<sep>正文<eod>")
    assert SEP not in typed
    assert EOD not in typed
    assert cpm.encode_special("标题<sep>正文") == [*cpm.encode("标题"), SEP, *cpm.encode("正文")]


def test_the_cutter_leaves_nothing_in_the_shared_temporary_folder(
    cpm: CPMTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    _cutter.cache_clear()
    assert cpm.encode("家乡的四季")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, shared: Path, random_checkpoints: ModuleType) -> Engine:
    folder = tmp_path_factory.mktemp("cpm")
    random_checkpoints.write_checkpoint(folder, random_checkpoints.tiny("cpm-gpt2"))
    shutil.copy(shared / "tokenizers" / "cpm-gpt2" / "chinese_vocab.model", folder)
    return Engine.load(folder, dtype="float32", threads=1)


def test_a_completion_ends_at_a_sentence_once_it_is_long_enough(engine: Engine) -> None:
    ids = engine.complete("家乡的四季<sep>家乡的四季,最美不过了")
    assert SEP in ids
    ends = set(engine.prompt.sentence_ends)
    assert NEWLINE in ends
    for seed in range(4):
        said = list(engine.generate(ids, Sampling(temperature=5.0, top_p=1.0, seed=seed, max_tokens=5)))
        assert len(said) >= 5 or said[-1] == EOD
        assert said[-1] in ends | {EOD} or len(ids) + len(said) == engine.context
        assert not ends & set(said[4:-1])
        assert UNK not in said


def test_unk_is_never_chosen_even_where_it_is_the_most_likely(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = engine.model.get_parameter("transformer.wte.weight")
    before = weight[UNK].clone()
    ids = engine.complete("家乡")
    with torch.inference_mode():
        weight[UNK] = engine.model.get_parameter("transformer.wte.weight").mean(0) * 50
    try:
        for temperature in (0.0, 1.0):
            said = list(engine.generate(ids, Sampling(temperature=temperature, seed=1, max_tokens=3)))
            assert UNK not in said
    finally:
        with torch.inference_mode():
            weight[UNK] = before


def test_a_base_model_refuses_to_chat_and_names_the_way(engine: Engine) -> None:
    with pytest.raises(Usage) as caught:
        engine.render([Message("user", "你好")])
    assert "--complete" in caught.value.hint


def test_byte_pair_files_without_tokenizer_json_are_read(tmp_path: Path, random_checkpoints: ModuleType) -> None:
    random_checkpoints.write_checkpoint(tmp_path, random_checkpoints.tiny("cpm-gpt2", vocab_size=300))
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "ab": 2, "Ġ": 3, "<|endoftext|>": 4}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("ab a") == [2, 3, 0]
    assert tokenizer.decode([2, 3, 0, 4]) == "ab a"
    (tmp_path / "merges.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(Damaged, match=r"merges\.txt"):
        load_tokenizer(tmp_path)


def test_a_vocabulary_larger_than_the_network_is_refused(
    tmp_path: Path, shared: Path, random_checkpoints: ModuleType
) -> None:
    random_checkpoints.write_checkpoint(tmp_path, random_checkpoints.tiny("cpm-gpt2", vocab_size=300))
    shutil.copy(shared / "tokenizers" / "cpm-gpt2" / "chinese_vocab.model", tmp_path)
    with pytest.raises(Damaged, match="30,000 tokens"):
        Engine.load(tmp_path)
