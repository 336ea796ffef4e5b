"""One conversation with one model: ask, stop, regenerate, edit, continue, and the database right at every moment.

    session = ChatSession(history, endpoint)
    for event in session.ask("hello"):      # perhaps WentOn, Begun, perhaps Trimmed, Started, Piece…, Finished, Done
        ...

Iterate in a worker thread; `stop()` may be called from any other. Closing the generator stops too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

from glmchat.chat.answering import Answer, Begun, Done, SeenContext, SessionEvent, Trimmed, WentOn
from glmchat.chat.client.endpoint import Endpoint, Stop
from glmchat.chat.context import COMPLETION, ContextParts, Request, is_completion
from glmchat.chat.history.history import History
from glmchat.chat.history.owners import SILENT_SECONDS
from glmchat.chat.history.rows import ConversationSettings, StoredMessage, Tree, title_from
from glmchat.chat.sampling_choice import ChosenSampling, SamplingRanks
from glmchat.chat.trained import trained_system
from glmchat.chat.turns import AnswerSettings, ModelIdentity, Turns, already_streaming
from glmchat.core.errors import Usage
from glmchat.core.language import tr
from glmchat.core.messages import Message, parse_sampling_value, sampling_name
from glmchat.core.processes import machine_of
from glmchat.core.text import one_line

_QUESTIONS = 3  # of a conversation that has no title yet
__all__ = ["Answer", "Begun", "ChatSession", "Done", "ModelIdentity", "SessionEvent", "Trimmed", "WentOn"]


class ChatSession:
    """See the module. `tree` is the open conversation; the window reads its messages from there."""

    def __init__(
        self,
        history: History,
        endpoint: Endpoint | None,
        conversation: int | None = None,
        *,
        identity: ModelIdentity | None = None,
        ranks: SamplingRanks | None = None,
        system: str | None = None,
        default_system: str | None = None,
        adapters: Sequence[tuple[str, float]] | None = None,
        context_policy: str = "drop",
    ) -> None:
        """endpoint None: not there yet (`reconnect` brings it). Raises Usage for an unknown conversation.

        system, adapters: from flags; they become the conversation's. default_system: from the config.
        """
        self.history = history
        self.identity = identity or ModelIdentity()
        self.ranks = ranks or SamplingRanks()
        self.default_system = default_system
        self.default_policy = context_policy
        self.tree: Tree
        self._flag_system = system
        self._flag_adapters = None if adapters is None else tuple(adapters)
        self._turns = Turns(history, endpoint)
        if conversation is None:
            self.new()
        else:
            self.open(conversation)

    def reconnect(self, endpoint: Endpoint | None, identity: ModelIdentity | None = None) -> None:
        """Another engine, or the same one started anew; the conversation stays."""
        self._turns.connect(endpoint)
        if identity is not None:
            self.identity = identity
            if self.tree.messages:
                self.history.change(self.tree, model=identity.model)
            else:
                self.tree.change_head(model=identity.model)

    def beside(self, conversation: int | None = None) -> ChatSession:
        """A session for another conversation (None: a new one) with the same model; an answer of this one goes on.

        Raises Usage if the conversation is unknown.
        """
        return ChatSession(
            self.history,
            self._turns.endpoint,
            conversation,
            identity=self.identity,
            ranks=SamplingRanks({origin: dict(asked) for origin, asked in self.ranks.asked.items()}),
            system=self._flag_system,
            default_system=self.default_system,
            adapters=self._flag_adapters,
            context_policy=self.default_policy,
        )

    @property
    def streaming(self) -> bool:
        return self._turns.switch.busy

    @property
    def unseen(self) -> tuple[int, ...]:
        """Ids of the messages that the last request left out."""
        return self._turns.seen.unseen

    @property
    def decides(self) -> bool:
        """True where our defaults hold, since the model is loaded here; a server has its own."""
        return self._turns.decides

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
        self._turns.seen = SeenContext(self._last_unseen())
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
        """Take over what another window did to this conversation; True if its open branch reads otherwise now."""
        return not self.streaming and self._take_over() is not None

    def _take_over(self) -> tuple[StoredMessage, ...] | None:
        """The messages of the open branch that were not there, or read otherwise; None if it is as it was."""
        before, settings = self.tree.path(), self.settings
        if not self.history.refresh(self.tree):
            return None
        if self.settings != settings:  # the later word counts, whoever said it
            self.ranks.asked["conversation"] = dict(self.settings.sampling)
            self.ranks.asked.pop("set", None)
        after = self.tree.path()
        return tuple(m for m in after if m not in before) if after != before else None

    def writer_elsewhere(self) -> str | None:
        """Another window, or a process whose terminal is gone, that writes an answer in this conversation now.

        The name of its machine, "" for this one; None where nobody does.
        """
        owner = self.history.writer_elsewhere(self.tree)
        return None if owner is None else machine_of(owner) or ""

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

    def set(self, name: str, value: str | int | float | tuple[str, ...] | Mapping[str, Any] | None) -> ChosenSampling:
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
        remaining = {k: v for k, v in self.settings.sampling.items() if fields is not None and k not in fields}
        for rank in (self.ranks.rank("set"), self.ranks.rank("conversation")):
            for field in list(rank):
                if fields is None or field in fields:
                    del rank[field]
        self._change(replace(self.settings, sampling=remaining))
        return self.sampling()

    @property
    def system_prompt(self) -> str | None:
        """What somebody set in this conversation; else what its adapters were trained with; else the config's."""
        if (own := self.settings.system) is None and self.decides and self.adapters:
            own = trained_system(self.adapters)
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

    def mark_one_shot(self) -> None:
        """A conversation that nobody means to go on with: lists leave it out until somebody does."""
        self._change(replace(self.settings, one_shot=True))

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
        target = self.tree.message(message)
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
        self._turns.seen = SeenContext()
        return self.history.append_clear(self.tree)

    def branches(self, message: int) -> tuple[list[StoredMessage], int]:
        """All versions of a message, oldest first, and which of them this one is."""
        versions = self.tree.siblings(self.tree.message(message))
        return versions, [m.id for m in versions].index(message)

    def switch(self, message: int) -> None:
        """Open the branch through that version, as deep as it was left."""
        self._must_be_quiet()
        self.history.open_branch(self.tree, self.tree.message(message))

    @property
    def wants_title(self) -> bool:
        """Its title is the first words of a question still, and has been answered. Later it is known by them."""
        head, path = self.tree.conversation, self.tree.path()
        asked = [m for m in path if m.role == "user" and not is_completion(m)]
        is_answered = bool(path) and path[-1].role == "assistant" and path[-1].state in ("complete", "cut")
        is_new = is_answered and 0 < len(asked) <= _QUESTIONS
        return is_new and not head.renamed and head.title == title_from(asked[0].text)

    def wants_title_by(self, titles: str) -> bool:
        """And the setting lets this model write it: "local" (an engine of ours), "always" (a server too) or "never"."""
        return (titles == "always" or (titles == "local" and self.decides)) and self.wants_title

    def write_title(self, stop: Stop, is_free: Callable[[int], bool]) -> bool:
        """Have the model write a title, for as long as it is free; True if the conversation has it now.

        Asks the engine; call it from a worker. Raises GlmchatError.
        """
        tree = self.tree
        title = self._turns.title(tree, self.answer_settings(), stop, is_free)
        return title is not None and self.history.give_title(tree, title)

    # What the parts above share.

    def _must_be_quiet(self) -> None:
        if self.streaming:
            raise already_streaming()
        self._refuse_beside_another()

    def _refuse_beside_another(self) -> None:
        owner = self.history.writer_elsewhere(self.tree)
        if owner is None:
            return
        if (machine := machine_of(owner)) is not None:
            raise Usage(
                tr("an answer is being written in this conversation on {machine}", machine=one_line(machine, 60)),
                hint=tr(
                    "a window goes on after {n} seconds without a sign of it; /new starts another",
                    n=round(SILENT_SECONDS),
                ),
                code="chat.elsewhere",
            )
        raise Usage(
            tr("another window is writing an answer in this conversation"),
            hint=tr("try again when it is finished, or start a new conversation with /new"),
            code="chat.elsewhere",
        )

    # Answers.

    def stop(self) -> None:
        """End the running answer and keep what was said. May be called from any thread."""
        self._turns.switch.now()

    def ask(self, text: str) -> Answer:
        """Store the question, then ask the model. Raises GlmchatError; what was said until then is kept.

        Raises Usage, storing nothing, while another window writes an answer here.
        """
        with self._turns.one_at_a_time():
            news, events = self.history.together(self.tree, lambda: self._begin(text))
            with closing(events):
                if news is not None:
                    begun = next(events)
                    yield news
                    yield begun
                yield from events

    def _begin(self, text: str) -> tuple[WentOn | None, Answer]:
        """What another window said meanwhile, and the answer to a question that stands below it now."""
        self._refuse_beside_another()
        taken, last = self._take_over(), self.tree.leaf
        self._change(replace(self.settings, one_shot=self.settings.one_shot and not self.tree.messages))
        question = self.history.append(self.tree, "user", text)
        if self.tree.conversation.draft == text:  # else it is of words that are still to be sent
            self.history.save_draft(self.tree, "")
        answer = self._turns.answer(self.tree, question, self.answer_settings(), asked=True)
        return None if taken is None else WentOn(taken, last), answer

    def ask_messages(self, messages: Sequence[Message]) -> Answer:
        """Ask with a whole conversation as it is given, nothing added, merged or dropped. Raises DoesNotFit."""
        if not messages:
            raise Usage(tr("there are no messages"), hint=tr("give at least one"), code="chat.no_messages")
        with self._turns.one_at_a_time():
            stored = []
            for message in messages:
                extra = {key: value for key, value in message.to_json().items() if key in ("name", "tools")}
                stored.append(self.history.append(self.tree, message.role, message.content, details=extra or None))
            yield from self._turns.answer(
                self.tree, stored[-1], self.answer_settings(), asked=True, verbatim=tuple(messages)
            )

    def complete(self, text: str) -> Answer:
        """Completion mode: the model goes on with this text, without chat template, system prompt or earlier turns."""
        with self._turns.one_at_a_time():
            question = self.history.append(self.tree, "user", text, details={"mode": COMPLETION})
            yield from self._turns.answer(self.tree, question, self.answer_settings(), asked=True)

    def edit(self, message: int, text: str) -> Answer:
        """Ask an earlier question in other words, on a branch of its own; the old branch is kept."""
        old = self.tree.message(message, "user")
        with self._turns.one_at_a_time():
            question = self.history.append(self.tree, "user", text, parent=old.parent, root=old.parent is None)
            yield from self._turns.answer(self.tree, question, self.answer_settings(), asked=True)

    def regenerate(self, changes: Mapping[str, Any] | None = None, message: int | None = None) -> Answer:
        """Another answer to the last question (or the one that `message` answers), beside the old one.

        changes: sampling for this answer alone, field -> value.
        """
        question = self.tree.question(message)
        with self._turns.one_at_a_time():
            yield from self._turns.answer(self.tree, question, self.answer_settings(changes), asked=False)

    def continue_answer(self, message: int | None = None) -> Answer:
        """Go on with a stopped, cut or interrupted answer from its last token. Raises Usage if there is none."""
        path = self.tree.path()
        last = self.tree.message(message, "assistant") if message is not None else (path[-1] if path else None)
        if last is None or not last.can_continue or not path or path[-1].id != last.id:
            raise Usage(
                tr("there is no unfinished answer to continue"),
                hint=tr("/regen asks for another answer"),
                code="chat.nothing_to_continue",
            )
        with self._turns.one_at_a_time():
            yield from self._turns.go_on(self.tree, last, self.answer_settings())

    # What the next answer is made with.

    def measure(self, draft: str = "") -> Request:
        """What the next request would hold, were `draft` sent now: exact tokens, and which messages fall out.

        Asks the engine; call it from a worker. tokens is None where the server cannot count. Raises DoesNotFit.
        """
        return self._turns.measure(self._with(draft), self.answer_settings())

    def weigh(self, draft: str = "") -> ContextParts:
        """The parts of that request. Asks the engine; call it from a worker."""
        return self._turns.weigh(self._with(draft), self.tree.path(), self.answer_settings())

    def _with(self, draft: str) -> list[StoredMessage]:
        stored = list(self.tree.context())
        if draft:
            stored.append(StoredMessage(-1, self.tree.conversation.id, self.tree.leaf, "user", draft))
        return stored

    def answer_settings(self, only_now: Mapping[str, Any] | None = None) -> AnswerSettings:
        """What the next answer is made with; `only_now`: sampling of that answer alone."""
        return AnswerSettings(
            self.identity, self.sampling(only_now), self.system_prompt, self.adapters, self.context_policy
        )
