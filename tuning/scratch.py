"""A GPT-2 that knows nothing yet: its words, its measures, and the first numbers, as a folder that then learns.

The words are those of a folder (CPM's chinese_vocab.model, tokenizer.json, vocab.json and merges.txt), or are found
in the texts, ended by `<eod>`: pieces by sentencepiece (Kudo 2018), as CPM's own were, or pairs of bytes, as GPT-2's
own (Sennrich et al. 2016). The first numbers are those
of transformers: a deviation of 0.02, and what is added to the residual divided by the root of 2 * layers (Radford et
al. 2019).
"""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from glmchat.core.errors import Usage
from glmchat.core.files import open_file, read_file
from glmchat.core.json_files import small_json
from glmchat.core.language import tr
from glmchat.core.text import one_line
from glmchat.engine.tokenizers.base import SPACE
from glmchat.engine.tokenizers.hf import load_byte_pairs, load_tokenizer_json
from glmchat.tuning.checking import no_gpt2, read_gpt2
from glmchat.tuning.sources import find_sources
from glmchat.tuning.state import replace_folder

END = "<eod>"
TRAINED = re.compile(r"train(-bpe)?:(\d{3,6})")
_FILES = (
    "chinese_vocab.model", "spiece.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "tokenizer.model", "vocab.json", "merges.txt",
)  # fmt: skip
_CPM_WORDS, _CPM_END = 30_000, 7
_MOST = 16 << 20  # bytes of text that words are looked for in: about a minute of one core
_FEWEST, _FIXED = 300, 261  # pieces: 256 of them are the bytes; those that no text is asked for
_ALONE = ("<", "\n")  # pieces that are part of no other
_COVERED = 0.9995  # of all characters, by a piece of their own; the others are written as bytes


def make_start(words: str, config: Path, data: Sequence[str], seed: int, folder: Path) -> None:
    """Write the model that learns into `folder`, which then is whole.

    words: "train:N", "train-bpe:N", or a folder. config: a config.json of GPT-2; what it leaves out is GPT-2's own.
    Raises Usage for a configuration of another network, or of another number of words than there are; Damaged for one
    that is no JSON.
    """
    given = read_gpt2(config)
    replace_folder(folder, folder.with_name(f".{folder.name}"), lambda beside: _write(words, given, data, seed, beside))


