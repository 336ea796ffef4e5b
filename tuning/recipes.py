"""How the originals turned rows into tokens and labels, and with which numbers they trained, by one word each.

Sources: the LoRA guide (shared/reference/lora-guide), THUDM's ptuning/main.py of ChatGLM-6B (90f2e47) and ChatGLM2-6B
(3be48aa), ChatGLM3's finetune_demo (00930ac; lora.yaml of 5cb05d0), mymusise/ChatGLM-Tuning (0b8d327; rate and rows a
step differ from README to README there, and could not be confirmed), yangjianxin1/CPM (fe9eee3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from glmchat.core.errors import Usage
from glmchat.core.fingerprints import of_text
from glmchat.core.language import tr
from glmchat.core.text import one_line
from glmchat.engine.prompts.base import PromptFormat
from glmchat.engine.prompts.chatglm import ChatGLMPrompt
from glmchat.tuning.examples import Example
from glmchat.tuning.rendering import Document, Rendered, cut_away, cut_end, render
from glmchat.tuning.rows import Conversation, RowFault, Text

Row = Conversation | Text
_CPM_TAIL = 50  # tokens that must follow a window for it to be kept, the first window aside


@dataclass(frozen=True, slots=True)
class Recipe:
    """source, target: the most tokens of prompt and answer, as the original counts them. total: of a document.

    method: what is trained. settings: how, by the names of a run's settings. make: a row to its documents, uncut tokens
    counted.
    """

    name: str
    family: str
    method: Literal["lora", "prefix", "scratch"]
    source: int
    target: int
    total: int
    make: Callable[[Recipe, Row, PromptFormat], Rendered]
    settings: Mapping[str, Any] = field(default_factory=dict)
    stride: int = 0  # of the windows of a text; 0: as many tokens as a window has

    @property
    def is_text(self) -> bool:
        return self.family == "gpt2"

    @property
    def digest(self) -> str:
        """Of its numbers; what it does with rows is code, which the fingerprint of a reading covers."""
        numbers = (self.name, self.method, self.source, self.target, self.total, sorted(self.settings.items()),
                   *([self.stride] if self.stride else []))  # fmt: skip
        return of_text(repr(numbers))[:12]


def _one_turn(row: Row, rounds: bool = False) -> Conversation:
    """A row of these formats. rounds: the original writes the turns before the last one too."""
    if isinstance(row, Text):
        raise RowFault("format", (), tr("a text"), tr("a question and an answer"))
    asked = [message for message in row.messages if message.role in ("user", "assistant")]
    if len(asked) != len(row.messages):
        raise RowFault("format", (), tr("a system text or tools"), tr("questions and answers alone, as the original"))
    if len(asked) > 2 and not rounds:
        raise RowFault("format", (), tr("several turns"), tr("one question and one answer, as the original"))
    return row


def _pieces(row: Conversation, parts: Sequence[tuple[Literal["prompt", "answer", "stop"], list[int], bool]]) -> Example:
    document = Document(row.place)
    for part, ids, learned in parts:
        document.add(part, ids, learned)
    return document.example()


def _cut(row: Conversation, example: Example, uncut: int, limit: int) -> Rendered:
    """Documents over the limit lose their end, and with it what ends them."""
    whole = cut_end(example, limit)
    if not any(whole.learned):
        raise cut_away(limit)
    lost = len(example.ids) > limit
    return Rendered([whole], uncut, uncut - len(whole.ids), unstopped=int(lost))


def _lora_guide(recipe: Recipe, row: Row, prompt: PromptFormat) -> Rendered:
    said = _one_turn(row).messages
    assert isinstance(prompt, ChatGLMPrompt)
    words = prompt.tokenizer
    between = [*words.encode("\n答: "), words.gmask_id, words.sop_id]
    question, answer = words.encode(f"问:{said[0].content}"), words.encode(said[1].content)
    kept = question[: recipe.source - (len(between) - 2)], answer[: recipe.target - 1]
    example = _pieces(
        _one_turn(row),
        [("prompt", [*kept[0], *between], False), ("answer", kept[1], True), ("stop", [words.eop_id], True)],
    )
    uncut = len(question) + len(between) + len(answer) + 1
    return Rendered([example], uncut, uncut - len(example.ids))


def _ptuning(recipe: Recipe, row: Row, prompt: PromptFormat) -> Rendered:
    """The token that begins the answer is learned too: one label more than in the guide."""
    assert isinstance(prompt, ChatGLMPrompt)
    rounds = recipe.name == "ptuning-chat"
    said, words = _one_turn(row, rounds).messages, prompt.tokenizer
    text = said[-2].content
    if rounds:
        pairs = zip(said[:-2:2], said[1:-2:2], strict=True)
        turns = [f"[Round {n}]\n问：{q.content}\n答：{a.content}\n" for n, (q, a) in enumerate(pairs)]
        text = "".join(turns) + f"[Round {len(turns)}]\n问：{text}\n答："
    question, answer = words.encode(text), words.encode(said[-1].content)
    kept = question[: recipe.source - 1], answer[: recipe.target - 2]
    example = _pieces(
        _one_turn(row, rounds),
        [
            ("prompt", [*kept[0], words.gmask_id], False),
            ("answer", [words.sop_id, *kept[1]], True),
            ("stop", [words.eop_id], True),
        ],
    )
    uncut = len(question) + len(answer) + 3
    return Rendered([example], uncut, uncut - len(example.ids))


def _chatglm2(recipe: Recipe, row: Row, prompt: PromptFormat) -> Rendered:
    """A label that is the padding's id, 0, is never learned."""
    said = _one_turn(row, rounds=True).messages
    question, answer = prompt.render(said[:-1]), prompt.tokenizer.encode(said[-1].content)
    example = _pieces(
        _one_turn(row, rounds=True),
        [
            ("prompt", question[: recipe.source], False),
            ("answer", answer[: recipe.target], True),
            ("stop", list(prompt.stop_ids[:1]), True),
        ],
    )
    learned = tuple(counts and token != 0 for token, counts in zip(example.ids, example.learned, strict=True))
    uncut = len(question) + len(answer) + 1
    example = Example(example.ids, learned, example.segments, example.place)
    return Rendered([example], uncut, uncut - len(example.ids))


