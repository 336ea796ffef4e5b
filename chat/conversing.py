"""The open conversation: its settings, its branches, and every change to it that no model is needed for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from glmchat.chat.answering import Switch
from glmchat.chat.history.history import History
from glmchat.chat.history.rows import ConversationSettings, StoredMessage, Tree
from glmchat.chat.sampling_choice import ChosenSampling, SamplingRanks
from glmchat.core.errors import Usage
from glmchat.core.language import tr
from glmchat.core.messages import parse_sampling_value, sampling_name


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """What answers, as far as it is known; goes into the details of each answer."""

    model: str | None = None
    revision: str | None = None
    quant: str | None = None
    context: int | None = None  # tokens the model's context holds
    family: str | None = None
    launch: Mapping[str, Any] | None = None  # of a model loaded here: folder and precision asked for, for replays


class Conversing:
    """Base of `ChatSession` (chat/session.py), which adds what answers."""

    def __init__(
        self,
        history: History,
        conversation: int | None,
        *,
        identity: ModelIdentity | None,
        ranks: SamplingRanks | None,
        system: str | None,
        default_system: str | None,
        adapters: Sequence[tuple[str, float]] | None,
        context_policy: str,
    ) -> None:
        self.history = history
        self.identity = identity or ModelIdentity()
        self.ranks = ranks or SamplingRanks()
        self.default_system = default_system
        self.default_policy = context_policy
        self.unseen: tuple[int, ...] = ()  # ids of messages that the last request left out
        self.tree: Tree
        self._flag_system = system
        self._flag_adapters = None if adapters is None else tuple(adapters)
        self._switch = Switch()
        if conversation is None:
            self.new()
        else:
            self.open(conversation)

    @property
    def streaming(self) -> bool:
        return self._switch.busy

    # Which conversation.

    def new(self) -> Tree:
        """Another conversation; the one before stays in the history."""
        self.ranks.asked.pop("set", None)
        self.tree = self.history.new(self.identity.model)
        self._opened()
        return self.tree

    def open(self, conversation: int) -> Tree:
        """Go on with an earlier conversation, with its settings. Raises Usage if it is unknown."""
        self.tree = self.history.load(conversation)
        self.ranks.asked.pop("set", None)
        self._opened()
        return self.tree

    def _opened(self) -> None:
        self.unseen = self._last_unseen()
        settings = self.settings
        if self._flag_system is not None:
            settings = replace(settings, system=self._flag_system)
        if self._flag_adapters is not None:
            settings = replace(settings, adapters=self._flag_adapters)
        self.ranks.asked["conversation"] = dict(settings.sampling)
        self._change(settings)

    def _last_unseen(self) -> tuple[int, ...]:
        """What the last answer of the open branch was given without."""
        seen = self.tree.context()
        first = next((m.details.get("seen_from") for m in reversed(seen) if m.role == "assistant"), None)
        ids = [m.id for m in seen]
        return tuple(ids[: ids.index(first)]) if first in ids else ()

    def refresh(self) -> bool:
        """Take over what another window wrote to this conversation; True if anything changed."""
        return not self.streaming and self.history.refresh(self.tree)

    # Settings.

    @property
    def settings(self) -> ConversationSettings:
        return self.tree.conversation.settings

    def _change(self, settings: ConversationSettings) -> None:
        if settings != self.settings:
            self.history.change(self.tree, settings=settings)

    def sampling(self, only_now: Mapping[str, Any] | None = None) -> ChosenSampling:
        """The values the next answer is made with, and where each comes from."""
        return self.ranks.choose(only_now)

    def set(self, name: str, value: str | int | float | tuple[str, ...] | None) -> ChosenSampling:
        """`/set top_p 0.8`: holds from the next answer on, for this conversation. Raises Usage, changing nothing.

        The later word of the same person counts: a flag of the same name gives way.
        """
        field = sampling_name(name)
        parsed = parse_sampling_value(field, value) if isinstance(value, str) else value
        self.ranks.choose({field: parsed})
        self.ranks.rank("flag").pop(field, None)
        self.ranks.rank("set")[field] = parsed
        self._change(replace(self.settings, sampling={**self.settings.sampling, field: parsed}))
        return self.sampling()

    def reset(self, name: str | None = None) -> ChosenSampling:
        """Forget what was set in this conversation, one field or all; the lower ranks hold again."""
        fields = None if name is None else {sampling_name(name)}
        kept = {k: v for k, v in self.settings.sampling.items() if fields is not None and k not in fields}
        for rank in (self.ranks.rank("set"), self.ranks.rank("conversation")):
            for field in list(rank):
                if fields is None or field in fields:
                    del rank[field]
        self._change(replace(self.settings, sampling=kept))
        return self.sampling()

    @property
    def system_prompt(self) -> str | None:
        own = self.settings.system
        return (own or None) if own is not None else self.default_system

    def system(self, text: str | None) -> None:
        """`/system TEXT`; "" switches the config's off, None leaves the choice to the config."""
        self._change(replace(self.settings, system=text))

    @property
    def adapters(self) -> tuple[tuple[str, float], ...]:
        return self.settings.adapters

    def use_adapters(self, adapters: Sequence[tuple[str, float]]) -> None:
        self._change(replace(self.settings, adapters=tuple(adapters)))

    @property
    def context_policy(self) -> str:
        return self.settings.context_policy or self.default_policy

    def set_context_policy(self, policy: str) -> None:
        """ "drop" or "refuse". Raises Usage for another word."""
        if policy not in ("drop", "refuse"):
            raise Usage(
                tr("there is no policy {policy!r}", policy=policy), hint=tr("drop or refuse"), code="context.policy"
            )
        self._change(replace(self.settings, context_policy=policy))

    # Changes to what was said.

    def undo(self) -> int:
        """Take back the last question with its answer; the number is for `restore`. Raises Usage if there is none."""
        self._must_be_quiet()
        path = self.tree.path()
        start = next((i for i in range(len(path) - 1, -1, -1) if path[i].role == "user"), None)
        if start is None:
            raise Usage(tr("there is nothing to undo"), hint=tr("ask something first"), code="chat.nothing_to_undo")
        before = path[start - 1].id if start else None
        return self.history.delete_messages(self.tree, path[start:], leaf=before)

    def delete(self, message: int) -> int:
        """Delete one message, a question with its answers. The number is for `restore`.

        At the end of the conversation another version of it comes into view, if there is one.
        """
        self._must_be_quiet()
        target = self._message(message)
        doomed = [target]
        if target.role == "user":
            doomed += [m for m in self.tree.messages.values() if m.parent == target.id and m.role == "assistant"]
        others = [m for m in self.tree.siblings(target) if m.id != target.id]
        was_last = self.tree.leaf in {m.id for m in doomed}
        deletion = self.history.delete_messages(self.tree, doomed, leaf=self.tree.leaf)
        if was_last and others:
            self.history.open_branch(self.tree, others[-1])
        return deletion

    def restore(self, deletion: int) -> None:
        """Undo a deletion or an undo."""
        self._must_be_quiet()
        self.history.restore(deletion, self.tree)

    def clear(self) -> StoredMessage | None:
        """`/clear`: the model sees nothing above; nothing is deleted. None if the context is empty already."""
        self._must_be_quiet()
        if not self.tree.context():
            return None
        self.unseen = ()
        return self.history.append_clear(self.tree)

    def branches(self, message: int) -> tuple[list[StoredMessage], int]:
        """All versions of a message, oldest first, and which of them this one is."""
        versions = self.tree.siblings(self._message(message))
        return versions, [m.id for m in versions].index(message)

    def switch(self, message: int) -> None:
        """Open the branch through that version, as deep as it was left."""
        self._must_be_quiet()
        self.history.open_branch(self.tree, self._message(message))

    # What the parts above share.

    def _must_be_quiet(self) -> None:
        if self.streaming:
            raise already_streaming()

    def _message(self, message: int, role: str | None = None) -> StoredMessage:
        found = self.tree.messages.get(message)
        if found is None or found.deletion is not None or (role is not None and found.role != role):
            raise Usage(
                tr("there is no such message in this conversation"),
                hint=tr("choose one that is shown"),
                code="chat.no_message",
            )
        return found

    def _question(self, message: int | None) -> StoredMessage:
        """The question that `message` answers; None: the last question of the open branch."""
        if message is not None:
            at: StoredMessage | None = self._message(message)
            while at is not None and at.role != "user":
                at = self.tree.messages.get(at.parent) if at.parent is not None else None
        else:
            at = next((m for m in reversed(self.tree.context()) if m.role == "user"), None)
        if at is None:
            raise Usage(
                tr("there is no question to answer again"),
                hint=tr("ask something first"),
                code="chat.nothing_to_answer",
            )
        return at

    def _seen(self, leaf: int) -> list[StoredMessage]:
        """The branch that ends at `leaf`, from its last clear mark on."""
        path = self.tree.path(leaf)
        start = max((i + 1 for i, m in enumerate(path) if m.is_clear), default=0)
        return path[start:]


def already_streaming() -> Usage:
    return Usage(tr("an answer is being written"), hint=tr("stop it first (Esc)"), code="chat.busy")