def _write(words: str, given: dict[str, Any], data: Sequence[str], seed: int, folder: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    if (asked := TRAINED.fullmatch(words)) is not None:
        count, end = (_find_pairs if asked[1] else _find_pieces)(int(asked[2]), data, folder)
    else:
        count, end = _bring_words(Path(words), folder)
    own = {name: value for name, value in given.items() if name not in ("auto_map", "architectures")}
    if own.setdefault("vocab_size", count) < count:
        raise Usage(
            tr("the configuration has {rows:,} words, and the vocabulary {count:,}", rows=own["vocab_size"],
               count=count),
            hint=tr("leave out vocab_size: it is then that of the vocabulary"),
            code="tune.config",
        )  # fmt: skip
    own |= {"bos_token_id": end, "eos_token_id": end}
    try:
        shape = GPT2Config(**own)
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(shape)
    except (TypeError, ValueError, RuntimeError) as error:
        raise no_gpt2(str(error)) from None
    model.save_pretrained(folder)


def _bring_words(source: Path, folder: Path) -> tuple[int, int]:
    """Copy the vocabulary of a folder. Returns its number of words, and the one that ends a text."""
    found = [source / name for name in _FILES if (source / name).is_file()]
    for path in found:
        (folder / path.name).write_bytes(read_file(path))
    names = {path.name for path in found}
    if names & {"chinese_vocab.model", "spiece.model"}:
        return _CPM_WORDS, _CPM_END
    if not names & {"tokenizer.json", "vocab.json"}:
        raise Usage(
            tr("{path} has no vocabulary", path=one_line(str(source), 200)),
            hint=tr("a folder with chinese_vocab.model, tokenizer.json or vocab.json and merges.txt; or train:8000"),
            code="tune.words",
        )
    words = load_tokenizer_json(folder) if "tokenizer.json" in names else load_byte_pairs(folder, "GPT2Tokenizer")
    own = small_json(folder / "tokenizer_config.json").get("eos_token")
    own = own.get("content") if isinstance(own, dict) else own
    ends = (words.controls[name] for name in (own, END, "<|endoftext|>", "</s>") if name in words.controls)
    return words.vocab_size, next(ends, words.vocab_size - 1)


def _find_pieces(count: int, data: Sequence[str], folder: Path) -> tuple[int, int]:
    """A sentencepiece model, and beside it the same as a tokenizer.json, which transformers and the chat read.

    One thread: more of them add in another order, and the same texts would give other pieces.
    """
    from sentencepiece import SentencePieceTrainer
    from sentencepiece import sentencepiece_model_pb2 as proto
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

    if count < _FEWEST:
        raise Usage(
            tr("{count} words are too few: 256 of them are the bytes", count=count),
            hint=tr("train:{fewest} or more", fewest=_FEWEST),
            code="tune.words",
        )
    rare = _rare(_texts(data), (count - _FIXED) // 2)  # as many are left for words of several signs
    common = (part for line in _texts(data) for part in line.translate(rare).splitlines())
    written = io.BytesIO()
    try:
        SentencePieceTrainer.train(  # texts as they are: no blank is added, folded or lost, no character exchanged
            sentence_iterator=common, model_writer=written, vocab_size=count, model_type="unigram", byte_fallback=True,
            character_coverage=1.0, required_chars=SPACE, normalization_rule_name="identity", add_dummy_prefix=False,
            remove_extra_whitespaces=False, unk_id=0, eos_id=1, eos_piece=END, bos_id=-1, pad_id=-1,
            user_defined_symbols=list(_ALONE), hard_vocab_limit=False, num_threads=1, max_sentence_length=1 << 20,
            minloglevel=2,
        )  # fmt: skip
    except (RuntimeError, OSError, ValueError) as error:
        raise Usage(
            tr(
                "sentencepiece finds no {count} words in these texts: {error}",
                count=count,
                error=one_line(str(error), 160),
            ),
            hint=tr("ask for another number, or for pairs of bytes: train-bpe:{count}", count=count),
            code="tune.words",
        ) from None
    (folder / "tokenizer.model").write_bytes(written.getvalue())
    model = proto.ModelProto()
    model.ParseFromString(written.getvalue())
    pieces = [(piece.piece, piece.score) for piece in model.pieces]
    words = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    words.normalizer = normalizers.Replace(" ", SPACE)
    # Apart from what follows it no sign of a byte (<0x41>) and no control piece is found where a person wrote it.
    words.pre_tokenizer = pre_tokenizers.Split(_ALONE[0], "isolated")
    words.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    words.add_special_tokens([AddedToken(END, normalized=False)])
    return _keep(words, folder)


def _rare(lines: Iterator[str], most: int) -> dict[int, str]:
    """The signs that get no piece of their own, as a table that cuts a text there: beyond the `most` commonest, and
    the rarest of all."""
    letters = Counter[str]()
    for line in lines:
        letters.update(line)
    kept, total = 0, letters.total()
    table = {}
    for number, (letter, times) in enumerate(letters.most_common()):
        if number >= most or kept >= _COVERED * total:
            table[ord(letter)] = "\n"
        kept += times
    return table


def _find_pairs(count: int, data: Sequence[str], folder: Path) -> tuple[int, int]:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    words = Tokenizer(models.BPE())
    marks = pre_tokenizers.Split(Regex("[。，、！？；：…—“”‘’（）《》]"), "isolated")
    words.pre_tokenizer = pre_tokenizers.Sequence([marks, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    words.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=count, special_tokens=[END], initial_alphabet=alphabet, show_progress=False, max_token_length=16
    )
    words.train_from_iterator(_texts(data), trainer)
    return _keep(words, folder)


def _keep(words: Any, folder: Path) -> tuple[int, int]:
    """words: of the tokenizers library. Returns how many there are, and which one ends a text."""
    words.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(about), encoding="utf-8")
    return words.get_vocab_size(), cast(int, words.token_to_id(END))


def _texts(data: Sequence[str]) -> Iterator[str]:
    """The lines of the files, from each of them the same share of what is looked at."""
    sources = find_sources(data)
    for source in sources:
        left = _MOST // len(sources)
        with open_file(source.path) as file:
            while left > 0 and (line := file.readline(1 << 16)):
                left -= len(line)
                yield line.decode("utf-8", "replace")