def _chatglm3(recipe: Recipe, row: Row, prompt: PromptFormat) -> Rendered:
    if isinstance(row, Text):
        raise RowFault("format", (), tr("a text"), tr("a question and an answer"))
    whole = render(row, prompt, "answers")
    kept = [cut_end(example, recipe.total) for example in whole]
    uncut = sum(len(example.ids) for example in whole)
    lost = sum(len(example.ids) > recipe.total for example in whole)
    kept = [example for example in kept if any(example.learned)]
    if not kept:
        raise cut_away(recipe.total)
    return Rendered(kept, uncut, uncut - sum(len(example.ids) for example in kept), unstopped=lost)


def _chatglm_tuning(recipe: Recipe, row: Row, prompt: PromptFormat) -> Rendered:
    said = _one_turn(row)
    assert isinstance(prompt, ChatGLMPrompt)
    words, (instruction, given) = prompt.tokenizer, said.asked
    text = f"Instruction: {instruction}\n" + (f"Input: {given}\n" if given else "") + "Answer: "
    question, answer = words.encode(text), words.encode(said.messages[1].content)
    example = _pieces(
        said,
        [
            ("prompt", [*question, words.gmask_id], False),
            ("answer", [words.sop_id, *answer], True),
            ("stop", [words.eop_id], True),
        ],
    )
    return _cut(said, example, len(example.ids), recipe.total)


def _cpm(recipe: Recipe, row: Row, prompt: PromptFormat) -> Rendered:
    if isinstance(row, Conversation):
        raise RowFault("format", (), tr("a conversation"), tr("lines of text"))
    ids = [*prompt.tokenizer.encode(row.text), prompt.stop_ids[0]]
    examples = []
    bounds = list(cpm_windows(len(ids), recipe.total, recipe.stride or recipe.total))
    for start, end in bounds:
        document, last = Document(row.place), end == len(ids)
        document.add("answer", ids[start : end - last], True)
        document.add("stop", ids[end - 1 : end] if last else [], True)
        examples.append(document.example())
    kept = bounds[-1][1]
    repeated = sum(len(example.ids) for example in examples) - kept
    return Rendered(examples, len(ids), len(ids) - kept, repeated, unstopped=int(kept < len(ids)))


def cpm_windows(length: int, size: int, stride: int) -> Iterator[tuple[int, int]]:
    """The windows of a text of so many tokens: the first, and each that so many follow as the original asks for."""
    start = 0
    while start == 0 or start + size + _CPM_TAIL < length:
        yield start, min(start + size, length)
        start += stride


