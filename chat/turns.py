"""From a conversation to requests: what an answer is made with, what is sent for it, and that one runs at a time."""

from __future__ import annotations

import re
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Any

from glmchat.chat import context
from glmchat.chat.answering import Answer, AnswerRun, Prompt, SeenContext
from glmchat.chat.client.endpoint import Endpoint, Stop
from glmchat.chat.history.history import History
from glmchat.chat.history.rows import StoredMessage, Tree
from glmchat.chat.sampling_choice import ChosenSampling
from glmchat.chat.stream import AnswerLog, Source, Switch
from glmchat.core.errors import NetworkFailed, ServerFailed, Usage
from glmchat.core.language import tr
from glmchat.core.messages import Finished, Message, Piece, Sampling
from glmchat.core.text import is_chinese, show_controls
from glmchat.hub.adapters import is_forced


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """What answers, as far as it is known; goes into the details of each answer."""

    model: str | None = None
    revision: str | None = None
    quant: str | None = None
    context: int | None = None  # tokens the model's context holds
    family: str | None = None
    device: str | None = None  # "cpu", "cuda:1", "cuda:0,cuda:1"
    device_reason: str | None = None  # why there
    launch: Mapping[str, Any] | None = None  # of a model loaded here: folder and precision asked for, for replays


@dataclass(frozen=True, slots=True)
class AnswerSettings:
    """What an answer is made with. mark: further details of it."""

    identity: ModelIdentity
    sampling: ChosenSampling
    system: str | None
    adapters: tuple[tuple[str, float], ...]
    context_policy: str
    mark: Mapping[str, Any] = field(default_factory=dict)

    def details(self, *, is_local: bool) -> dict[str, Any]:
        """For the record of the answer. What a server decides by itself is not known and not written down."""
        sampling = {
            name: _plain(value)
            for name, value in self.sampling.sampling.to_json().items()
            if is_local or name in self.sampling.asked
        }
        return {
            "model": self.identity.model,
            "revision": self.identity.revision,
            "quant": self.identity.quant,
            "family": self.identity.family,
            "adapters": [
                {"name": name, "scale": scale, **({"forced": True} if is_forced(name) else {})}
                for name, scale in self.adapters
            ],
            "sampling": sampling,
            "system": self.system,
            "launch": dict(self.identity.launch) if self.identity.launch else None,
            **self.mark,
        }


