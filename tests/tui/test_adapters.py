"""The adapters screen: what fits, what does not and why, weights, mixtures, force; by keys and by mouse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from adapter_builders import train
from tiny_checkpoints import llamas
from transformers import AutoTokenizer
from windows import Window, hold_reading, open_window

from glmchat.chat.compare import columns
from glmchat.chat.launch import LaunchOptions
from glmchat.checkpoints.adapter_check import read_facts
from glmchat.checkpoints.adapter_files import weight_files
from glmchat.core.engine_options import EngineOptions
from glmchat.engine import Engine
from glmchat.hub import adapters, manifests, removal
from glmchat.hub.manifests import Manifest
from glmchat.tui.screens import adapters as adapters_screen
from glmchat.tui.screens.adapters import AdapterScreen, WeightLine


def used(window: Window) -> dict[str, float]:
    assert window.chat.talk.session is not None
    return dict(window.chat.talk.session.adapters)


async def opened(window: Window) -> None:
    await window.press("f7")
    await window.until(lambda: isinstance(window.app.screen, AdapterScreen) and "poet" in window.screen_text())


async def test_those_that_fit_come_first_and_the_others_say_why_they_do_not(adapters_here: LaunchOptions) -> None:
    async with open_window(launch=adapters_here) as window:
        await window.send("/adapter")
        await window.until(lambda: "poet" in window.screen_text())
        lines = [line for line in window.screen_text().splitlines() if "│" in line]
        order = [
            name for line in lines for name in ("calm", "poet", "chatglm", "medical", "wide") if f"  {name} " in line
        ]
        assert order == ["calm", "poet", "chatglm", "medical", "wide"]
        assert "trained on me/Other-7M, but this model is Tiny-7M" in window.screen_text()
        assert "q_proj is 128 × 128 in it, but 64 × 64 in the model" in window.screen_text()
        assert "changes layers called query_key_value" in window.screen_text()


async def test_enter_uses_one_space_mixes_arrows_weigh_and_o_is_none(adapters_here: LaunchOptions) -> None:
    async with open_window(launch=adapters_here) as window:
        await opened(window)
        await window.press("down", "enter")
        assert used(window) == {"calm": 1.0}
        await window.press("down", "space", "left", "left", "left")
        assert used(window) == {"calm": 1.0, "poet": 0.7}
        assert "● poet" in window.screen_text() and "×0.7" in window.screen_text()
        await window.press("right", "up", "space")
        assert used(window) == {"poet": 0.8}
        await window.press("o")
        assert used(window) == {}
        await window.press("down", "enter", "escape")
        await window.until(lambda: "adapters, starting with the next answer: poet" in window.notices)
        assert window.chat.status.facts.adapters == ("poet",)
        await window.ask("who are you?")
        assert [turn.label for turn in window.turns if turn.role == "assistant"] == ["Tiny-7M + poet"]


async def test_one_that_does_not_fit_is_not_taken_and_only_names_can_be_overruled(adapters_here: LaunchOptions) -> None:
    async with open_window(launch=adapters_here) as window:
        await opened(window)
        await window.press("end", "enter", "space", "f")  # of other measures
        assert used(window) == {} and "it was trained on a model of a different size" in window.screen_text()
        await window.press("up", "enter", "space")  # of another base
        assert used(window) == {}
        await window.press("f")
        assert used(window) == {"medical": 1.0}
        await window.press("escape")
        await window.until(lambda: window.chat.status.facts.adapters == ("medical (forced)",))


async def test_the_mouse_does_what_the_keys_do(adapters_here: LaunchOptions) -> None:
    async with open_window(launch=adapters_here) as window:
        await opened(window)
        await window.pilot.click("#adapters", offset=(4, 2))
        assert used(window) == {"poet": 1.0}
        await window.pilot.click(WeightLine, offset=(1, 0))
        assert used(window) == {"poet": 0.9}
        await window.pilot.click(WeightLine, offset=(10, 0))
        assert used(window) == {"poet": 1.0}
        await window.pilot.click("#adapters", offset=(4, 0))
        assert used(window) == {}


async def told(window: Window, words: str) -> None:
    await window.until(lambda: words in window.notices)


async def test_a_wrong_one_is_refused_where_it_is_typed_and_nothing_changes(adapters_here: LaunchOptions) -> None:
    async with open_window(launch=adapters_here) as window:
        for line, reason in (
            ("/adapter wide", "wide: q_proj is 128 × 128"),
            ("/adapter poet medical", "medical: trained on me/Other-7M"),
            ("/adapter poet poet:0.5", "an adapter is named twice"),
            ("/adapter nobody", "there is no adapter 'nobody'"),
        ):
            await window.send(line)
            await told(window, reason)
            assert used(window) == {}
        (adapters.find_adapter("calm").path / "adapter_model.safetensors").unlink()
        await window.send("/adapter calm")
        await window.until(lambda: "calm: some of its files are missing" in window.notices)
        await window.send("/adapter medical --force")
        await window.until(lambda: used(window) == {"medical": 1.0})
        await window.ask("hello")
        assert [turn.label for turn in window.turns if turn.role == "assistant"] == ["Tiny-7M + medical (forced)"]


async def test_one_that_was_removed_meanwhile_is_shown_and_can_be_taken_away(
    adapters_here: LaunchOptions,
) -> None:
    async with open_window(launch=adapters_here) as window:
        await window.send("/adapter poet")
        await window.until(lambda: used(window) == {"poet": 1.0})
        removal.execute(removal.plan_removal([adapters.find_adapter("poet")]))
        await window.press("f7")
        await window.until(lambda: "no longer in the store" in window.screen_text())
        await window.press("space")
        assert used(window) == {}


async def test_changing_and_asking_looks_at_the_adapters_that_are_named_and_at_no_other(
    adapters_here: LaunchOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_window(launch=adapters_here) as window:
        looked_at: set[str] = set()
        read = manifests.read

        def watched(path: Path, *, root: Path | None = None) -> Manifest | None:
            looked_at.add(path.parent.name)
            return read(path, root=root)

        await window.send("/adapter medical --force")
        await window.type("/adapter poet:0.5 medica")  # the names of all are read for completing it
        await window.until(lambda: window.chat.suggestions.offered)
        await window.type("l")
        await window.until(lambda: all(worker.is_finished for worker in window.app.workers if worker.group == "names"))
        monkeypatch.setattr(manifests, "read", watched)
        await window.press("enter")
        await window.until(lambda: window.chat.status.facts.adapters == ("poet:0.5", "medical (forced)"))
        await window.ask("hi")
        session = window.chat.talk.session
        assert session is not None
        assert session.tree.path()[-1].details["adapters"] == [
            {"name": "poet", "scale": 0.5}, {"name": "medical", "scale": 1.0, "forced": True},
        ]  # fmt: skip
        assert looked_at == {"poet", "medical"}


async def test_keys_typed_while_the_adapters_are_read_act_when_the_list_stands(
    adapters_here: LaunchOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_read = hold_reading(monkeypatch, adapters_screen, "list_adapters")
    async with open_window(launch=adapters_here) as window:
        await window.press("f7", "down", "space", "left")
        await window.until(lambda: "reading which adapters are here" in window.screen_text())
        assert used(window) == {}
        await window.press("f7")
        await window.until(lambda: not isinstance(window.app.screen, AdapterScreen))
        await window.press("f7", "down", "space", "left")
        may_read.set()
        await window.until(lambda: used(window) == {"calm": 0.9})


async def test_names_are_completed_from_what_was_read_last_while_the_store_is_read_again(
    adapters_here: LaunchOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offered(window: Window) -> list[str]:
        return [suggestion.shown for suggestion in window.chat.suggestions.offered]

    async with open_window(launch=adapters_here) as window:
        may_read = hold_reading(monkeypatch, columns, "store_names")
        await window.type("/adapter p")
        assert window.chat.prompt.text == "/adapter p" and offered(window) == []
        may_read.set()
        await window.until(lambda: offered(window) == ["poet"])
        window.chat.prompt.set_text("")
        await window.settle()
        may_read.clear()
        removal.execute(removal.plan_removal([adapters.find_adapter("poet")]))
        await window.type("/adapter p")
        assert offered(window) == ["poet"]
        may_read.set()
        await window.until(lambda: offered(window) == [])


async def test_one_that_brings_words_is_taken_and_left_in_the_middle_of_a_conversation(tmp_path: Path) -> None:
    """The whole conversation is put to the model in the words of who answers, whoever answered before."""
    base = llamas.write_folder(tmp_path / "Tiny-7M")
    trained = train(base, tmp_path / "own", None)
    files = dict.fromkeys([*adapters.companions(trained), *weight_files(trained)])
    adapters.keep("own", list(files), read_facts(trained).to_json(), adapters.Origin("here"), base=None)
    launch = LaunchOptions(EngineOptions(folder=base, model="Tiny-7M"), sampling={"temperature": 0, "max_tokens": 4})
    asked: list[tuple[list[dict[str, str]], list[int]]] = []

    class Noting(Engine):
        """Notes what it is asked to put into words."""

        def render(self, messages: Any, *rest: Any, **named: Any) -> list[int]:
            ids = super().render(messages, *rest, **named)
            asked.append(([{"role": m.role, "content": m.content} for m in messages], ids))
            return ids

    def load(report: Any) -> Engine:
        return Noting.load(base, threads=1, dtype="float32")

    async with open_window(launch=launch, load=load) as window:
        places = []
        for command, question, place in (
            (None, "a zebra", base), ("/adapter own", "the zebra", trained), ("/adapter off", "zebra?", base),
            ("/adapter own", "and?", trained),
        ):  # fmt: skip
            if command is not None:
                await window.send(command)
            await window.ask(question)
            said, ids = next((s, i) for s, i in reversed(asked) if s[-1]["content"] == question)
            tokenizer = AutoTokenizer.from_pretrained(place)
            right = tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
            assert ids == right
            places.append(len(said))
        assert places == [1, 3, 5, 7]
        labels = [turn.label for turn in window.turns if turn.role == "assistant"]
        assert labels == ["Tiny-7M", "Tiny-7M + own", "Tiny-7M", "Tiny-7M + own"]
        assert "own brings a chat template of its own" in window.notices
