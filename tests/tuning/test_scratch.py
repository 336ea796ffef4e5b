"""A GPT-2 from its first numbers on: those of transformers, words of its own, and windows as the original cut them."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer, GPT2LMHeadModel

from glmchat.core.errors import Usage
from glmchat.engine.engine import load_tokenizer
from glmchat.engine.tokenizers.base import SPACE
from glmchat.tuning.dataset import read_dataset
from glmchat.tuning.options import DataOptions
from glmchat.tuning.page import lines
from glmchat.tuning.prompt_side import load_prompt_side
from glmchat.tuning.recipes import cpm_windows
from glmchat.tuning.scratch import make_start

MEASURES = {"model_type": "gpt2", "n_layer": 3, "n_head": 4, "n_embd": 128, "n_positions": 256}


def novel(folder: Path, lines: int = 120, seed: int = 1) -> Path:
    """Chinese sentences of few words, some of them long: the same each time."""
    noise = random.Random(seed)
    who, where, what = (
        ["张三", "李四", "王五", "老人"],
        ["山上", "河边", "城里", "雪中"],
        ["饮酒", "读书", "练剑", "等人"],
    )
    folder.mkdir(exist_ok=True)
    text = []
    for _ in range(lines):
        count = noise.choice([1, 2, 3, 40])
        text.append("".join(f"{noise.choice(who)}在{noise.choice(where)}{noise.choice(what)}。" for _ in range(count)))
    (folder / "one.txt").write_text("\n\n".join(text) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(the model before its first step, the texts)"""
    place = tmp_path_factory.mktemp("scratch")
    texts, config = novel(place / "novels"), place / "config.json"
    config.write_text(json.dumps(MEASURES))
    make_start("train:500", config, [str(texts)], 7, place / "base")
    return place / "base", texts


def test_its_first_numbers_are_drawn_as_gpt2s_are(start: tuple[Path, Path]) -> None:
    model = GPT2LMHeadModel.from_pretrained(start[0])
    for name, value in model.named_parameters():
        if name.endswith("c_proj.weight"):
            assert float(value.detach().std()) == pytest.approx(0.02 / math.sqrt(2 * MEASURES["n_layer"]), rel=0.1)  # type: ignore[operator]
        elif ".ln_" in name and name.endswith("weight"):
            assert bool((value == 1).all())
        elif name.endswith("bias"):
            assert bool((value == 0).all())
        else:
            assert float(value.detach().std()) == pytest.approx(0.02, rel=0.1)


SIGNS = "张三在山上饮酒。，Hello <>0x41eod/unk 世界🐼👨\u200d👩\u200d👧é\u0301ß\r\n\t \u3000\x00\ufeff"


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(SIGNS, max_size=60) | st.text(max_size=40))
def test_pieces_found_in_the_texts_are_sentencepieces_here_and_in_transformers(
    readers: tuple[Any, Any, Any], text: str
) -> None:
    ours, theirs, pieces = readers
    assume("<eod>" not in text)  # transformers takes it for the mark
    ids = ours.encode(text)
    assert ids == theirs.encode(text) == pieces.encode(text)
    if SPACE not in text:  # as sentencepiece writes a blank
        assert ours.decode(ids) == theirs.decode(ids) == text


@pytest.fixture(scope="module")
def readers(start: tuple[Path, Path]) -> tuple[Any, Any, Any]:
    processor = SentencePieceProcessor(model_file=str(start[0] / "tokenizer.model"))
    return load_tokenizer(start[0]), AutoTokenizer.from_pretrained(start[0]), processor


def test_a_mark_that_somebody_wrote_is_letters_and_a_byte_is_no_byte(readers: tuple[Any, Any, Any]) -> None:
    ours, theirs, _ = readers
    for text in ("<eod>", "<unk>", "<0x41>", "a<eod>b"):
        ids = ours.encode(text)
        assert ours.decode(ids) == text and 1 not in ids
    assert ours.encode_special("a<eod>") == theirs.encode("a<eod>") == [*ours.encode("a"), 1]
    assert theirs.eos_token == "<eod>" and theirs.eos_token_id == 1


def test_words_are_found_again_the_same_and_no_more_than_were_asked_for(
    start: tuple[Path, Path], tmp_path: Path
) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(MEASURES))
    make_start("train:500", config, [str(start[1])], 7, tmp_path / "again")
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (start[0] / "tokenizer.json").read_bytes()
    count = len(AutoTokenizer.from_pretrained(start[0]))
    assert 256 < count == GPT2LMHeadModel.from_pretrained(start[0]).config.vocab_size <= 500


@pytest.mark.parametrize("number", [300, 301, 400, 5000])
def test_any_number_of_words_holds_the_commonest_signs_and_whole_words(tmp_path: Path, number: int) -> None:
    config, texts = tmp_path / "config.json", novel(tmp_path / "novels")
    config.write_text(json.dumps(MEASURES))
    make_start(f"train:{number}", config, [str(texts)], 7, tmp_path / "base")
    ours = load_tokenizer(tmp_path / "base")
    assert ours.vocab_size <= number and len(ours.encode("。")) == 1
    assert ours.decode(ours.encode("张三在山上饮酒。")) == "张三在山上饮酒。"
    if number > 400:
        assert len(ours.encode("张三在山上饮酒。")) < 8


def test_pairs_of_bytes_are_read_alike_here_and_by_transformers(start: tuple[Path, Path], tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(MEASURES))
    make_start("train-bpe:500", config, [str(start[1])], 7, tmp_path / "base")
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path / "base"), load_tokenizer(tmp_path / "base")
    for text in ("张三在山上饮酒。", "Hello, 世界 🐼\n", "   \t"):
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == text
    assert theirs.eos_token == "<eod>" and 256 < len(theirs) <= 500
    assert not (tmp_path / "base" / "tokenizer.model").exists()


