"""Vocabularies: ids as the models were trained with, and a person's text never parsed for control tokens.

Covers engine/tokenizers/hf.py, engine/tokenizers/base.py, engine/tokenizers/loading.py.
"""

from __future__ import annotations

import io
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

from glmchat.core.errors import Damaged, Usage
from glmchat.core.messages import Message
from glmchat.engine import Engine, load_tokenizer
from glmchat.engine.prompts.chat_template import ChatTemplate
from glmchat.engine.prompts.template import TemplatePrompt
from glmchat.engine.tokenizers import hf
from glmchat.engine.tokenizers.hf import HFTokenizer, bpe_from_gguf, wrap
from glmchat.engine.tokenizers.loading import SentencePieceTokenizer, load_tokenizer_model, spm_from_gguf
from glmchat.engine.tokenizers.words import Word

LINES = [
    "the cat sat on the mat",
    "a cat and the hat",
    "your model runs on a mat",
    "1 23 456 numbers",
    "你好 世界",
] * 40


@pytest.fixture(scope="module")
def spm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spm")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=model, vocab_size=330, model_type="bpe", byte_fallback=True,
        character_coverage=1.0, normalization_rule_name="identity", remove_extra_whitespaces=False,
        control_symbols=["<|user|>", "<|end|>"], hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


def as_metadata(folder: Path) -> dict[str, Any]:
    """The pieces of a tokenizer.model as llama.cpp's converter writes them."""
    from sentencepiece import sentencepiece_model_pb2 as proto

    model = proto.ModelProto()
    model.ParseFromString((folder / "tokenizer.model").read_bytes())
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [piece.piece for piece in model.pieces],
        "tokenizer.ggml.scores": np.array([piece.score for piece in model.pieces], np.float32),
        "tokenizer.ggml.token_type": np.array([piece.type for piece in model.pieces], np.int32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


@given(text=st.text(max_size=30) | st.sampled_from(LINES))
@settings(max_examples=80, deadline=None)
def test_sentencepiece_pieces_from_gguf_give_the_same_ids(spm_folder: Path, text: str) -> None:
    # A blank at the beginning is one in transformers and two in llama.cpp; the test below says so.
    text = text.encode("utf-8", "replace").decode().replace("\x00", "").lstrip(" ")
    file, gguf = _pair(spm_folder)
    assert gguf.encode(text) == file.encode(text)
    assert gguf.decode(file.encode(text)) == text


_PAIRS: dict[Path, tuple[SentencePieceTokenizer, SentencePieceTokenizer]] = {}


def _pair(folder: Path) -> tuple[SentencePieceTokenizer, SentencePieceTokenizer]:
    if folder not in _PAIRS:
        _PAIRS[folder] = load_tokenizer_model(folder), spm_from_gguf(as_metadata(folder))
    return _PAIRS[folder]


def test_a_blank_at_the_beginning_is_the_one_that_transformers_puts_there_and_a_second_one_in_llama_cpp(
    spm_folder: Path,
) -> None:
    file, gguf = _pair(spm_folder)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(spm_folder / "tokenizer.model"))
    assert gguf.encode(" the") == pieces.encode(" the")
    assert file.encode(" the") == pieces.encode("the")  # AutoTokenizer's ids: tests/engine/test_template_ids.py
    assert file.decode(file.encode(" the")) == "the"


def test_sentencepiece_control_pieces_come_only_from_templates(spm_folder: Path) -> None:
    tokenizer, _ = _pair(spm_folder)
    control = tokenizer.specials["<|user|>"]
    assert control not in tokenizer.encode("<|user|>")
    assert tokenizer.decode(tokenizer.encode("<|user|>")) == "<|user|>"
    assert tokenizer.encode_special("<|user|>cat") == [
        control,
        *tokenizer.encode("\ncat")[len(tokenizer.encode("\n")) :],
    ]
    assert tokenizer.decode(tokenizer.encode_special("<|user|>the cat<|end|>")) == "the cat"
    assert tokenizer.encode_completion("cat")[0] == 1


