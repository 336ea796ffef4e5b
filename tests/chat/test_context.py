"""What fits into the context: which turns a request holds, and that finding out takes one request."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fake_server import fake_command
from foreign_server import Foreign, chunk
from speakers import LocalSpeaker, count

from glmchat.chat import context
from glmchat.chat.answering import Trimmed
from glmchat.chat.client import endpoint as client
from glmchat.chat.client.endpoint import Endpoint
from glmchat.chat.engine_process import RunningEngine
from glmchat.chat.history.history import History
from glmchat.chat.history.rows import StoredMessage
from glmchat.chat.history.transcript import add_to_history, read_import
from glmchat.chat.sampling_choice import SamplingRanks
from glmchat.chat.session import ChatSession, ModelIdentity
from glmchat.chat.shared_engine import start_engine
from glmchat.core import language
from glmchat.core.engine_options import EngineOptions
from glmchat.core.errors import DoesNotFit, GlmchatError, NetworkFailed, ServerFailed, Usage
from glmchat.core.messages import Message, Piece, Started


def stored(*texts: str) -> list[StoredMessage]:
    return [StoredMessage(n, 1, n - 1 or None, "user" if n % 2 else "assistant", t) for n, t in enumerate(texts, 1)]


def fitted(system: str | None, messages: Sequence[StoredMessage], limit: int | None, **options: Any) -> context.Request:
    """The request that a server takes whose tokens are characters."""
    fit = context.ContextFit(system, messages, limit, **options)
    while not fit.accepts(tokens := count(fit.messages)):
        if not fit.can_drop:
            raise context.too_long(tokens, limit or 0)
        fit.drop(tokens, fit.most)
    return fit.request(tokens)


@pytest.mark.parametrize("turns", range(1, 12))
def test_as_few_turns_as_possible_are_dropped_oldest_first(turns: int) -> None:
    request = fitted("S" * 5, stored(*["x" * 10] * (2 * turns - 1)), 100, max_tokens=25)
    assert request.tokens is not None and request.tokens <= 75
    assert request.messages[0] == Message("system", "S" * 5) and request.messages[-1].content == "x" * 10
    assert len(request.unseen) % 2 == 0 and request.unseen == tuple(range(1, len(request.unseen) + 1))
    if request.unseen:
        assert request.tokens + 20 > 75  # one turn more would not have fitted


def test_turns_of_any_length_and_script_are_dropped_as_if_each_number_of_them_had_been_counted() -> None:
    draw = random.Random(7)
    for _ in range(300):
        texts = [draw.choice("x你🌍") * draw.randrange(1, 60) for _ in range(2 * draw.randrange(1, 12) - 1)]
        messages, limit = stored(*texts), draw.randrange(120, 400)
        most = limit - context.reserve(limit, None)
        sizes = [sum(map(len, texts[first:])) for first in range(0, len(texts), 2)]
        expected = next((n for n, size in enumerate(sizes) if size <= most), len(sizes) - 1)
        assert fitted(None, messages, limit).unseen == tuple(range(1, 2 * expected + 1))


def test_one_turn_that_does_not_fit_is_refused_by_every_policy() -> None:
    for policy in ("drop", "refuse"):
        with pytest.raises(DoesNotFit) as wrong:
            fitted(None, stored("x" * 100), 100, policy=policy)
        assert wrong.value.exit == 4
    assert fitted(None, stored("x" * 99), 100).tokens == 99  # little room is room


def test_nothing_is_dropped_by_guess() -> None:
    fit = context.ContextFit(None, stored(*["x" * 1000] * 9), 100)
    assert fit.accepts(None) and fit.unseen == () and len(fit.messages) == 9 and fit.request(None).room is None


def test_imported_system_messages_are_never_dropped() -> None:
    messages = [StoredMessage(0, 1, None, "system", "from the import"), *stored(*["x" * 30] * 5)]
    request = fitted("own", messages, 120, max_tokens=10)
    assert request.messages[0] == Message("system", "own\n\nfrom the import") and request.unseen


@pytest.mark.parametrize(
    ("message", "numbers"),
    [
        ("This model's maximum context length is 4096 tokens. However, you requested 5000", (5000, 4096)),
        ("the server refused the request (HTTP 400): request (900 tokens) exceeds the available context size (512"
         " tokens), try increasing it", (900, 512)),
        ("the request exceeds the available context size, try increasing it", None),
        ("Requested tokens (600) exceed context window of 512", (600, 512)),
    ],
)  # fmt: skip
def test_servers_words_for_too_long_are_understood(message: str, numbers: tuple[int, int] | None) -> None:
    error = ServerFailed(message, hint="")
    assert context.is_overflow(error) and context.sizes(error) == numbers


def test_other_words_of_a_server_are_no_reason_to_drop_turns() -> None:
    assert not context.is_overflow(ServerFailed("the server rejected the key", hint=""))
    assert not context.is_overflow(DoesNotFit("there is not enough memory", hint="", code="memory"))


# One turn, one request.


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The path of every request that our client sends."""
    sent: list[str] = []
    make_client = client.make_client

    def recording(**options: Any) -> httpx2.Client:
        made = make_client(**options)
        made.event_hooks = {"request": [lambda request: sent.append(request.url.path)]}
        return made

    monkeypatch.setattr(client, "make_client", recording)
    return sent


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[RunningEngine]:
    """Our own server, over an engine whose tokens are characters."""
    command = fake_command(pieces=["four"], context=400)
    process = start_engine(EngineOptions(folder=tmp_path, model="fake"), command=command)
    try:
        process.wait_ready()
        yield process
    finally:
        process.stop()