def test_by_itself_no_token_is_lost_and_every_line_ends(start: tuple[Path, Path]) -> None:
    side = load_prompt_side(start[0])
    dataset = read_dataset([str(start[1])], DataOptions(max_length=64), side)
    lines = [line for line in (start[1] / "one.txt").read_text().splitlines() if line]
    whole = [[*side.tokenizer.encode(line), side.prompt.stop_ids[0]] for line in lines]
    assert sum(len(example.ids) for example in dataset.examples) == sum(map(len, whole))
    assert dataset.facts.stopped == len(lines)
    assert max(map(len, whole)) > 64


@pytest.mark.parametrize("stride", [1, 13, 40, 63])
def test_windows_that_overlap_learn_every_token_once_behind_what_came_before_it(
    start: tuple[Path, Path], stride: int
) -> None:
    side = load_prompt_side(start[0])
    dataset = read_dataset([str(start[1])], DataOptions(max_length=64, stride=stride), side)
    whole = [
        [*side.tokenizer.encode(line), side.prompt.stop_ids[0]]
        for line in (start[1] / "one.txt").read_text().splitlines()
        if line
    ]
    learned: dict[str, list[int]] = {}
    for example in dataset.examples:
        learned.setdefault(str(example.place), []).extend(
            token for token, counts in zip(example.ids, example.learned, strict=True) if counts
        )
        assert len(example.ids) <= 64
    assert list(learned.values()) == [ids[1:] for ids in whole]  # the first of a line is predicted from nothing
    facts = dataset.facts
    assert facts.repeated == facts.tokens - sum(map(len, whole)) > 0
    assert any(f"{facts.repeated:,} tokens come again, as context" in line for line in lines(facts))


def test_windows_of_the_original_that_overlap_learn_what_stands_in_two_of_them_in_both() -> None:
    """preprocess.py of yangjianxin1/CPM: windows every `step` tokens, a later one only while its end + 50 < length."""
    for length in (10, 200, 251, 451, 1000):
        expected, begin, end = [(0, min(200, length))], 80, 280
        while end + 50 < length:
            expected.append((begin, end))
            begin, end = begin + 80, end + 80
        assert list(cpm_windows(length, 200, 80)) == expected


def test_the_original_with_a_stride_counts_what_it_learns_again(shared: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(MEASURES))
    make_start(str(shared / "tokenizers" / "cpm-gpt2"), config, [], 1, tmp_path / "base")
    side = load_prompt_side(tmp_path / "base")
    (tmp_path / "long.txt").write_text("".join(f"张三在山上饮酒{number}杯。" for number in range(150)))
    facts = read_dataset([str(tmp_path / "long.txt")], DataOptions(like="cpm", stride=80), side).facts
    assert facts.repeated > 0 and facts.tokens == facts.whole - facts.taken + facts.repeated
    assert any("and are learned again" in line for line in lines(facts))


@pytest.mark.parametrize("options", [{"stride": 65}, {"stride": 0}, {"like": "cpm", "stride": 201}])
def test_a_stride_that_would_skip_tokens_is_refused(start: tuple[Path, Path], options: dict[str, Any]) -> None:
    chosen = DataOptions(max_length=None if "like" in options else 64, **options)
    with pytest.raises(Usage, match="cannot begin every"):
        read_dataset([str(start[1])], chosen, load_prompt_side(start[0]))


def test_the_windows_of_the_original_are_those_of_the_facts() -> None:
    lengths = [120, 200, 201, 250, 251, 450, 451, 650, 651, 1000]
    found = [list(cpm_windows(length, 200, 200)) for length in lengths]
    assert [len(windows) for windows in found] == [1, 1, 1, 1, 1, 1, 2, 2, 3, 4]
    lost = [n - sum(end - begin for begin, end in windows) for n, windows in zip(lengths, found, strict=True)]
    assert lost == [0, 0, 1, 50, 51, 250, 51, 250, 51, 200]


def test_the_vocabulary_of_cpm_is_taken_from_its_folder(shared: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(MEASURES))
    make_start(str(shared / "tokenizers" / "cpm-gpt2"), config, [], 1, tmp_path / "base")
    side = load_prompt_side(tmp_path / "base")
    assert side.checkpoint.spec.vocab_size == 30_000
    assert side.prompt.stop_ids[0] == 7
    texts = novel(tmp_path / "novels")
    facts = read_dataset([str(texts)], DataOptions(like="cpm"), side).facts
    assert facts.stopped < facts.documents  # <eod> of a long line is lost, and told


@pytest.mark.parametrize(
    ("change", "words", "match"),
    [
        ({"model_type": "llama"}, "train:500", "only a GPT-2"),
        ({"vocab_size": 100}, "train:500", "words"),
        ({"n_head": 7}, "train:500", "makes no GPT-2"),
        ({}, "/nowhere", "no vocabulary"),
        ({}, "train:299", "too few"),
    ],
)
def test_what_makes_no_model_is_refused_and_leaves_nothing(
    tmp_path: Path, change: dict[str, Any], words: str, match: str
) -> None:
    config, texts = tmp_path / "config.json", novel(tmp_path / "novels", 10)
    config.write_text(json.dumps({**MEASURES, **change}))
    with pytest.raises(Usage, match=match):
        make_start(words, config, [str(texts)], 1, tmp_path / "base")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "novels"]
