"""What transformers makes of a drawn folder, and whether glmchat makes the same of it or refuses it.

`check(seed, folder)` is one draw: its result is "equal", "refused" or "differs", with the reason.
"""

from __future__ import annotations

import json
import shutil
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import chatglm_draws
import torch
from chatglm_draws import ORIGINALS, SHARED, FirstGLM, Words, glm_of
from folder_draws import FORMS, SHARDS, Draw, draw, plain, set_ends, write, write_words
from safetensors.torch import load_file
from vocabulary_kinds import THOUGHTS, WINDING, as_the_model_wrote, renamed

from glmchat.checkpoints.families import describe
from glmchat.checkpoints.fit import check_folder
from glmchat.checkpoints.readers import readers_at
from glmchat.core.errors import GlmchatError
from glmchat.core.messages import Message, Sampling
from glmchat.engine import Engine
from glmchat.engine.loading import stored_bits
from glmchat.engine.prompts.base import NoChat
from glmchat.engine.prompts.template import TemplatePrompt

NEW = 12
_EXACT, _PACKED = 1e-4, 1e-2  # of the norm of all logits: sums in another order; minima that a kernel keeps in 16 bits


class Refused(Exception):
    """glmchat says that it cannot be done, and transformers cannot do it either."""


class Different(Exception):
    """glmchat made something else of the folder, and did not say so."""


@dataclass(frozen=True)
class Outcome:
    """result: "equal", "refused", "differs" or "skipped"."""

    draw: Draw
    result: str
    reason: str = ""

    def __str__(self) -> str:
        return f"seed {self.draw.seed}: {self.result} {self.reason}\n    {self.draw}"


@dataclass
class Reference:
    """transformers' model of a folder. refusal: why it does not load the folder itself; `model` is then of its twin, or
    None where the tensors say too little."""

    model: Any  # transformers', or that of a specification
    refusal: str | None

    def logits(self, ids: list[int]) -> torch.Tensor:
        if isinstance(self.model, FirstGLM):
            return self.model.logits(ids)
        with torch.inference_mode():
            return self.model(input_ids=torch.tensor([ids])).logits[0].float()

    def answer(self, ids: list[int], count: int = NEW) -> list[int]:
        if isinstance(self.model, FirstGLM):
            return self.model.answer(ids, count)
        prompt = torch.tensor([ids])
        asked = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "eos_token_id": None}
        with torch.inference_mode():
            found = self.model.generate(prompt, attention_mask=torch.ones_like(prompt), pad_token_id=0, **asked)
        ids_of_answer: list[int] = found[0, len(ids) :].tolist()
        return ids_of_answer


def check(seed: int, folder: Path) -> Outcome:
    """Of the draw of this seed, written into `folder`, which is not there yet."""
    one = draw(seed)
    if one.family in ORIGINALS and not SHARED.is_dir():
        return Outcome(one, "skipped", "../shared with the published vocabularies is absent")
    try:
        return _check_original(one, folder) if one.family in ORIGINALS else _check(one, folder)
    except Different as difference:
        return Outcome(one, "differs", str(difference))
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return Outcome(one, "differs", f"{_line(error)} ({Path(where.filename).name}:{where.lineno})")
    finally:
        for path in (folder, plain(folder), folder.with_name("renamed"), folder.with_name("quantised")):
            shutil.rmtree(path, ignore_errors=True)


def _check(one: Draw, folder: Path) -> Outcome:
    from transformers import AutoTokenizer

    try:
        path = write(one, folder)
    except GlmchatError as error:
        if error.code == "quant.family":  # glmchat quantises what it computes itself
            return Outcome(one, "refused", f"{error.code}: {one.quant} of {one.family}")
        raise
    in_file = {"gguf_file": path.name} if one.has_pieces and one.quant.startswith("GGUF") else {}
    tokenizer = AutoTokenizer.from_pretrained(folder, **in_file)
    theirs = _reference(one, folder, path)
    begin = [3, 1, 4, 1, 5]
    if not one.quant.startswith("GGUF"):
        set_ends(one, path, [7, 9] if theirs.model is None else theirs.answer(begin))
    try:
        engine = _load(path)
    except GlmchatError as error:
        return Outcome(one, "refused", _may_refuse(one, theirs, error))
    if theirs.model is None:
        raise Different(f"it runs; transformers: {theirs.refusal}")
    try:
        _compare(one, folder, path, engine, theirs, tokenizer)
    except Refused as refusal:
        return Outcome(one, "refused", str(refusal))
    finally:
        if isinstance(engine.prompt, TemplatePrompt):
            engine.prompt.close()
    return Outcome(one, "equal", engine.family)


