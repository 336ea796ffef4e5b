"""A vocabulary is read in a process of its own first: what its reader does not survive is a sentence, and what is known
costs a hash.

The vocabularies are written by the libraries that read them, and then spoilt.

Covers engine/tokenizers/trial.py.
"""

from __future__ import annotations

import json
import os
import resource
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import weights_of
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from glmchat.checkpoints import vocabulary_trial
from glmchat.checkpoints.fit import check_folder
from glmchat.checkpoints.vocabulary_trial import try_vocabulary
from glmchat.core import locations
from glmchat.core.errors import Damaged
from glmchat.core.sandbox import Sandbox
from glmchat.engine import load_tokenizer
from glmchat.engine.tokenizers.hf import load_tokenizer_json


def plain() -> Tokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({text: index for index, text in enumerate(letters)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken("<|end|>", normalized=False)])
    return made


def normalised(*steps: Any) -> dict[str, Any]:
    made = plain()
    made.normalizer = normalizers.Sequence(list(steps))
    return dict(json.loads(made.to_str()))


def split(expression: str) -> dict[str, Any]:
    made = plain()
    made.pre_tokenizer = pre_tokenizers.Split(Regex(expression), "isolated")
    return dict(json.loads(made.to_str()))


def changed(**parts: Any) -> dict[str, Any]:
    return {**json.loads(plain().to_str()), **parts}


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {"type": "NFC"}
    for _ in range(depth):
        value = {"type": "Sequence", "normalizers": [value]}
    return changed(normalizer=value)


def write(folder: Path, data: object) -> Path:
    folder.mkdir(exist_ok=True)
    text = data if isinstance(data, str) else json.dumps(data)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    return folder


def padding(size: int, multiple: int | None = None) -> dict[str, Any]:
    return {"strategy": {"Fixed": size}, "direction": "Right", "pad_to_multiple_of": multiple, "pad_id": 0,
            "pad_type_id": 0, "pad_token": "[PAD]"}  # fmt: skip


def cut(length: int, stride: int) -> dict[str, Any]:
    return {"direction": "Right", "max_length": length, "strategy": "LongestFirst", "stride": stride}