_ADAM = {"schedule": "linear", "warmup": 0.0, "weight_decay": 0.0, "clip": 1.0}
_PREFIX = {"dropout": 0.1, **_ADAM}  # THUDM's modeling_chatglm.py has it fixed
_LORA = {"rank": 8, "alpha": 32.0, "dropout": 0.1, "targets": ("query_key_value",), **_ADAM}
RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("lora-guide", "chatglm", "lora", 200, 500, 702, _lora_guide,
               {**_LORA, "learning_rate": 1e-4, "steps": 1500, "rows_per_step": 1, "save_every": 500, "keep": 3,
                "seed": 0}),
        Recipe("ptuning", "chatglm", "prefix", 64, 64, 128, _ptuning,
               {**_PREFIX, "learning_rate": 1e-2, "steps": 3000, "rows_per_step": 16, "save_every": 1000, "quant": 4,
                "prefix_length": 8, "seed": 42}),
        Recipe("ptuning-chat", "chatglm", "prefix", 256, 256, 512, _ptuning,
               {**_PREFIX, "learning_rate": 1e-2, "steps": 3000, "rows_per_step": 16, "save_every": 1000, "quant": 4,
                "prefix_length": 128, "seed": 42}),
        Recipe("chatglm2-ptuning", "chatglm2", "prefix", 64, 128, 193, _chatglm2,
               {**_PREFIX, "learning_rate": 2e-2, "steps": 3000, "rows_per_step": 16, "save_every": 1000, "quant": 4,
                "prefix_length": 128, "seed": 42}),
        Recipe("chatglm3", "chatglm3", "lora", 256, 512, 769, _chatglm3,
               {**_LORA, "learning_rate": 5e-5, "steps": 3000, "rows_per_step": 4, "save_every": 500,
                "evaluate_every": 500, "seed": 42}),
        Recipe("chatglm-tuning", "chatglm", "lora", 384, 384, 384, _chatglm_tuning,
               {**_LORA, "learning_rate": 1e-4, "steps": 52000, "rows_per_step": 6, "save_every": 1000, "keep": 2,
                "seed": 42}),
        Recipe("cpm", "gpt2", "scratch", 200, 200, 200, _cpm,
               {**_ADAM, "learning_rate": 1.5e-4, "eps": 1e-9, "epochs": 100, "rows_per_step": 96, "warmup": 4000.0,
                "seed": 1234}),
    )
}  # fmt: skip


def recipe_of(name: str | None, family: str) -> Recipe | None:
    """By its name. Raises Usage for another word, and for a model of another family than the original's."""
    if name is None:
        return None
    recipe = RECIPES.get(name)
    if recipe is None:
        raise Usage(
            tr("there is no recipe {name}", name=one_line(repr(name), 40)),
            hint=tr("the recipes are {names}", names=", ".join(RECIPES)),
            code="data.recipe",
        )
    if recipe.family != family:
        raise Usage(
            tr("--like {name} is for models of the family {wanted}; this one is {family}", name=name,
               wanted=recipe.family, family=family),
            hint=tr("leave out --like: glmchat's own way fits every model"),
            code="data.recipe_family",
        )  # fmt: skip
    return recipe


def differences(recipe: Recipe) -> list[str]:
    """Where it departs from what glmchat does by itself, for the first page."""
    told = {
        "lora-guide": [
            tr("the prompt is 问:… and 答:, not the model's own rounds: the chat sends others"),
            tr("a long question loses its end, not its beginning, and a long answer its end before the stop"),
        ],
        "ptuning": [
            tr("the token that begins an answer is learned too"),
            tr("at 64 tokens each, question and answer lose their ends; the stop is learned all the same"),
            tr("history is not written; `ptuning-chat` writes it"),
        ],
        "ptuning-chat": [
            tr("the token that begins an answer is learned too"),
            tr("a first question is written as [Round 0], but the chat sends it bare"),
        ],
        "chatglm2-ptuning": [tr("a long question loses its end, with the words that open the answer")],
        "chatglm3": [tr("a long conversation loses its end, and with it the stop")],
        "chatglm-tuning": [
            tr("the prompt is Instruction: … Answer:, not the model's own: the chat sends others"),
            tr("the token that begins an answer is learned too"),
            tr("at 384 tokens a row loses its end, and with it the stop"),
        ],
        "cpm": [
            tr("of a line longer than 200 tokens the tail is lost, up to 250 tokens, and with it <eod>"),
            tr("by itself glmchat keeps every token, in windows of the length that is asked for"),
            *([tr("what stands in two windows is learned twice")] if recipe.stride else []),
        ],
    }
    return told[recipe.name]