def before_the_first_piece(session: ChatSession, text: str, requests: list[str]) -> list[str]:
    requests.clear()
    seen: list[str] | None = None
    for event in session.ask(text):
        if isinstance(event, Piece) and seen is None:
            seen = list(requests)
    assert seen is not None
    return seen


def test_a_turn_with_our_own_engine_is_one_request(
    history: History, engine: RunningEngine, requests: list[str]
) -> None:
    session = ChatSession(history, engine.endpoint, identity=ModelIdentity("fake", context=400))
    for text in ("hello", "again"):
        assert before_the_first_piece(session, text, requests) == ["/v1/chat/completions"]


def test_a_turn_with_a_foreign_server_is_one_request(history: History, foreign: Foreign, requests: list[str]) -> None:
    endpoint = foreign.says("\n\n".join([chunk("hi"), chunk(None, "stop"), "data: [DONE]\n\n"]))
    endpoint.is_glmchat  # noqa: B018  (connecting has asked what the server is)
    session = ChatSession(history, endpoint, identity=ModelIdentity("m", context=400))
    for text in ("hello", "again"):
        assert before_the_first_piece(session, text, requests) == ["/v1/chat/completions"]


def test_a_full_context_takes_a_request_more_only_in_the_turn_that_fills_it(
    history: History, engine: RunningEngine, requests: list[str]
) -> None:
    ranks = SamplingRanks({"flag": {"max_tokens": 40}})
    session = ChatSession(history, engine.endpoint, identity=ModelIdentity("fake", context=400), ranks=ranks)
    sent, dropped = [], []
    for number in range(12):
        before = session.unseen
        sent.append(len(before_the_first_piece(session, f"{number:02} " + "x" * (60 if number < 9 else 3), requests)))
        dropped.append(session.unseen != before)
        assert session.tree.path()[-1].details["prompt_tokens"] <= 360
    assert any(dropped)
    assert [n > 1 for n in sent] == dropped  # a turn that drops nothing more is one request, also behind a full context


