"""The chat screen's model without the chat screen: loading, ready, lost, switched."""

from __future__ import annotations

from dataclasses import replace

import pytest
from parts import on_stage
from windows import LAUNCH

from glmchat.chat.session import ModelIdentity
from glmchat.core.errors import EngineDied, Usage
from glmchat.tui.messages import Loading, Ready


async def test_the_status_line_follows_the_loading() -> None:
    async with on_stage() as stage:
        stage.connection.connect()
        await stage.until(lambda: stage.link.started)
        facts = stage.status.facts
        assert (facts.activity, facts.progress) == ("starting the engine", None)
        stage.connection.loading(Loading("weights", 0.4))
        assert (facts.activity, facts.progress) == ("loading the weights", 0.4)
        stage.connection.loading(Loading("tokenizer", 0.1))
        assert (facts.activity, facts.progress) == ("reading the vocabulary", None)
        with pytest.raises(Usage) as refused:
            stage.connection.require_ready()
        assert refused.value.code == "chat.loading"
        stage.connection.connected(Ready(None, ModelIdentity("m", quant="int4", context=512)))  # type: ignore[arg-type]
        stage.connection.require_ready()
        assert (facts.activity, facts.model, facts.quant, facts.limit) == ("", "m", "int4", 512)


async def test_a_lost_engine_is_shown_and_cannot_be_asked() -> None:
    async with on_stage() as stage:
        stage.connection.connected(Ready(None, ModelIdentity("m")))  # type: ignore[arg-type]
        stage.connection.lost(EngineDied("killed", hint="again"))
        assert stage.status.facts.lost and [error.message for error in stage.errors] == ["killed"]
        with pytest.raises(Usage) as refused:
            stage.connection.require_ready()
        assert refused.value.code == "chat.not_ready"
        stage.link.lost = EngineDied("killed", hint="again")
        assert stage.connection.failure() is None, "it was said already"


async def test_the_end_of_an_engine_that_something_else_took_the_place_of_is_no_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The look at it was under way, and saw it stop."""
    async with on_stage() as stage:
        own, other, died = object(), object(), EngineDied("killed", hint="again")
        stage.connection.connected(Ready(None, ModelIdentity("m")))  # type: ignore[arg-type]
        posted: list[object] = []
        monkeypatch.setattr(stage, "post_message", posted.append)
        for instead, is_told in [(other, False), (None, False), (own, True)]:
            stage.link.process = own

            def failure(instead: object | None = instead) -> EngineDied:
                stage.link.process = instead
                return died

            monkeypatch.setattr(stage.link, "failure", failure)
            posted.clear()
            stage.connection._look()
            assert bool(posted) is is_told


async def test_another_model_keeps_whether_a_history_is_written() -> None:
    async with on_stage() as stage:
        stage.connection.launch = replace(LAUNCH, history=False)
        stage.connection.switch(replace(LAUNCH, engine=replace(LAUNCH.engine, model="other")))
        await stage.until(lambda: [launch.engine.model for launch in stage.link.started] == ["other"])
        assert stage.connection.launch.history is False


async def test_a_model_that_knows_only_english_is_advised_of_once_until_another_one_comes() -> None:
    async with on_stage() as stage:
        stage.connection.advise_chinese()
        assert not stage.words, "nothing is known of a model that is not there"
        stage.connection.connected(Ready(None, ModelIdentity("smollm2")))  # type: ignore[arg-type]
        stage.connection.advise_chinese()
        stage.connection.advise_chinese()
        assert [words for words in stage.words if "speaks only English" in words] == ["smollm2 speaks only English"]
        assert not any("`glmchat" in words for words in stage.words), "there is no command line here"