class Turns:
    """What answers in a conversation: the endpoint, and what is known from one answer to the next."""

    def __init__(self, history: History, endpoint: Endpoint | None) -> None:
        """endpoint None: not there yet."""
        self.seen = SeenContext()
        self.switch = Switch()
        self._history = history
        self._endpoint = endpoint
        self._counts = True  # until the server says that it cannot count tokens

    @property
    def endpoint(self) -> Endpoint | None:
        return self._endpoint

    def connect(self, endpoint: Endpoint | None) -> None:
        """Another engine, or the same one started anew."""
        self._endpoint = endpoint
        self._counts = True
        self.seen.overflow = None

    @contextmanager
    def one_at_a_time(self) -> Iterator[None]:
        """Raises Usage while an answer is being written."""
        if not self.switch.take():
            raise already_streaming()
        try:
            yield
        finally:
            self.switch.give_back()

    def answer(
        self,
        tree: Tree,
        question: StoredMessage,
        settings: AnswerSettings,
        *,
        asked: bool,
        verbatim: tuple[Message, ...] | None = None,
    ) -> Answer:
        """A new answer below `question`. asked: it is a new one. verbatim: send these messages and nothing else."""
        details = settings.details(is_local=self.decides)
        if context.is_completion(question):
            details |= {"mode": context.COMPLETION, "system": None}
        answer = self._history.begin_answer(tree, parent=question.id, details=details)
        prompt = self._prompt(tree, question, settings, verbatim=verbatim)
        log, new = AnswerLog(self._history, tree, answer, details), question if asked else None
        return AnswerRun(tree, new, answer, prompt, log, self.switch, self.seen).events()

    def go_on(self, tree: Tree, unfinished: StoredMessage, settings: AnswerSettings) -> Answer:
        """More of an answer that stands already."""
        prompt = self._prompt(tree, unfinished, settings, continued=unfinished)
        answer = self._history.reopen_answer(tree, unfinished)
        # Where each stretch of a continued answer begins, in token ids: a replay repeats the stretches.
        spans = [*(unfinished.details.get("spans") or [0]), len(unfinished.token_ids)]
        details = {**answer.details, **settings.details(is_local=self.decides), "spans": spans}
        log = AnswerLog(self._history, tree, answer, details)
        return AnswerRun(tree, None, answer, prompt, log, self.switch, self.seen, continued=unfinished).events()

    def measure(self, stored: Sequence[StoredMessage], settings: AnswerSettings) -> context.Request:
        """What a request for these messages would hold. tokens is None where the server cannot count.

        Asks the server. Raises DoesNotFit.
        """
        fit = self._fit(stored, settings)
        while not fit.accepts(tokens := self._count(fit.messages, settings)) and tokens is not None:
            if not fit.can_drop:
                raise context.too_long(tokens, fit.limit or tokens)
            fit.drop(tokens, fit.most)
        return fit.request(tokens)

    def weigh(
        self, stored: Sequence[StoredMessage], path: Sequence[StoredMessage], settings: AnswerSettings
    ) -> context.ContextParts:
        """The parts of the request for `stored`, whose last message is a draft if its id is negative.

        path: the open branch with what stands above a new context. Each part is the difference of two requests that the
        server counts, so that together they are what it counts of the whole. Asks the server.
        """
        fit = self._fit(stored, settings)
        while not fit.accepts(tokens := self._count(fit.messages, settings)) and tokens is not None and fit.can_drop:
            fit.drop(tokens, fit.most)

        def count(messages: Sequence[StoredMessage], *more: Message) -> int | None:
            return self._count([*context.to_messages(settings.system, messages), *more], settings)

        asked = [m for m in path if m.role != "system"]
        kept = [m for m in fit.sent if m.id >= 0]
        number = len(context.turns(kept))
        numbers = {"sent_turns": number, "unsent_turns": len(context.turns(asked)) - number}
        limit = settings.identity.context
        bare = count([m for m in kept if m.role == "system"], Message("user", ""))
        if bare is None:
            return context.ContextParts(None, None, None, None, limit, **numbers)
        with_turns = (count(kept) or bare) if number else bare
        whole = (tokens or with_turns) if stored and stored[-1].id < 0 else with_turns
        every = [m for m in kept if m.role == "system"] + asked
        unsent = (count(every) or with_turns) - with_turns if numbers["unsent_turns"] else 0
        return context.ContextParts(bare, with_turns - bare, unsent, whole - with_turns, limit, **numbers)

    def title(self, tree: Tree, settings: AnswerSettings, stop: Stop, is_free: Callable[[int], bool]) -> str | None:
        """A title for the conversation, from the model that answers in it; None where it has no good one.

        is_free: whether no request but so many of ours is at the engine; once it is False the model is left to others.
        The request begins as the next question's will, so that the engine's cache loses nothing. Raises GlmchatError.
        """
        endpoint, stored = self._connected(), tree.context()
        question = next(m.text for m in reversed(stored) if m.role == "user")
        wish = Message("user", _TITLE_ZH if is_chinese(question) else _TITLE)
        variables = settings.sampling.sampling.template_variables
        sampling = Sampling(temperature=0, max_tokens=_TITLE_TOKENS, template_variables=variables)
        said, ended, looked = "", False, time.monotonic()
        if not is_free(0):
            return None
        with closing(
            endpoint.stream(
                [*context.to_messages(settings.system, stored), wish],
                sampling,
                settings.adapters if settings.adapters or endpoint.is_local else None,
                asked=None if self.decides else ("temperature", "max_tokens"),
                conversation=self._history.cache_name(tree),
                stop=stop,
            )
        ) as events:
            for event in events:
                if time.monotonic() - looked > _LOOK_SECONDS:
                    looked = time.monotonic()
                    if not is_free(1):
                        return None
                if isinstance(event, Piece):
                    said += event.text
                ended = "\n" in said.strip() or (isinstance(event, Finished) and event.finish_reason == "stop")
                if ended:
                    break
        return title_in(said, question) if ended else None

    @property
    def decides(self) -> bool:
        """True where our defaults hold: the model is loaded here. A server has its own."""
        return self._endpoint is None or self._endpoint.is_local

    def _connected(self) -> Endpoint:
        if self._endpoint is None:
            raise Usage(tr("no model is running"), hint=tr("/model chooses one"), code="chat.no_model")
        return self._endpoint

    def _count(self, messages: Sequence[Message], settings: AnswerSettings) -> int | None:
        endpoint = self._connected()
        if not messages or not self._counts:
            return None
        try:
            variables = settings.sampling.sampling.template_variables
            ours = settings.adapters if endpoint.is_local else ()
            return len(endpoint.tokenize(messages, template_variables=variables, adapters=ours))
        except (ServerFailed, NetworkFailed):  # a gateway may hang up on an address that it does not know
            if endpoint.is_local:
                raise
            self._counts = False
            return None

    def _fit(self, stored: Sequence[StoredMessage], settings: AnswerSettings) -> context.ContextFit:
        return context.ContextFit(
            settings.system,
            stored,
            settings.identity.context,
            max_tokens=settings.sampling.sampling.max_tokens,
            policy=settings.context_policy,
            overflow=self.seen.overflow,
            greeting=self.seen.greeting,
        )

    def _prompt(
        self,
        tree: Tree,
        last: StoredMessage,
        settings: AnswerSettings,
        *,
        continued: StoredMessage | None = None,
        verbatim: tuple[Message, ...] | None = None,
    ) -> Prompt:
        stored, conversation = tree.context(last.id), self._history.cache_name(tree)
        text = _completed_text(stored, continued)
        fit = self._fit(stored, settings) if text is None and verbatim is None else None
        if fit is not None and not self.decides:
            fit.foresee()
        sampling, asked = settings.sampling.sampling, None if self.decides else settings.sampling.asked
        ids: Sequence[int] = ()
        if continued is not None and continued.details.get("model") == settings.identity.model:
            ids = continued.token_ids  # another model's ids mean other words

        def open_stream(messages: tuple[Message, ...], stop: Stop) -> Source:
            endpoint = self._connected()
            # A server that was asked for an adapter by model name keeps it.
            adapters = settings.adapters if settings.adapters or endpoint.is_local else None
            if text is not None:
                return lambda report: endpoint.complete(
                    text,
                    sampling,
                    adapters,
                    asked=asked,
                    conversation=conversation,
                    stop=stop,
                    on_progress=report,
                )
            return lambda report: endpoint.stream(
                messages,
                sampling,
                adapters,
                continued is not None,
                continue_ids=ids,
                asked=asked,
                conversation=conversation,
                stop=stop,
                on_progress=report,
            )

        return Prompt(stored, fit, verbatim or (), open_stream, is_chat=text is None)