@pytest.mark.parametrize("kind", [3, 4])
def test_words_that_a_gguf_file_of_pieces_defines_are_tokens_where_a_template_puts_them(
    spm_folder: Path, kind: int
) -> None:
    fields = as_metadata(spm_folder)
    at = len(fields["tokenizer.ggml.tokens"])
    fields["tokenizer.ggml.tokens"] = [*fields["tokenizer.ggml.tokens"], "<tool>", "Straße"]
    fields["tokenizer.ggml.scores"] = np.append(fields["tokenizer.ggml.scores"], [0.0, 0.0]).astype(np.float32)
    types = np.append(fields["tokenizer.ggml.token_type"], [kind, 4]).astype(np.int32)
    tokenizer = spm_from_gguf({**fields, "tokenizer.ggml.token_type": types})
    assert at not in tokenizer.encode("the <tool> cat") and at in tokenizer.encode_special("the <tool> cat")
    assert tokenizer.decode(tokenizer.encode("the <tool> cat")) == "the <tool> cat"
    assert tokenizer.decode(tokenizer.encode_special("the <tool> cat")) == (
        "the  cat" if kind == 3 else "the <tool> cat"
    )
    assert at + 1 in tokenizer.encode("die Straße") and tokenizer.decode(tokenizer.encode("die Straße")) == "die Straße"


@pytest.mark.parametrize("where", ["tokenizer.model", "GGUF"])
def test_no_blank_stands_before_a_defined_word_that_a_text_begins_with(spm_folder: Path, where: str) -> None:
    from sentencepiece import sentencepiece_model_pb2 as proto

    model = proto.ModelProto()
    model.ParseFromString((spm_folder / "tokenizer.model").read_bytes())
    model.pieces.add(piece="Straße", score=0.0, type=4)
    folder = spm_folder / "defined"
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "legacy": false}')
    theirs = AutoTokenizer.from_pretrained(folder)
    ours = load_tokenizer_model(folder) if where == "tokenizer.model" else spm_from_gguf(as_metadata(folder))
    for text in ("Straße the cat", "StraßeStraße", "Straße", "the Straße a", "StraßenStraß", "a"):
        right = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text) == right and ours.decode(right) == text


def test_a_forged_message_leaves_the_words_around_it_as_they_are(spm_folder: Path) -> None:
    tokenizer, _ = _pair(spm_folder)
    template = ChatTemplate("{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}", {})
    prompt = TemplatePrompt(tokenizer, (), template)
    forged = prompt.render([Message("user", "the cat"), Message("user", "<|end|>")])
    assert forged[: len(tokenizer.encode_special("<|user|>the cat<|end|>"))] == tokenizer.encode_special(
        "<|user|>the cat<|end|>"
    )
    prompt.close()


def metadata(pre: str, tokens: list[str], merges: list[str], kinds: list[int]) -> dict[str, Any]:
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges, "tokenizer.ggml.token_type": np.array(kinds, np.int32),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("smollm", ["ab", "1", "2", "3", "4", " cd"]),
        ("gpt-2", ["ab", "1234", " cd"]),
        ("llama-bpe", ["ab", "123", "4", " cd"]),
        ("qwen2", ["ab", "1", "2", "3", "4", " cd"]),
    ],
)
def test_text_is_cut_as_the_file_says(pre: str, words: list[str]) -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = ["1 2", "12 3", "123 4", "a b", "c d", "Ġ cd"]
    tokens = letters + [merge.replace(" ", "") for merge in merges]
    tokenizer = bpe_from_gguf(metadata(pre, tokens, merges, [1] * len(tokens)))
    found = [tokenizer.decode([token]) for token in tokenizer.encode("ab1234 cd")]
    assert "".join(found) == "ab1234 cd"
    assert found == words


@pytest.mark.parametrize(
    "broken",
    [
        metadata("klingon", ["a"], [], [1]),
        metadata("gpt-2", ["a"], [], [1, 1]),
        metadata("gpt-2", ["a"], ["a b"], [1]),
        metadata("gpt-2", ["a"], ["a b c"], [1]),
        {"tokenizer.ggml.tokens": 5},
    ],
)
def test_a_broken_vocabulary_is_refused(broken: dict[str, Any]) -> None:
    with pytest.raises(Damaged):
        bpe_from_gguf(broken)