def _check_original(one: Draw, folder: Path) -> Outcome:
    path = write(one, folder)
    words, config = Words(one.family), chatglm_draws.configuration(one.family)
    tensors = load_file(plain(folder) / "model.safetensors")
    model = FirstGLM(tensors, config, early=words.early) if words.first else glm_of(tensors, config)
    lost = one.index in ("stale", "foreign", "names more files") or (
        one.index == "absent" and len(SHARDS[one.shards]) > 1
    )
    theirs = Reference(model, "the index names other files" if lost else None)
    begin = words.conversation([{"role": "user", "content": "the cat"}])
    ends = chatglm_draws.set_ends(one.ends, path, words, theirs.answer(begin)[5])
    try:
        engine = _load(path)
    except GlmchatError as error:
        return Outcome(one, "refused", _may_refuse(one, theirs, error))
    if set(engine.stop_ids) != ends:
        raise Different(f"ends at {engine.stop_ids}, not {sorted(ends)}")
    _equal("a completion", engine.complete(one.text), words.completion(one.text))
    conversation = one.messages()
    ids = engine.render([Message(m["role"], m["content"]) for m in conversation])
    _equal("the conversation", ids, words.conversation(conversation))
    exact = _PACKED if one.quant != "none" and stored_bits(engine.model) else _EXACT
    _logits(engine, theirs, ids, exact)
    said = _answer(engine, ids, theirs.answer(ids), ends, theirs, exact)
    text, right = engine.tokenizer.decode(said), words.decode(said)
    if right is not None and "\ufffd" not in right and text != right:
        raise Different(f"shows {text!r} for {right!r}, ids {said}")
    longer = [*conversation, {"role": "assistant", "content": text}, {"role": "user", "content": one.said[1] + "?"}]
    again = engine.render([Message(m["role"], m["content"]) for m in longer])
    _equal("the second turn", again, words.conversation(longer))
    _answer(engine, again, theirs.answer(again, 6), ends, theirs, exact)
    return Outcome(one, "equal", engine.family)


def _load(path: Path) -> Engine:
    """The engine; what it refuses, the preflight has refused as well, and the other way round."""
    early: GlmchatError | None = None
    try:
        check_folder(path)
    except GlmchatError as error:
        early = error
    try:
        engine = Engine.load(path, dtype="float32", threads=1)
    except GlmchatError as error:
        if not error.message.strip() or "\n" in error.message or not error.hint:
            raise Different(f"a refusal without words: {error!r}") from None
        if early is None and error.code not in _LATE:
            raise Different(f"only the engine refuses it: {_line(error)}") from None
        raise
    if early is not None:
        raise Different(f"refused before the start, and runs: {_line(early)}")
    shown = describe(path)
    if shown is None or (shown.layers, shown.vocabulary) != (engine.spec.layers, engine.spec.vocab_size):
        raise Different(f"shown as {shown}")
    return engine


# What only the engine can know: tensors within .bin files, and what transformers says of an architecture of its own.
_LATE = ("fallback.load", "fallback.compute", "weights.names")


def _reference(one: Draw, folder: Path, path: Path) -> Reference:
    if one.quant.startswith("glmchat"):
        return _quantised(folder, path)
    if not one.quant.startswith(("GGUF", *FORMS)):
        try:
            return Reference(_model(path), None)
        except Exception as error:
            refusal = _line(error)
    else:
        refusal = "transformers lacks the package that reads it"
    try:
        return Reference(_model(plain(folder)), refusal)
    except Exception as error:
        return Reference(None, f"{refusal}; {_line(error)}")


def _quantised(folder: Path, path: Path) -> Reference:
    """The unpacked matrices in transformers' network. Where the folder says that transformers reads it, it does."""
    theirs = Reference(_model(plain(folder)), "only glmchat reads it")
    readers = readers_at(path)
    if readers is not None and "transformers" not in readers.to_json()["programs"]:
        return theirs
    ids = [3, 1, 4, 1, 5]
    right, found = theirs.logits(ids), Reference(_model(path), None).logits(ids)
    if not float((found - right).norm() / right.norm()) < _PACKED:
        raise Different("transformers reads other weights than the folder's")
    return Reference(theirs.model, None)


