"""One conversation with one model: ask, stop, regenerate, edit, continue, and the database right at every moment.

    session = ChatSession(history, endpoint)
    for event in session.ask("hello"):      # Begun, perhaps Trimmed, Started, Piece…, Finished, Done
        ...

Iterate in a worker thread; `stop()` may be called from any other. Closing the generator stops too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from glmchat.chat import context
from glmchat.chat.answering import Answer, Begun, Done, Pump, SessionEvent, Source, Speaker, Trimmed, Writing, relay
from glmchat.chat.client.endpoint import Stop
from glmchat.chat.conversing import Conversing, ModelIdentity, already_streaming
from glmchat.chat.history.history import History
from glmchat.chat.history.rows import StoredMessage
from glmchat.chat.sampling_choice import ChosenSampling, SamplingRanks
from glmchat.core.errors import GlmchatError, ServerFailed, Usage
from glmchat.core.language import tr
from glmchat.core.messages import Message, Sampling
from glmchat.hub.adapters import is_forced

__all__ = ["Answer", "Begun", "ChatSession", "Done", "ModelIdentity", "SessionEvent", "Speaker", "Trimmed"]


class ChatSession(Conversing):
    """See the module. `tree` is the open conversation; the window reads its messages from there."""

    def __init__(
        self,
        history: History,
        endpoint: Speaker | None,
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
        super().__init__(
            history,
            conversation,
            identity=identity,
            ranks=ranks,
            system=system,
            default_system=default_system,
            adapters=adapters,
            context_policy=context_policy,
        )
        self._endpoint = endpoint
        self._counts = True  # until the server says that it cannot count tokens

    def reconnect(self, endpoint: Speaker | None, identity: ModelIdentity | None = None) -> None:
        """Another engine, or the same one started anew; the conversation stays."""
        self._endpoint = endpoint
        self._counts = True
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
            self._endpoint,
            conversation,
            identity=self.identity,
            ranks=SamplingRanks({origin: dict(asked) for origin, asked in self.ranks.asked.items()}),
            system=self._flag_system,
            default_system=self.default_system,
            adapters=self._flag_adapters,
            context_policy=self.default_policy,
        )

    # Answers.

    def stop(self) -> None:
        """End the running answer and keep what was said. May be called from any thread."""
        self._switch.now()

    def ask(self, text: str) -> Answer:
        """Store the question, then ask the model. Raises GlmchatError; what was said until then is kept."""
        with self._speaking():
            self.history.refresh(self.tree)
            question = self.history.append(self.tree, "user", text)
            self.history.save_draft(self.tree, "")
            yield from self._answer(question, asked=True)

    def ask_messages(self, messages: Sequence[Message]) -> Answer:
        """Ask with a whole conversation as it is given, nothing added, merged or dropped. Raises DoesNotFit."""
        if not messages:
            raise Usage(tr("there are no messages"), hint=tr("give at least one"), code="chat.no_messages")
        with self._speaking():
            stored = []
            for message in messages:
                extra = {key: value for key, value in message.to_json().items() if key in ("name", "tools")}
                stored.append(self.history.append(self.tree, message.role, message.content, details=extra or None))
            yield from self._answer(stored[-1], asked=True, verbatim=tuple(messages))

    def complete(self, text: str) -> Answer:
        """Completion mode: the model goes on with this text, without chat template, system prompt or earlier turns."""
        with self._speaking():
            question = self.history.append(self.tree, "user", text, details={"mode": context.COMPLETION})
            yield from self._answer(question, asked=True)

    def edit(self, message: int, text: str) -> Answer:
        """Ask an earlier question in other words, on a branch of its own; the old branch is kept."""
        old = self._message(message, "user")
        with self._speaking():
            if old.parent is None:
                question = self.history.append_root(self.tree, "user", text)
            else:
                question = self.history.append(self.tree, "user", text, parent=old.parent)
            yield from self._answer(question, asked=True)

    def regenerate(self, changes: Mapping[str, Any] | None = None, message: int | None = None) -> Answer:
        """Another answer to the last question (or the one that `message` answers), beside the old one.

        changes: sampling for this answer alone, field -> value.
        """
        question = self._question(message)
        with self._speaking():
            yield from self._answer(question, asked=False, only_now=changes)

    def continue_answer(self, message: int | None = None) -> Answer:
        """Go on with a stopped, cut or interrupted answer from its last token. Raises Usage if there is none."""
        path = self.tree.path()
        last = self._message(message, "assistant") if message is not None else (path[-1] if path else None)
        if last is None or not last.can_continue or not path or path[-1].id != last.id:
            raise Usage(
                tr("there is no unfinished answer to continue"),
                hint=tr("/regen asks for another answer"),
                code="chat.nothing_to_continue",
            )
        with self._speaking():
            yield from self._continue(last)

    # Context.

    def measure(self, draft: str = "") -> context.Request:
        """What the next request would hold, were `draft` sent now: exact tokens, and which messages fall out.

        Asks the engine; call it from a worker. Raises DoesNotFit.
        """
        stored = self.tree.context()
        if draft:
            stored = [*stored, StoredMessage(-1, self.tree.conversation.id, self.tree.leaf, "user", draft)]
        return self._request(stored, self.sampling().sampling)

    def _request(
        self,
        stored: Sequence[StoredMessage],
        sampling: Sampling,
        drop_at_least: int = 0,
        *,
        continue_final: bool = False,
    ) -> context.Request:
        return context.fit(
            self.system_prompt,
            stored,
            lambda messages: self._count(messages, continue_final),
            self.identity.context,
            max_tokens=sampling.max_tokens,
            policy=self.context_policy,
            drop_at_least=drop_at_least,
        )

    def _as_given(self, messages: tuple[Message, ...]) -> context.Request:
        tokens, limit = self._count(messages, False), self.identity.context
        if tokens is not None and limit is not None and tokens >= limit:
            raise context.too_long(tokens, limit)
        return context.Request(messages, (), tokens, limit)

    def _count(self, messages: Sequence[Message], continue_final: bool) -> int | None:
        """Tokens of the rendered request; None once the server has said that it cannot count."""
        endpoint = self._connected()
        if not self._counts or not messages:
            return None
        try:
            return len(endpoint.tokenize(messages, continue_final=continue_final))
        except ServerFailed:
            if endpoint.is_local:
                raise
            self._counts = False
            return None

    # The stream.

    def _connected(self) -> Speaker:
        if self._endpoint is None:
            raise Usage(tr("no model is running"), hint=tr("/model chooses one"), code="chat.no_model")
        return self._endpoint

    @property
    def _decides(self) -> bool:
        """True where our defaults hold: the model is loaded here. A server has its own."""
        return self._endpoint is None or self._endpoint.is_local

    @contextmanager
    def _speaking(self) -> Iterator[None]:
        if not self._switch.take():
            raise already_streaming()
        try:
            yield
        finally:
            self._switch.give_back()

    def _answer(
        self,
        question: StoredMessage,
        *,
        asked: bool,
        only_now: Mapping[str, Any] | None = None,
        verbatim: tuple[Message, ...] | None = None,
    ) -> Answer:
        """A new answer below `question`."""
        chosen = self.sampling(only_now)
        details = self._details(chosen)
        if context.is_completion(question):
            details |= {"mode": context.COMPLETION, "system": None}
        answer = self.history.begin_answer(self.tree, parent=question.id, details=details)
        stored = self._seen(question.id)
        yield from self._run(question if asked else None, answer, stored, chosen, details, verbatim=verbatim)

    def _continue(self, unfinished: StoredMessage) -> Answer:
        """More of an answer that stands already."""
        chosen = self.sampling()
        stored = self._seen(unfinished.id)
        answer = self.history.reopen_answer(self.tree, unfinished)
        # Where each stretch of a continued answer begins, in token ids: a replay repeats the stretches.
        spans = [*(unfinished.details.get("spans") or [0]), len(unfinished.token_ids)]
        details = {**answer.details, **self._details(chosen), "spans": spans}
        yield from self._run(None, answer, stored, chosen, details, continued=unfinished)

    def _details(self, chosen: ChosenSampling) -> dict[str, Any]:
        """What the answer is made with. What a server decides by itself is not known and not written down."""
        told = [f.name for f in fields(Sampling) if self._decides or f.name in chosen.asked]
        return {
            "model": self.identity.model,
            "revision": self.identity.revision,
            "quant": self.identity.quant,
            "family": self.identity.family,
            "adapters": [
                {"name": name, "scale": scale, **({"forced": True} if is_forced(name) else {})}
                for name, scale in self.adapters
            ],
            "sampling": {name: _plain(getattr(chosen.sampling, name)) for name in told},
            "system": self.system_prompt,
            "launch": dict(self.identity.launch) if self.identity.launch else None,
        }

    def _run(
        self,
        question: StoredMessage | None,
        answer: StoredMessage,
        stored: Sequence[StoredMessage],
        chosen: ChosenSampling,
        details: dict[str, Any],
        continued: StoredMessage | None = None,
        verbatim: tuple[Message, ...] | None = None,
    ) -> Answer:
        writing = Writing(self.history, self.tree, answer, details)
        try:
            yield Begun(question, answer)
            yield from self._stream(stored, chosen, writing, continued, verbatim)
        except (GeneratorExit, KeyboardInterrupt):
            writing.end("stopped")
            raise
        except GlmchatError as error:
            if continued is not None and not writing.said:
                writing.end(continued.state)  # nothing has changed: it can be continued still
            else:
                writing.end("failed", {"error": error.to_json()})
            raise
        except BaseException:
            writing.end("failed")
            raise
        yield Done(self.tree.messages[answer.id])

    def _stream(
        self,
        stored: Sequence[StoredMessage],
        chosen: ChosenSampling,
        writing: Writing,
        continued: StoredMessage | None,
        verbatim: tuple[Message, ...] | None,
    ) -> Answer:
        """Send the request; where a server that cannot count says it is too long, again without its oldest turns."""
        endpoint = self._connected()
        refused = 0
        while True:
            text = _completed_text(stored, continued)
            if text is not None:
                request = context.Request((), self.unseen)
            elif verbatim is None:
                request = self._request(stored, chosen.sampling, refused, continue_final=continued is not None)
            else:
                request = self._as_given(verbatim)
            writing.details["seen_from"] = next((m.id for m in stored if m.id not in request.unseen), None)
            if request.unseen != self.unseen:
                self.unseen = request.unseen
                yield Trimmed(request.unseen, request.tokens, request.limit)
            connection = self._switch.connection()
            pump = Pump(self._source(endpoint, request, chosen, connection, continued, text))
            try:
                yield from relay(pump, writing, self._switch)
            except GlmchatError as error:
                last = len(context.turns(stored)) - 1
                again = context.is_overflow(error) and request.tokens is None and not writing.said
                if not again or verbatim or self.context_policy != "drop" or refused >= last:
                    raise
                refused = min(last, max(1, refused * 2))
            except (GeneratorExit, KeyboardInterrupt):
                connection.now()
                raise
            else:
                return

    def _source(
        self,
        endpoint: Speaker,
        request: context.Request,
        chosen: ChosenSampling,
        connection: Stop,
        continued: StoredMessage | None,
        text: str | None,
    ) -> Source:
        # A server that was asked for an adapter by model name keeps it.
        adapters = self.adapters if self.adapters or endpoint.is_local else None
        sampling, asked = chosen.sampling, None if self._decides else chosen.asked
        if text is not None:
            return lambda report: endpoint.complete(
                text, sampling, adapters, asked=asked, stop=connection, on_progress=report
            )
        ids: Sequence[int] = ()
        if continued is not None and continued.details.get("model") == self.identity.model:
            ids = continued.token_ids  # another model's ids mean other words
        return lambda report: endpoint.stream(
            request.messages,
            sampling,
            adapters,
            continued is not None,
            continue_ids=ids,
            asked=asked,
            stop=connection,
            on_progress=report,
        )


def _completed_text(stored: Sequence[StoredMessage], continued: StoredMessage | None) -> str | None:
    """In completion mode the text to go on with; None for a chat turn."""
    question = next((m for m in reversed(stored) if m.role == "user"), None)
    if question is None or not context.is_completion(question):
        return None
    return question.text + (continued.text if continued else "")


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    return list(value) if isinstance(value, tuple) else value