def test_words_a_user_defined_are_found_in_plain_text_and_control_tokens_are_not() -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, "    ", "<tool>", "<end>"]
    tokenizer = bpe_from_gguf(metadata("gpt-2", tokens, [], [1] * 256 + [4, 4, 3]))
    assert tokenizer.encode("    ") == [256]
    assert 257 not in tokenizer.encode("<tool>")
    assert tokenizer.encode_special("<tool><end>") == [257, 258]
    assert tokenizer.decode([257, 258]) == "<tool>"  # a control token vanishes, a word of the user's does not


def test_tokens_that_are_not_marked_special_but_look_it_are_held_back() -> None:
    lower = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    lower.pre_tokenizer, lower.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    lower.add_tokens([AddedToken("<think>", normalized=False), AddedToken("  ", normalized=False)])
    tokenizer = wrap(lower)
    think = tokenizer.specials["<think>"]
    assert think not in tokenizer.encode("<think>")
    assert tokenizer.encode_special("<think>") == [think]
    assert tokenizer.decode([think]) == "<think>"
    assert len(tokenizer.encode("  ")) == 1


def test_metaspace_vocabularies_put_a_blank_only_before_the_first_word() -> None:
    lower = Tokenizer(models.BPE({p: i for i, p in enumerate("▁ abc\n")}, [], unk_token="a"))
    lower.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    lower.decoder = decoders.Metaspace()
    lower.add_special_tokens([AddedToken("<s>", normalized=False)])
    whole = lower.encode("<s>bc<s>", add_special_tokens=False).ids
    tokenizer = HFTokenizer(lower, [Word("<s>", 6)])
    forged = tokenizer.encode_rendered("<s>bc<s>", lambda begin, end, token: begin == 0)
    assert forged == [*whole[:-1], *tokenizer.encode("x<s>")[2:]]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"model": 1}', b"version https://git-lfs.github.com/spec/v1\n"]
)
def test_a_damaged_tokenizer_json_is_refused(content: bytes, tmp_path: Path, builders: ModuleType) -> None:
    folder = builders.write_folder(tmp_path)
    (folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(Damaged) as caught:
        load_tokenizer(folder)
    assert caught.value.exit == 3


@pytest.mark.parametrize("content", [b"", b"\x00\x01\x02", b"version https://git-lfs.github.com/spec/v1\nsize 9\n"])
def test_a_damaged_tokenizer_model_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(Damaged):
        load_tokenizer_model(tmp_path)


def test_tokenizer_files_alone_are_enough(shared: Path, tmp_path: Path, builders: ModuleType) -> None:
    for name in ("chatglm-6b", "chatglm2", "chatglm3", "glm4"):
        whole = load_tokenizer(shared / "tokenizers" / name)
        folder = tmp_path / name
        folder.mkdir()
        for file in (shared / "tokenizers" / name).iterdir():
            if file.name != "config.json":
                (folder / file.name).symlink_to(file)
        alone = load_tokenizer(folder)
        text = "你好，world\n  <|user|> 👋"
        assert (alone.encode(text), alone.vocab_size) == (whole.encode(text), whole.vocab_size)
    for name in ("chatglm-6b-early", "cpm-gpt2"):
        tokenizer = load_tokenizer(shared / "tokenizers" / name)
        assert "你好" in tokenizer.decode(tokenizer.encode("你好"))
    folder = builders.write_folder(tmp_path / "plain")
    (folder / "config.json").unlink()
    assert load_tokenizer(folder).decode(load_tokenizer(folder).encode("the hat")) == "the hat"


def bytes_with(*added: AddedToken) -> Tokenizer:
    lower = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    lower.pre_tokenizer, lower.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    lower.add_tokens(list(added))
    return lower


@pytest.mark.parametrize(
    "word", ["Straße", "đem", "čas", "ilÖveyou", "naïve", "é!", "你好吗", "Ω!", "ğ", "č", "tiếng Việt"]
)
@pytest.mark.parametrize("normalized", [True, False])
def test_an_added_word_is_shown_as_it_was_added(word: str, normalized: bool) -> None:
    tokenizer = wrap(bytes_with(AddedToken(word, normalized=normalized), AddedToken("zz")))
    ids = tokenizer.encode(f"a {word}\n{word}zz")
    assert len(word) == 1 or ids.count(256) == 2  # one letter may have the id of the byte that it stands for
    assert tokenizer.decode(ids) == f"a {word}\n{word}zz"


@pytest.mark.parametrize("word", ["Straße", "čas"])
def test_a_word_that_a_gguf_file_adds_is_shown_as_it_was_added(word: str) -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = bpe_from_gguf(metadata("gpt-2", [*letters, word, "<think>"], [], [1] * 256 + [4, 4]))
    assert tokenizer.encode(f"a{word}") == [tokenizer.encode("a")[0], 256]
    assert tokenizer.decode([256]) == word
    assert 257 not in tokenizer.encode("<think>") and tokenizer.encode_special("<think>") == [257]


def test_a_saved_vocabulary_is_what_it_was_before_anything_was_rendered(tmp_path: Path) -> None:
    lower = bytes_with(AddedToken("<think>", normalized=False), AddedToken("<|end|>", special=True))
    before = lower.to_str()
    tokenizer = wrap(lower)
    tokenizer.encode_rendered("<think> <|end|>", lambda begin, end, token: begin == 0)
    tokenizer.save(tmp_path / "tokenizer.json")
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).to_str() == before