def _model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model, told = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    if told["missing_keys"]:
        raise ValueError(f"missing: {sorted(told['missing_keys'])}")
    return model.eval()


def _may_refuse(one: Draw, theirs: Reference, error: GlmchatError) -> str:
    """Why it may be refused. Raises Different where transformers reads it and no reason is known."""
    if theirs.model is None:
        return f"{error.code}; transformers: {theirs.refusal}"
    if one.quant.startswith(tuple(FORMS)) or one.quant.startswith(("GGUF", "compressed", "glmchat")):
        absent = error.code == "weights.missing_shard" and one.index in ("stale", "foreign", "names more files")
        if absent or error.code in ("quant.method", "gguf.unread", "quant.family"):
            return f"{error.code}: {one.quant} of {one.family}"
    elif theirs.refusal is not None:
        return f"{error.code}; transformers: {theirs.refusal}"
    raise Different(f"refused: {error.code}: {_line(error)}")


def _compare(one: Draw, folder: Path, path: Path, engine: Engine, theirs: Reference, tokenizer: Any) -> None:
    rows, wanted = engine.spec.vocab_size, tokenizer(one.text)["input_ids"]
    try:
        ids = engine.complete(one.text)
    except GlmchatError as error:
        raise _without_row(error, wanted, rows) or error from None
    _equal("a completion", ids, wanted)
    if one.template != "none":
        conversation, right = _conversation(one, folder, path)
        messages = _system_first(one, conversation)
        try:
            ids = engine.render([Message(m["role"], m["content"]) for m in conversation])
        except GlmchatError as error:
            known = right is not None and _without_row(error, _ids(right, messages), rows)
            raise known or _refused_too(error, tokenizer, messages) from None
        if right is not None:
            _equal("the conversation", ids, _ids(right, messages))
    elif not isinstance(engine.prompt, NoChat):
        raise Different("a base model has a chat format")
    if max(ids) >= rows:
        raise Different("a word without a row is not refused")
    exact = _PACKED if one.quant != "none" and stored_bits(engine.model) else _EXACT
    _logits(engine, theirs, ids, exact)
    answer = theirs.answer(ids)
    ends = _ends(one, folder, path, engine, tokenizer)
    said = _answer(engine, ids, answer, ends, theirs, exact)
    if one.template == "none" or right is None:
        return
    _text(engine.tokenizer.decode(said), said, tokenizer)
    text = engine.tokenizer.decode(said[:-1] if said[-1] in ends else said)  # an end is no part of what is kept
    text = text.replace("<unk>", "")  # a word of the vocabulary where a model says it, and text where it is read again
    longer = [*conversation, {"role": "assistant", "content": text}, {"role": "user", "content": one.said[1] + "?"}]
    wanted = _ids(right, _system_first(one, longer))
    try:
        again = engine.render([Message(m["role"], m["content"]) for m in longer])
    except GlmchatError as error:
        raise _without_row(error, wanted, rows) or error from None
    _equal("the second turn", again, wanted)
    _answer(engine, again, theirs.answer(again, 6), ends, theirs, exact)


def _without_row(error: GlmchatError, wanted: list[int], rows: int) -> Exception | None:
    """Refused because transformers' ids hold one that its network has no row for, and cannot compute."""
    return Refused(error.code) if error.code == "prompt.no_row" and max(wanted) >= rows else None


def _refused_too(error: GlmchatError, tokenizer: Any, messages: list[dict[str, str]]) -> Exception:
    """The template names a token that the files do not, for one."""
    try:
        tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    except Exception as theirs:
        return Refused(f"{error.code}; transformers: {_line(theirs)}")
    return Different(f"does not render: {_line(error)}")


def _logits(engine: Engine, theirs: Reference, ids: list[int], exact: float) -> None:
    found, expected = engine.logits(ids), theirs.logits(ids)
    gap = float((found - expected).norm() / expected.norm())
    if not gap < exact:
        raise Different(f"logits are {gap:.1e} off")


def _conversation(one: Draw, folder: Path, path: Path) -> tuple[list[dict[str, str]], Any]:
    """What is said, and the tokenizer whose control words nobody typed; None where other names make other words."""
    from transformers import AutoTokenizer

    if one.kind.template is WINDING:
        return one.messages(), None
    other = folder.with_name("renamed")
    write_words(one, other, renamed)
    if one.has_pieces and one.quant.startswith("GGUF"):  # no file of this kind says "legacy"
        settings = json.loads((other / "tokenizer_config.json").read_text())
        (other / "tokenizer_config.json").write_text(json.dumps({**settings, "legacy": False}))
    return one.messages(), AutoTokenizer.from_pretrained(other)