@pytest.mark.parametrize("words", ["en", "zh"])
def test_the_refusal_of_our_own_server_says_how_long_and_how_much_in_each_language(
    engine: RunningEngine, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = SamplingRanks().choose().sampling
    with pytest.raises(DoesNotFit) as refusal:
        list(engine.endpoint.stream([Message("user", "x" * 500)], sampling))
    assert context.is_overflow(refusal.value)
    sentence = "the prompt has {length} tokens, but the context holds only {context}"
    length = len("<user><assistant>") + 500
    assert context.sizes(refusal.value) == (length, 400)
    monkeypatch.setenv("GLMCHAT_LANG", words)
    said = GlmchatError(language.tr(sentence, length=length, context=400), hint="")
    assert context.sizes(said) == (length, 400)


def test_a_server_that_gives_no_room_is_sent_what_earlier_counts_say_that_fits(history: History) -> None:
    server = LocalSpeaker("a" * 30, is_local=False, context=120)  # counts, in the first event of its answer
    server.counts = False
    session = ChatSession(history, server, identity=ModelIdentity("m", context=120))
    for number in range(8):
        list(session.ask(f"{number}" * 20))
        answer = session.tree.path()[-1]
        # What a server tells in `usage`, when the answer has ended.
        details = {"prompt_tokens": count(server.asked[-1]["messages"]), "completion_tokens": 30}
        history.describe_answer(session.tree, answer, details)
    assert session.unseen and all(count(asked["messages"]) <= 120 for asked in server.asked[-3:])
    assert count(server.asked[-1]["messages"]) <= 120 - context.reserve(120, None)


def test_a_server_without_numbers_is_not_sent_twice_what_it_has_refused(history: History) -> None:
    server = LocalSpeaker("a" * 10, counts=False, is_local=False, refuse_over=100)
    session = ChatSession(history, server, identity=ModelIdentity(context=None))
    refused: set[tuple[str, ...]] = set()
    for number in range(10):
        list(session.ask(f"{number}" * 20))
    for asked in server.asked:
        texts = tuple(m.content for m in asked["messages"])
        if count(asked["messages"]) > 100:
            assert not any(texts[: len(before)] == before for before in refused)
            refused.add(texts)
    assert refused and session.unseen


def test_all_is_seen_again_where_there_is_room_again(history: History) -> None:
    session = ChatSession(history, LocalSpeaker("a" * 30, context=120), identity=ModelIdentity("m", context=120))
    for number in range(4):
        list(session.ask(f"{number}" * 20))
    assert session.unseen
    session.reconnect(LocalSpeaker("a", context=1000), ModelIdentity("m", context=1000))
    events = list(session.ask("more"))
    assert [e.unseen for e in events if isinstance(e, Trimmed)] == [()]
    assert sum(isinstance(e, Started) for e in events) == 1


def test_counts_of_earlier_turns_make_the_first_guess_good_where_a_long_conversation_meets_a_small_context(
    history: History,
) -> None:
    speaker = LocalSpeaker("word " * 40, context=100_000)
    session = ChatSession(history, speaker, identity=ModelIdentity("m", context=100_000))
    for number in range(40):
        list(session.ask(f"{number} and then?"))
    small = LocalSpeaker("fine", context=1000)
    session.reconnect(small, ModelIdentity("m", context=1000))
    list(session.ask("and now?"))
    assert len(small.asked) <= 3
    most = 1000 - context.reserve(1000, None)
    assert most - 250 < count(small.asked[-1]["messages"]) <= most
    ids = [m.id for m in session.tree.path()]
    assert session.unseen == tuple(itertools.takewhile(lambda i: i < session.tree.path()[-1].details["seen_from"], ids))


def test_the_numbers_in_the_refusal_of_a_foreign_server_come_through(foreign: Foreign) -> None:
    error = {"message": "This model's maximum context length is 512 tokens. However, you requested 900 tokens"}
    endpoint: Endpoint = foreign.says("", status="400 Bad Request", kind="application/json")
    foreign.parts = [json.dumps({"error": error}).encode()]
    with pytest.raises(ServerFailed) as refusal:
        list(endpoint.stream([Message("user", "hi")], SamplingRanks().choose().sampling))
    assert context.sizes(refusal.value) == (900, 512)


class Strict(LocalSpeaker):
    """Its template wants a question first, as Mistral's and Gemma's do."""

    refusal = "template.refused"

    def stream(self, messages: Sequence[Message], *given: Any, **options: Any) -> Any:
        if next(m.role for m in messages if m.role != "system") == "user":
            return super().stream(messages, *given, **options)
        raise (Usage if self.refusal.startswith("template") else ServerFailed)("roles", hint="order", code=self.refusal)


GREETED = [("assistant", "Welcome!"), ("user", "q1"), ("assistant", "a1")]


def greeted(history: History, speaker: Endpoint) -> ChatSession:
    said = [{"role": role, "content": text} for role, text in GREETED]
    (tree,) = add_to_history(history, read_import(json.dumps(said).encode(), "x.json"))
    return ChatSession(history, speaker, identity=ModelIdentity("m", context=4000), conversation=tree.conversation.id)


@pytest.mark.parametrize("code", ["template.refused", "server.refused"])
def test_a_greeting_that_a_template_refuses_is_left_out_and_that_is_said(history: History, code: str) -> None:
    speaker = Strict()
    speaker.refusal = code
    session = greeted(history, speaker)
    for question in ("next?", "and then?"):
        events = list(session.ask(question))
        trimmed = [event for event in events if isinstance(event, Trimmed)]
        if question == "next?":
            assert [(len(event.unseen), event.greeting) for event in trimmed] == [(1, True)]
        else:
            assert not trimmed, "it is said once"
        assert speaker.asked[-1]["messages"][0] == Message("user", "q1")
        assert speaker.asked[-1]["messages"][-1] == Message("user", question)


def test_a_greeting_is_sent_to_a_model_that_takes_it(history: History) -> None:
    speaker = LocalSpeaker()
    list(greeted(history, speaker).ask("next?"))
    assert speaker.asked[-1]["messages"][0] == Message("assistant", "Welcome!")


def test_a_refusal_that_has_nothing_to_do_with_a_greeting_is_raised(history: History) -> None:
    class Never(LocalSpeaker):
        def stream(self, messages: Sequence[Message], *given: Any, **options: Any) -> Any:
            raise Usage("no", hint="no", code="template.refused")

    with pytest.raises(Usage, match="no"):
        list(greeted(history, Never()).ask("next?"))


def test_a_server_that_hangs_up_on_the_count_is_chatted_with_all_the_same(history: History) -> None:
    class Gateway(LocalSpeaker):
        def tokenize(self, *given: Any, **options: Any) -> list[int]:
            raise NetworkFailed("the connection broke", hint="again", code="server.network")

    session = ChatSession(history, Gateway(is_local=False), identity=ModelIdentity("m"))
    assert session.measure().tokens is None
    assert [event.text for event in session.ask("q") if isinstance(event, Piece)] == ["one ", "two"]