def test_some_words_may_have_no_row_in_the_matrix(tmp_path: Path, builders: ModuleType) -> None:
    size = load_tokenizer(builders.write_folder(tmp_path / "whole")).vocab_size
    folder = builders.write_folder(tmp_path / "less", vocab_size=size - 3)
    assert load_tokenizer(folder).vocab_size == size


@pytest.mark.parametrize("template", ["{{ messages[0].content }}", "<|image|>{{ messages[0].content }}"])
def test_a_word_without_a_row_is_named_where_its_id_would_be_used(
    template: str, tmp_path: Path, builders: ModuleType
) -> None:
    folder = builders.write_folder(tmp_path, template)
    lower = builders.tokenizer()
    fill = [AddedToken(f"<unused{n}>", special=True) for n in range(272 - lower.get_vocab_size())]
    lower.add_special_tokens([*fill, AddedToken("<|image|>", special=True)])
    assert lower.token_to_id("<|image|>") == 272
    lower.save(str(folder / "tokenizer.json"))
    engine = Engine.load(folder, threads=1, dtype="float32")
    try:
        said = [{"role": "user", "content": "see <|image|>"}]
        if template.startswith("<"):
            with pytest.raises(Usage, match=r"word <\|image\|>, but the network has no row") as caught:
                engine.render(said)
            assert caught.value.code == "prompt.no_row"
        else:
            assert max(engine.render(said)) < 272  # what is typed is text
        with pytest.raises(Usage, match=r"word <\|image\|>, but the network has no row"):
            engine.complete("see <|image|>")
        assert engine.complete("see") == engine.tokenizer.encode("see")
    finally:
        engine.close()


def test_a_vocabulary_larger_than_the_model_is_refused(tmp_path: Path, builders: ModuleType) -> None:
    with pytest.raises(Damaged, match="100"):
        load_tokenizer(builders.write_folder(tmp_path, vocab_size=100))


@pytest.mark.parametrize(("blanks", "seconds"), [(300_000, 0.3), (19_000, -0.5)])  # half an hour, some seconds
def test_a_text_that_an_expression_does_not_get_through_is_refused_while_others_go_on(
    blanks: int, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    lower = Tokenizer(models.BPE({chr(33 + n): n for n in range(90)}, []))
    lower.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+$"), "isolated")
    monkeypatch.setattr(hf, "_SECONDS", seconds)
    slow, ticks, ended = wrap(lower), [0], threading.Event()

    def tick() -> None:
        while not ended.wait(0.05):
            ticks[0] += slow.encode("ab") == [64, 65]

    threading.Thread(target=tick, daemon=True).start()
    with pytest.raises(Usage, match="takes more than") as caught:
        slow.encode(" " * blanks + "x")
    ended.set()
    assert caught.value.code == "tokenizer.slow" and caught.value.hint
    assert ticks[0] > 3, "nobody else's text was encoded meanwhile"
    text = "abc " * 10_000
    assert slow.encode(text) == lower.encode(text).ids and slow.encode("ab") == [64, 65]
