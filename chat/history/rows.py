"""What the history holds: conversations, and messages that form a tree."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args, overload

from glmchat.core.errors import Usage
from glmchat.core.json_files import is_deep
from glmchat.core.language import tr
from glmchat.core.settings import check_sampling
from glmchat.core.text import one_line

State = Literal["complete", "streaming", "stopped", "interrupted", "failed", "cut"]
# complete:    the model ended its answer, or a person wrote the message
# streaming:   being written now, by the process named in `owner`
# stopped:     a person stopped it
# interrupted: the window or the machine went away while it was written
# failed:      the engine or the server went away or refused
# cut:         it reached the limit of tokens
UNFINISHED: frozenset[str] = frozenset({"stopped", "interrupted", "failed", "cut"})
LAST_TIME = 1e11  # seconds since 1970: the year 5138, within what a date can hold in every zone
CLEAR = "clear"  # role of the mark that /clear leaves: the model sees nothing above it


@dataclass(frozen=True, slots=True)
class ConversationSettings:
    """What belongs to one conversation. A None or an absent key leaves the choice to the next lower rank."""

    system: str | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)  # field of core.messages.Sampling -> value
    adapters: tuple[tuple[str, float], ...] = ()  # (name in the store, scale)
    context_policy: str | None = None  # "drop" | "refuse"
    one_shot: bool = False  # asked and answered on a command line, and not gone on with since

    def to_json(self) -> dict[str, Any]:
        return {
            "system": self.system,
            "sampling": {k: list(v) if isinstance(v, tuple) else v for k, v in self.sampling.items()},
            "adapters": [{"name": name, "scale": scale} for name, scale in self.adapters],
            "context_policy": self.context_policy,
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> ConversationSettings:
        """Unknown keys are left out: a newer glmchat may have written them. Raises KeyError, TypeError, ValueError,
        AttributeError or Usage for values that no setting can have."""
        sampling = {k: tuple(v) if isinstance(v, list) else v for k, v in (data.get("sampling") or {}).items()}
        check_sampling(sampling, "sampling")
        system, policy = data.get("system"), data.get("context_policy")
        if not isinstance(system, str | None) or policy not in (None, "drop", "refuse"):
            raise ValueError(system, policy)
        return ConversationSettings(
            system=system,
            sampling=sampling,
            adapters=tuple((str(a["name"]), float(a["scale"])) for a in data.get("adapters") or ()),
            context_policy=policy,
            one_shot=data.get("one_shot") is True,
        )


@dataclass(frozen=True, slots=True)
class Conversation:
    """The head of one conversation. Times are seconds since 1970, UTC; order is by `sequence`, never by time."""

    id: int
    title: str = ""
    model: str | None = None  # the reference it was last run with
    created: float = 0.0
    updated: float = 0.0
    sequence: int = 0  # grows with every change anywhere in the history: the clock may go backwards
    pinned: bool = False
    settings: ConversationSettings = field(default_factory=ConversationSettings)
    draft: str = ""  # what stood unsent in the prompt
    leaf: int | None = None  # last message of the branch that is open
    message_count: int = 0  # on all branches, without deleted ones and clear marks
    renamed: bool = False  # a person gave the title


class TokenIds(Sequence[int]):
    """Token ids in four bytes each, as the file has them: a tuple of numbers takes ten times as much. Never changed."""

    __slots__ = ("packed",)

    def __init__(self, ids: Iterable[int] = (), packed: bytes | None = None) -> None:
        self.packed = array("i", ids).tobytes() if packed is None else packed

    def __len__(self) -> int:
        return len(self.packed) // 4

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[int, ...]: ...
    def __getitem__(self, index: int | slice) -> int | tuple[int, ...]:
        view = memoryview(self.packed).cast("i")
        return tuple(view[index]) if isinstance(index, slice) else view[index]

    def __iter__(self) -> Iterator[int]:
        return iter(memoryview(self.packed).cast("i"))

    def __add__(self, more: Iterable[int]) -> TokenIds:
        return TokenIds(packed=self.packed + array("i", more).tobytes())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return repr(tuple(self))


NO_IDS = TokenIds()


@dataclass(frozen=True, slots=True)
class StoredMessage:
    """One message. `text` is what was said, raw; what is shown may be cleaned up."""

    id: int
    conversation: int
    parent: int | None
    role: str  # "user" | "assistant" | "system" | "tool" | "observation" | CLEAR
    text: str = ""
    state: State = "complete"
    created: float = 0.0
    token_ids: TokenIds = NO_IDS  # of an answer, where the server sends them
    details: Mapping[str, Any] = field(default_factory=dict)  # model, revision, quant, sampling, timings, …
    chosen: int | None = None  # the child that was open last
    deletion: int | None = None  # the deletion that hides it
    owner: str | None = None  # the process that streams it

    @property
    def is_clear(self) -> bool:
        return self.role == CLEAR

    @property
    def can_continue(self) -> bool:
        """An answer that ended before the model ended it."""
        return self.role == "assistant" and self.state in UNFINISHED and bool(self.text)


def dump(value: Mapping[str, Any]) -> str:
    """JSON that SQLite takes: half a surrogate pair is escaped."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace").decode()