TITLE_CELLS = 40  # the widest title that a model gives
_TITLE_TOKENS = 32
_LOOK_SECONDS = 0.25
_TITLE = "Write a title for this conversation, at most five words. Write the title only, nothing else."
_TITLE_ZH = "请用不超过十个字为这段对话写一个标题，只写标题，不要写别的。"
_AROUND = " \t*_#`\"'“”‘’「」『』《》.。"


def title_in(said: str, question: str) -> str | None:
    """The title among what a model said when it was asked for one; None for what is none.

    Small models answer the question again, go round in circles, or talk of the title: the first words are better.
    """
    line = said.strip().partition("\n")[0]
    title = re.sub(r"^\W*(?:title|标题)\W*[:：]", "", line, flags=re.IGNORECASE).strip(_AROUND)
    width = sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in title)
    words = Counter(word for word in re.findall(r"\w+", title.lower()) if len(word) > 2)
    is_odd = (
        not any(c.isalpha() for c in title)
        or title.endswith((":", "："))
        or show_controls(title, keep=frozenset()) != title  # what would drive a terminal is no title
        or any(c in title for c in "<>\ufffd")
        or is_chinese(title) is not is_chinese(question)
        or max(words.values(), default=0) > 2
        or _repeats(title.lower())
    )
    return None if is_odd or width > TITLE_CELLS else title


def _repeats(title: str) -> bool:
    """Whether most of it was said by whoever asked for a title."""
    asked = (_TITLE.lower(), _TITLE_ZH)
    longest = (SequenceMatcher(None, title, text, autojunk=False).find_longest_match().size for text in asked)
    return max(longest) > 0.6 * len(title)


def already_streaming() -> Usage:
    return Usage(tr("an answer is being written"), hint=tr("stop it first (Esc)"), code="chat.busy")


def _completed_text(stored: Sequence[StoredMessage], continued: StoredMessage | None) -> str | None:
    """In completion mode the text to go on with; None for a chat turn."""
    question = next((m for m in reversed(stored) if m.role == "user"), None)
    if question is None or not context.is_completion(question):
        return None
    return question.text + (continued.text if continued else "")


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    return list(value) if isinstance(value, tuple) else value
