"""The vocabulary of a GPT-2 folder in whichever form it is there: CPM's, tokenizer.json, vocab.json with merges."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer as Lower
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from glmchat.checkpoints.vocabularies import check_rows, vocabulary_file
from glmchat.checkpoints.weight_files import refuse_pointer
from glmchat.core.errors import Damaged
from glmchat.core.language import tr
from glmchat.core.text import one_line
from glmchat.engine.tokenizers.base import Tokenizer
from glmchat.engine.tokenizers.cpm import CPMTokenizer
from glmchat.engine.tokenizers.hf import HFTokenizer, load_tokenizer_json

_CPM_FILES = ("chinese_vocab.model", "spiece.model")
_END = "<|endoftext|>"


def load_gpt2_tokenizer(folder: Path, rows: int) -> Tokenizer:
    """Raises Damaged if there is no vocabulary, it is damaged, or has ids that the network has no rows for."""
    tokenizer: Tokenizer
    path = next((folder / name for name in _CPM_FILES if (folder / name).is_file()), None)
    if path is not None:
        tokenizer = CPMTokenizer(path)
    elif (folder / "tokenizer.json").is_file():
        path = folder / "tokenizer.json"
        tokenizer = load_tokenizer_json(folder)
    elif (folder / "merges.txt").is_file():
        path = vocabulary_file(folder, "vocab.json", "GPT-2")
        tokenizer = _byte_pairs(path, folder / "merges.txt")
    else:
        path = vocabulary_file(folder, "chinese_vocab.model", "CPM's GPT-2")
        tokenizer = CPMTokenizer(path)
    check_rows(path, tokenizer.vocab_size, rows)
    return tokenizer


def _byte_pairs(vocabulary: Path, merges: Path) -> HFTokenizer:
    for path in (vocabulary, merges):
        refuse_pointer(path)
    try:
        lower = Lower(BPE.from_file(str(vocabulary), str(merges)))
    except Exception as error:  # noqa: BLE001 - the tokenizers package raises plain Exception
        raise Damaged(
            tr(
                "{name} and {name2} are no GPT-2 vocabulary: {error}",
                name=one_line(vocabulary.name),
                name2=merges.name,
                error=one_line(str(error), 120),
            ),
            hint=tr("pull the model again"),
            code="tokenizer.damaged",
        ) from None
    lower.pre_tokenizer = ByteLevel(add_prefix_space=False)
    lower.decoder = ByteLevelDecoder()
    end = lower.token_to_id(_END)
    if end is not None:
        lower.add_special_tokens([_END])
    return HFTokenizer(
        lower, {} if end is None else {_END: end}, frozenset() if end is None else frozenset((end,)), None
    )