def _system_first(one: Draw, conversation: list[dict[str, str]]) -> list[dict[str, str]]:
    """A template without a place for a system prompt gets it in front of the first question."""
    if conversation[0]["role"] != "system" or one.template != "no system":
        return conversation
    system, question, *rest = conversation
    return [{"role": "user", "content": f"{system['content']}\n\n{question['content']}"}, *rest]


def _ids(tokenizer: Any, conversation: list[dict[str, str]]) -> list[int]:
    said = as_the_model_wrote(conversation)
    ids: list[int] = tokenizer.apply_chat_template(said, add_generation_prompt=True)["input_ids"]
    return ids


def _ends(one: Draw, folder: Path, path: Path, engine: Engine, tokenizer: Any) -> set[int]:
    """glmchat's ends of a text: transformers' all, and beyond them only what is an end by name or by the template."""
    from transformers import AutoConfig, GenerationConfig

    ours = set(engine.stop_ids)
    if one.quant.startswith("GGUF"):
        told, named = [tokenizer.eos_token_id], set()
    else:
        try:
            told = GenerationConfig.from_pretrained(path).eos_token_id
        except OSError:
            told = GenerationConfig.from_model_config(AutoConfig.from_pretrained(path)).eos_token_id
        told, named = told if isinstance(told, list) else [told], _listed(path)
    known_ends = {*tokenizer.all_special_ids, *named}  # what only the class says is an end where the vocabulary agrees
    right = {
        token for token in told if token is not None and 0 <= token < engine.spec.vocab_size and token in known_ends
    }
    if right - ours:
        raise Different(f"transformers ends at {sorted(right)}, glmchat at {sorted(ours)}")
    words = {tokenizer.convert_ids_to_tokens(token) for token in ours - named - set(told)}
    words -= {"<|im_end|>", "</s>", "<|user|>", tokenizer.eos_token}
    if one.template == "named tokens" and tokenizer.eos_token is None:
        words -= {"<|im_start|>"}  # all that stands behind an answer there
    if words:
        raise Different(f"glmchat ends at {sorted(map(str, words))} too")
    return ours


def _listed(path: Path) -> set[int]:
    found: set[int] = set()
    for file in ("config.json", "generation_config.json"):
        told = json.loads((path / file).read_text()).get("eos_token_id") if (path / file).is_file() else None
        found |= set(told if isinstance(told, list) else [] if told is None else [told])
    return found


def _answer(
    engine: Engine, ids: list[int], right: list[int], ends: set[int], theirs: Reference, exact: float
) -> list[int]:
    """The ids that glmchat says: transformers', up to the first end."""
    said = list(engine.generate(ids, Sampling(temperature=0, max_tokens=len(right))))
    stop = next((n + 1 for n, token in enumerate(right) if token in ends), len(right))
    if said == right[:stop]:
        return said
    at = next((n for n, pair in enumerate(zip(said, right, strict=False)) if pair[0] != pair[1]), min(len(said), stop))
    if at < len(said) and at < stop:
        row = theirs.logits([*ids, *right[:at]])[-1]
        if float(row[right[at]] - row[said[at]]) < 4 * exact * float(row.abs().max()):
            return said  # as good as equal
    raise Different(f"says {said} for {right[:stop]}")


def _text(text: str, ids: list[int], tokenizer: Any) -> None:
    """What is shown of an answer is what transformers shows, but for the marks of thoughts."""
    marks = {tokenizer.convert_tokens_to_ids(word) for word in THOUGHTS}
    if marks & set(ids):
        return
    special = set(tokenizer.all_special_ids)  # its decoder shows some of them, which were added as words first
    plain_ids = [token for token in ids if token not in special]
    right = tokenizer.decode(plain_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if "\ufffd" in right:  # of bytes that are no text tokenizers throws away the whole run
        return
    if text.strip() != right.strip():
        raise Different(f"shows {text!r} for {right!r}, ids {ids}")


def _equal(what: str, found: list[int], right: list[int]) -> None:
    if found != right:
        raise Different(f"{what} is {found}, not {right}")


def _line(error: BaseException) -> str:
    return (type(error).__name__ + ": " + " ".join(str(error).split()))[:300]


@contextmanager
def quiet() -> Iterator[None]:
    """One thread, and no words of transformers' own."""
    from transformers.utils import logging

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