def load_object(text: str | None) -> dict[str, Any]:
    """A JSON object from the database; anything else counts as empty, so one bad cell does not lose a conversation."""
    try:
        value = json.loads(text) if text else {}
    except (ValueError, TypeError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


# What the details of a message must be where they are there at all; others are shown by nobody or compared only.
_DETAILS: Mapping[str, type] = {
    **dict.fromkeys(("model", "name", "mode"), str),
    **dict.fromkeys(("seen_from", "prompt_tokens", "completion_tokens"), int),
    **dict.fromkeys(("adapters", "spans", "stretches", "tools"), list),
    **dict.fromkeys(("facts", "sampling"), dict),
}
_ENTRIES: Mapping[str, type] = {"adapters": dict, "spans": int, "stretches": dict}


def sound_details(value: Any) -> dict[str, Any]:
    """The details of a message as far as they can be used; they come from files that others may have written."""
    details = value if isinstance(value, dict) else {}
    return {name: value for name, value in details.items() if _is_sound(name, value)}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < 1e6


def _is_sound(name: str, value: Any) -> bool:
    if is_deep(value):
        return False
    kind = _DETAILS.get(name)
    if value is None or kind is None:
        return True
    if not isinstance(value, kind):
        return False
    entry, entries = _ENTRIES.get(name), list(value) if isinstance(value, list) else []
    if entry is not None and not all(isinstance(one, entry) for one in entries):
        return False
    return name != "adapters" or all(_is_number(one.get("scale") or 1) for one in entries)


@dataclass(slots=True)
class Tree:
    """One open conversation: its head and every message on every branch.

    It is the truth while it is open; the database follows. What could not be written stays in `unsaved` and is tried
    again with the next change, so a full disk costs nothing but the saving.
    """

    conversation: Conversation
    messages: dict[int, StoredMessage] = field(default_factory=dict)
    unsaved: set[int] = field(default_factory=set)
    head_unsaved: set[str] = field(default_factory=set)  # names of fields: another window's change to others stays
    generation: int = 0  # of the file it was last written to

    @property
    def leaf(self) -> int | None:
        return self.conversation.leaf

    def path(self, leaf: int | None = None) -> list[StoredMessage]:
        """The open branch from the first message to the last, clear marks in it, deleted messages left out."""
        branch: list[StoredMessage] = []
        seen: set[int] = set()
        at = self.leaf if leaf is None else leaf
        while at is not None and at in self.messages and at not in seen:  # a damaged file may hold a ring
            seen.add(at)
            message = self.messages[at]
            if message.deletion is None:
                branch.append(message)
            at = message.parent
        branch.reverse()
        return branch

    def context(self, leaf: int | None = None) -> list[StoredMessage]:
        """What the open branch, or the one that ends at `leaf`, holds below its last clear mark."""
        path = self.path(leaf)
        start = max((i + 1 for i, m in enumerate(path) if m.is_clear), default=0)
        return path[start:]

    def message(self, number: int, role: str | None = None) -> StoredMessage:
        """The message of that number. Raises Usage if there is none, it is deleted, or another one said it."""
        message = self.messages.get(number)
        if message is None or message.deletion is not None or (role is not None and message.role != role):
            raise Usage(
                tr("there is no such message in this conversation"),
                hint=tr("choose one that is shown"),
                code="chat.no_message",
            )
        return message

    def question(self, number: int | None) -> StoredMessage:
        """The question that a message answers; None: the last one of the open branch. Raises Usage if there is none."""
        if number is not None:
            at: StoredMessage | None = self.message(number)
            while at is not None and at.role != "user":
                at = self.messages.get(at.parent) if at.parent is not None else None
        else:
            at = next((m for m in reversed(self.context()) if m.role == "user"), None)
        if at is None:
            raise Usage(
                tr("there is no question to answer again"),
                hint=tr("ask something first"),
                code="chat.nothing_to_answer",
            )
        return at

    def siblings(self, message: StoredMessage) -> list[StoredMessage]:
        """The versions of one message, oldest first, itself among them."""
        return sorted(
            (
                m
                for m in list(self.messages.values())  # another thread may be adding
                if m.parent == message.parent and m.role == message.role and m.deletion is None
            ),
            key=lambda m: m.id,
        )

    def tip(self, message: StoredMessage) -> StoredMessage:
        """The last message of the branch through `message` that was open last."""
        children: dict[int, list[int]] = {}
        for m in list(self.messages.values()):
            if m.parent is not None and m.deletion is None:
                children.setdefault(m.parent, []).append(m.id)
        seen: set[int] = set()
        while (below := children.get(message.id)) and message.id not in seen:
            seen.add(message.id)
            message = self.messages[message.chosen if message.chosen in below else max(below)]
        return message

    def put(self, message: StoredMessage) -> StoredMessage:
        """Add or replace a message; its parent remembers it as the open one."""
        is_here = message.id in self.messages
        self.messages[message.id] = message
        self.unsaved.add(message.id)
        if not is_here and message.parent in self.messages:
            self.choose(self.messages[message.parent], message.id)
        return message

    def choose(self, parent: StoredMessage, child: int) -> None:
        if parent.chosen != child:
            self.messages[parent.id] = replace(parent, chosen=child)
            self.unsaved.add(parent.id)

    def change_head(self, **values: Any) -> None:
        self.head_unsaved |= {name for name, value in values.items() if value != getattr(self.conversation, name)}
        self.conversation = replace(self.conversation, **values)


def title_from(question: str) -> str:
    """The first line of the first question that says something."""
    line = next((line.strip() for line in question.splitlines() if line.strip()), "")
    return one_line(line, 60)


# The rows of the two tables, as database.py selects them.


def ids_of(cell: bytes | None) -> TokenIds:
    """A damaged cell loses its last, cut number at most."""
    return TokenIds(packed=cell[: len(cell) // 4 * 4] if cell else b"")


def to_conversation(row: Sequence[Any]) -> Conversation:
    """A cell of another type than its column's counts as empty: SQLite lets anybody write anything anywhere."""
    id_, title, renamed, model, created, updated, sequence, pinned, settings, draft, leaf, count = row
    chosen = _sound_settings(load_object(settings))
    times = (_time(created), _time(updated), sequence)
    model = model if isinstance(model, str) else None
    words, leaf = (_words(title), _words(draft)), _number(leaf)
    return Conversation(id_, words[0], model, *times, bool(pinned), chosen, words[1], leaf, count, bool(renamed))


def _sound_settings(data: Mapping[str, Any]) -> ConversationSettings:
    """One setting that cannot be does not cost the others."""
    sound = {}
    for name, value in data.items():
        try:
            ConversationSettings.from_json({name: value})
            sound[name] = value
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, Usage):
            continue
    return ConversationSettings.from_json(sound)


def _words(cell: Any) -> str:
    return cell if isinstance(cell, str) else ""


def _number(cell: Any) -> int | None:
    return cell if isinstance(cell, int) else None


def _time(cell: Any) -> float:
    """Seconds since 1970, within the years that a date can have."""
    return float(cell) if isinstance(cell, int | float) and 0 <= cell < LAST_TIME else 0.0


def to_message(row: Sequence[Any]) -> StoredMessage:
    id_, conversation, parent, role, text, state, created, ids, details, chosen, deletion, owner = row
    ids, details = ids_of(ids if isinstance(ids, bytes) else None), sound_details(load_object(details))
    text, created, owner = _words(text), _time(created), owner if isinstance(owner, str) else None
    parent, chosen, deletion = _number(parent), _number(chosen), _number(deletion)
    ending: State = state if state in get_args(State) else "complete"
    return StoredMessage(id_, conversation, parent, role, text, ending, created, ids, details, chosen, deletion, owner)
