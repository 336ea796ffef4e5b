"""Rows to tokens and labels, by the prompt format that the chat itself uses.

A conversation is one document as long as each later prompt goes on from the answer before it (chat templates, ChatGLM3,
GLM-4). Where the family writes its history in another way than the model wrote it (ChatGLM-6B's rounds before the mask,
ChatGLM2's rounds as one text, templates that take old thoughts away), each answer is a document of its own, with the
prompt that the chat would send.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from glmchat.core.language import tr
from glmchat.core.messages import Message
from glmchat.engine.prompts.base import Answered, PromptFormat
from glmchat.engine.prompts.chatglm import ChatGLMPrompt
from glmchat.tuning.examples import Example, Part, Place, Segment
from glmchat.tuning.pairs import Pair
from glmchat.tuning.rows import Conversation, RowFault, Text

On = Literal["answers", "last", "all", "text"]
OverLength = Literal["refuse", "cut-question", "cut-answer", "split", "drop"]


@dataclass(slots=True)
class Document:
    """An example while it grows."""

    place: Place
    ids: list[int] = field(default_factory=list)
    learned: list[bool] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)

    def add(self, part: Part, ids: Sequence[int], learned: bool) -> None:
        if ids:
            self.segments.append(Segment(part, len(self.ids), len(self.ids) + len(ids)))
            self.ids += ids
            self.learned += [learned] * len(ids)

    def example(self) -> Example:
        """The first token is predicted from nothing, so it is never learned."""
        learned = (False, *self.learned[1:]) if self.ids else ()
        return Example(tuple(self.ids), learned, tuple(self.segments), self.place)


@dataclass(slots=True)
class Rendered:
    """Of one row. was: tokens of its documents before cutting; taken: how many of those are gone; repeated: how many
    stand in a second window too; unstopped: documents whose end is cut away; is_long: it was over the limit, and is no
    text, which goes on in its next piece."""

    examples: list[Example]
    was: int
    taken: int = 0
    repeated: int = 0
    unstopped: int = 0
    is_long: bool = False


def render(row: Conversation | Text, prompt: PromptFormat, on: On) -> list[Example]:
    """The documents of a row, whatever their length. Raises Usage where the format cannot write the conversation."""
    if isinstance(row, Text):
        return [_text(row, prompt)]
    if on == "text":
        raise RowFault("format", (), tr("a conversation"), tr("texts: leave out --on text"))
    if on == "all" and isinstance(prompt, ChatGLMPrompt):
        wanted = tr("--on answers: this family reads its prompt in both directions, so it cannot be predicted")
        raise RowFault("format", (), "--on all", wanted)
    done: list[Example] = []
    document: Document | None = None
    end: list[int] = []  # what ends the last answer of `document`
    for _, turn in _turns(row, prompt, on):
        is_on = document is not None and _goes_on(document, turn, end, prompt)
        if document is not None and is_on:
            document.add("stop", turn.prompt[len(document.ids) :][:1], True)
            document.add("prompt", turn.prompt[len(document.ids) :], on == "all")
        else:
            if document is not None:
                document.add("stop", end, True)
                done.append(document.example())
            document = Document(row.place)
            document.add("prompt", turn.prompt, on == "all")
        document.add("answer", turn.answer, True)
        end = turn.stop
    assert document is not None  # rows without an answer to learn are refused as they are read
    document.add("stop", end, True)
    return [*done, document.example()]


def _turns(row: Conversation, prompt: PromptFormat, on: On) -> Iterator[tuple[int, Answered]]:
    """Each answer that is learned, behind what the chat would send."""
    counted = [number for number, learned in enumerate(row.learned) if learned]
    for number in counted[-1:] if on == "last" else counted:
        yield number, prompt.render_answered(row.messages[: number + 1])


def _goes_on(document: Document, turn: Answered, end: list[int], prompt: PromptFormat) -> bool:
    size = len(document.ids)
    if turn.prompt[:size] != document.ids or len(turn.prompt) == size:
        return False
    following = turn.prompt[size]
    return following in end or following in prompt.stop_ids


def _text(row: Text, prompt: PromptFormat) -> Example:
    """A text as it stands, behind the ids that a completion begins with, and the id that ends it."""
    document = Document(row.place)
    document.add("prompt", prompt.complete(""), False)
    document.add("answer", prompt.tokenizer.encode(row.text), True)
    document.add("stop", prompt.stop_ids[:1], True)
    return document.example()


def fit(
    row: Conversation | Text, prompt: PromptFormat, on: On, limit: int, policy: OverLength, stride: int = 0
) -> Rendered:
    """The documents of a row, none longer than `limit` tokens.

    stride: of the windows of a text, 0: as many tokens as a window has. Raises RowFault for a row that the policy
    drops, and for one of which nothing to learn would be left.
    """
    whole = render(row, prompt, on)
    rendered = Rendered(whole, sum(len(example.ids) for example in whole))
    if all(len(example.ids) <= limit for example in whole):
        return rendered
    rendered.is_long = isinstance(row, Conversation) or policy in ("cut-answer", "drop")
    if policy == "drop":
        longest = max(len(example.ids) for example in whole)
        raise RowFault("long", (), tr("{count} tokens", count=longest), tr("at most {limit}", limit=limit))
    if policy in ("refuse", "cut-question") and isinstance(row, Conversation):
        return _shorter(row, prompt, on, limit)
    if policy != "cut-answer":
        begin = prompt.complete("")
        stride = stride or max(1, limit - len(begin))
        rendered.examples = [piece for example in whole for piece in windows(example, limit, begin, stride)]
        again = max(0, limit - len(begin) - stride)
        rendered.repeated = again * (len(rendered.examples) - len(whole))
    else:
        rendered.examples = [cut_end(example, limit) for example in whole]
        rendered.unstopped = sum(len(example.ids) > limit for example in whole)
    rendered.taken = max(0, rendered.was - sum(len(example.ids) for example in rendered.examples))
    kept = [example for example in rendered.examples if any(example.learned)]
    if not kept:
        raise cut_away(limit)
    rendered.examples = kept
    return rendered


def fit_pair(pair: Pair, prompt: PromptFormat, limit: int, policy: OverLength) -> Rendered:
    """Both sides as one example, neither longer than `limit` tokens, behind one and the same prompt.

    Raises RowFault for a pair that the policy drops, and where nothing to tell the sides apart by would be left.
    """
    said = list(pair.question)
    turns = [prompt.render_answered([*said, answer]) for answer in pair.answers]
    rendered = Rendered([], sum(map(_size, turns)), is_long=max(map(_size, turns)) > limit)
    while (most := max(map(_size, turns))) > limit and policy != "cut-answer":
        shorter = _without_oldest(said) or _without_beginning(said, most - limit, prompt)
        if policy == "drop" or shorter is None:
            found, wanted = tr("{count} tokens", count=most), tr("at most {limit}", limit=limit)
            raise RowFault("long", (), tr("a side of {size}", size=found), wanted)
        said = shorter
        turns = [prompt.render_answered([*said, answer]) for answer in pair.answers]
    sides = []
    for turn in turns:
        document = Document(pair.place)
        document.add("prompt", turn.prompt, False)
        document.add("answer", turn.answer, True)
        document.add("stop", turn.stop, True)
        sides.append(cut_end(document.example(), limit))
    first, other = sides
    if not any(first.learned) or not any(other.learned) or first.ids == other.ids:
        raise cut_away(limit)
    start = len(first.ids)
    moved = (Segment(part.part, start + part.start, start + part.end) for part in other.segments)
    rendered.examples = [
        Example(
            first.ids + other.ids, first.learned + other.learned, (*first.segments, *moved), pair.place, second=start
        )
    ]
    rendered.taken = rendered.was - len(rendered.examples[0].ids)
    rendered.unstopped = sum(_size(turn) > limit for turn in turns)
    return rendered


def cut_away(limit: int) -> RowFault:
    found = tr("an answer that is cut away wholly at {limit} tokens", limit=limit)
    return RowFault("cut", (), found, tr("a shorter question, or a larger --max-length"))


def cut_end(example: Example, limit: int) -> Example:
    segments = tuple(Segment(s.part, s.start, min(s.end, limit)) for s in example.segments if s.start < limit)
    return Example(example.ids[:limit], example.learned[:limit], segments, example.place)


def windows(example: Example, limit: int, begin: Sequence[int], stride: int) -> Iterator[Example]:
    """Pieces of at most `limit` tokens, each behind the ids that begin a text and `stride` tokens after the one before;
    no token is lost. What stands in a piece before it too is context there, and is not learned again."""
    head = list(begin) if example.ids[: len(begin)] != tuple(begin) else []
    again = max(0, limit - len(begin) - stride)
    bounds = [0, *range(limit, len(example.ids), stride), len(example.ids)]
    if not again and len(bounds) > 2 and bounds[-1] - bounds[-2] < 2:  # a token alone is predicted from nothing
        bounds[-2] -= 1
    for start, end in pairwise(bounds):
        document = Document(example.place)
        fresh = start  # the first that is learned
        if start:
            document.add("prompt", head or list(begin), False)
            start -= again
        for segment in example.segments:
            first, last = max(segment.start, start), min(segment.end, end)
            if first < last:
                shift = len(document.ids) - first
                document.segments.append(Segment(segment.part, first + shift, last + shift))
                document.ids += example.ids[first:last]
                document.learned += [
                    learned and at >= fresh for at, learned in enumerate(example.learned[first:last], first)
                ]
        yield document.example()


def _shorter(row: Conversation, prompt: PromptFormat, on: On, limit: int) -> Rendered:
    """Each answer behind as much of what was asked as fits: the oldest turns go first, then the question's start."""
    rendered = Rendered([], 0, is_long=True)
    for number, turn in _turns(row, prompt, on):
        said = list(row.messages[: number + 1])
        rendered.was += _size(turn)
        while _size(turn) > limit:
            shorter = _without_oldest(said) or _without_beginning(said, _size(turn) - limit, prompt)
            if shorter is None:
                found = tr("an answer of {count} tokens", count=len(turn.answer))
                wanted = tr("at most {limit} with its question; --over-length cut-answer or split uses it", limit=limit)
                raise RowFault("long", (), found, wanted)
            said, turn = shorter, prompt.render_answered(shorter)
        document = Document(row.place)
        document.add("prompt", turn.prompt, on == "all")
        document.add("answer", turn.answer, True)
        document.add("stop", turn.stop, True)
        rendered.examples.append(document.example())
    rendered.taken = rendered.was - sum(len(example.ids) for example in rendered.examples)
    return rendered


def _size(turn: Answered) -> int:
    return len(turn.prompt) + len(turn.answer) + len(turn.stop)


def _without_oldest(said: list[Message]) -> list[Message] | None:
    """Without the first question and what follows it; None where it is the last one."""
    asked = [number for number, message in enumerate(said) if message.role == "user"]
    return None if len(asked) < 2 else [*said[: asked[0]], *said[asked[1] :]]


def _without_beginning(said: list[Message], surplus: int, prompt: PromptFormat) -> list[Message] | None:
    """The last question without its first `surplus` tokens; None where nothing of it would be left."""
    at = max((number for number, message in enumerate(said) if message.role == "user"), default=None)
    if at is None:
        return None
    ids = prompt.tokenizer.encode(said[at].content)
    text = said[at].content
    while len(text) >= len(said[at].content):  # a first token may be a blank that decoding leaves out anyway
        if surplus >= len(ids):
            return None
        text = prompt.tokenizer.decode(ids[surplus:]).lstrip("\ufffd")
        surplus += 1
    if not text.strip():
        return None
    return [*said[:at], Message(said[at].role, text), *said[at + 1 :]]