REFUSED: dict[str, Callable[[], Any]] = {
    "a letter becomes a million": lambda: normalised(
        normalizers.Replace("a", "b" * 4000), normalizers.Replace("b", "c" * 4000)),
    "forty times twice as long": lambda: normalised(*[normalizers.Replace("龘", "龘龘") for _ in range(40)]),
    "a word of a megabyte before each text": lambda: normalised(normalizers.Prepend("x" * 10**6)),
    "an expression of a megabyte": lambda: split("a" * 10**6),
    "an expression that never ends": lambda: split(r"(\p{L}+)+\d"),
    "an expression that never ends on one letter": lambda: split(r"(q+)+#"),
    "nested deeply": lambda: nested(60),
    "nested beyond the reader's own bound": lambda: '{"normalizer":' + "[" * 100_000,
    "ten thousand steps": lambda: normalised(*[normalizers.NFC() for _ in range(10_000)]),
    "a broken table of characters": lambda: changed(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    "a template that names a missing token": lambda: changed(
        post_processor={"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "[X]", "type_id": 0}}],
                        "pair": [], "special_tokens": {}}),
    "no JSON": lambda: "{",
    "a list": lambda: "[]",
    "no model": lambda: changed(model=None),
    "an unknown model": lambda: changed(model={"type": "Other"}),
    "merges of unknown words": lambda: changed(model={"type": "BPE", "vocab": {"a": 0}, "merges": [["x", "y"]]}),
    "a decoder that writes without measure": lambda: changed(
        decoder={"type": "Replace", "pattern": {"Regex": "."}, "content": "x" * 4096}),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_reader_survives_is_a_sentence(case: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "m", REFUSED[case]())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    spent = sum(os.times()[:4])
    with pytest.raises(Damaged) as told:
        try_vocabulary(folder)
    assert (told.value.code, told.value.exit, bool(told.value.hint)) == ("tokenizer.damaged", 3, True)
    assert "m" in told.value.message and "\n" not in told.value.message
    assert (
        sum(os.times()[:4]) - spent < 3.0
    )  # seconds of the processor, the start of a Python on a busy machine in them
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024


GOOD: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": lambda: changed(),
    "padded to a trillion": lambda: changed(padding=padding(10**12)),
    "padded to a multiple of 2^63": lambda: changed(padding=padding(64, 2**63)),
    "padded to a multiple of nothing": lambda: changed(padding=padding(64, 0)),
    "cut to nothing": lambda: changed(truncation=cut(0, 0)),
    "a stride over the length": lambda: changed(truncation=cut(5, 50)),
    "GPT-4's expression": lambda: split(r"(?i:'s|'t|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|\s+(?!\S)|\s+"),
    "SentencePiece's blanks": lambda: normalised(normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")),
    "other forms of letters": lambda: normalised(normalizers.NFKC(), normalizers.Lowercase()),
}  # fmt: skip


@pytest.mark.parametrize("case", GOOD)
def test_what_a_chat_does_not_use_is_switched_off_and_everything_else_is_read(case: str, tmp_path: Path) -> None:
    folder = write(tmp_path, GOOD[case]())
    try_vocabulary(folder)
    known = load_tokenizer_json(folder)
    bare = Tokenizer.from_file(str(folder / "tokenizer.json"))
    bare.no_padding()
    bare.no_truncation()
    assert known.encode("hello, you") == bare.encode("hello, you", add_special_tokens=False).ids


def test_another_order_of_the_keys_hides_nothing(tmp_path: Path) -> None:
    data = normalised(normalizers.Prepend("x" * 10**6))
    for order in (reversed(list(data)), ["model", *(key for key in data if key != "model")]):
        with pytest.raises(Damaged):
            try_vocabulary(write(tmp_path, {key: data[key] for key in order}))


def test_a_word_that_only_some_vocabularies_know_is_no_fault(tmp_path: Path) -> None:
    made = Tokenizer(models.WordLevel({"a": 0}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    try_vocabulary(tmp_path)
    with pytest.raises(Damaged):
        load_tokenizer_json(tmp_path).encode("unknown")


@pytest.mark.parametrize("name", ["chatglm-6b", "chatglm-6b-early", "chatglm2", "chatglm3", "cpm-gpt2", "glm4"])
def test_every_published_vocabulary_comes_through(name: str, shared: Path) -> None:
    try_vocabulary(shared / "tokenizers" / name)


def test_the_starter_model_comes_through(starter_model: Path) -> None:
    try_vocabulary(starter_model)


@pytest.mark.parametrize("name", ["tokenizer.model", "spiece.model"])
def test_bytes_that_are_no_sentencepiece_are_told(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\x0a\x05\x0a\x01a\x15\x00" * 50)
    with pytest.raises(Damaged):
        try_vocabulary(tmp_path)


def test_two_files_of_gpt2_are_tried(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "merges.txt").write_text("x y\n")
    with pytest.raises(Damaged):
        try_vocabulary(tmp_path)


class Started:
    """Counts the processes that are started."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0

        def start(module: str) -> Sandbox:
            self.count += 1
            return Sandbox(module)

        monkeypatch.setattr(vocabulary_trial, "Sandbox", start)
        self.forget()

    def forget(self) -> None:
        """As in a new process."""
        vocabulary_trial._try.cache_clear()


def test_a_vocabulary_is_tried_once_and_then_known_by_its_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, started = write(tmp_path / "a", changed(truncation=cut(7, 1))), Started(monkeypatch)
    notes = locations.cache_dir() / "vocabularies.json"
    notes.unlink(missing_ok=True)
    try_vocabulary(folder)
    assert started.count == 1 and stat.S_IMODE(notes.stat().st_mode) == 0o600
    started.forget()
    try_vocabulary(folder)
    try_vocabulary(write(tmp_path / "b", changed(truncation=cut(7, 1))))
    assert started.count == 1
    try_vocabulary(write(tmp_path / "b", changed(truncation=cut(8, 1))))
    assert started.count == 2


def test_of_verdicts_the_latest_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes = locations.cache_dir() / "vocabularies.json"
    locations.private_dir(notes.parent)
    notes.write_text(json.dumps({"good": [*map(str, range(5000)), 7, None]}))
    try_vocabulary(write(tmp_path, changed(truncation=cut(9, 1))))
    kept = json.loads(notes.read_text())["good"]
    assert len(kept) == vocabulary_trial._KEPT and "4999" in kept


@pytest.mark.parametrize("broken", ["", "[]", '{"good": 7}', "\0"])
def test_notes_that_are_broken_cost_another_trial(broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes = locations.cache_dir() / "vocabularies.json"
    locations.private_dir(notes.parent)
    notes.write_text(broken)
    started = Started(monkeypatch)
    try_vocabulary(write(tmp_path, changed(truncation=cut(10, 1))))
    assert started.count == 1 and len(json.loads(notes.read_text())["good"]) == 1


def test_a_refusal_is_not_believed_again_but_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, started = write(tmp_path, "{"), Started(monkeypatch)
    for _ in range(2):
        with pytest.raises(Damaged):
            try_vocabulary(folder)
    assert started.count == 2


def test_a_home_that_takes_no_files_costs_another_trial_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GLMCHAT_HOME", str(tmp_path / "file"))
    try_vocabulary(write(tmp_path / "m", changed(truncation=cut(11, 1))))


def test_a_panic_in_the_middle_of_a_chat_is_a_sentence(tmp_path: Path) -> None:
    known = load_tokenizer_json(write(tmp_path, split(r"(q+)+#")))
    assert known.encode("hello")
    with pytest.raises(Damaged, match="cannot encode this text"):
        known.encode("q" * 5000)
    assert known.encode("hello")


def test_a_folder_is_refused_before_an_engine_starts_and_by_the_engine(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", changed())
    config = {"model_type": "llama", "vocab_size": 257, "hidden_size": 8, "num_hidden_layers": 1,
              "num_attention_heads": 1, "intermediate_size": 8}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(weights_of(config))
    check_folder(folder)
    assert load_tokenizer(folder).encode("hi")
    write(folder, split(r"(\p{L}+)+\d"))
    for reader in (check_folder, load_tokenizer):
        with pytest.raises(Damaged, match="cannot encode this text"):
            reader(folder)


def test_a_folder_without_a_vocabulary_has_nothing_to_try(tmp_path: Path) -> None:
    try_vocabulary(tmp_path)


def test_a_post_processor_that_repeats_a_token_is_read(tmp_path: Path) -> None:
    made = plain()
    made.post_processor = processors.TemplateProcessing(single="<|end|> $A", special_tokens=[("<|end|>", 256)])
    made.save(str(tmp_path / "tokenizer.json"))
    try_vocabulary(tmp_path)
