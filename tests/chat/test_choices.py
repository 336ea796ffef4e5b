"""Which sampling values hold, and which model runs.

Covers chat/sampling_choice.py, chat/launch.py, chat/adapters_choice.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

import pytest
from speakers import LocalSpeaker

from glmchat.chat.adapters_choice import change
from glmchat.chat.answering import Done
from glmchat.chat.history.history import History
from glmchat.chat.launch import LaunchOptions, launch_installed, locate, wanted_model
from glmchat.chat.sampling_choice import ORDER, Origin, choose_sampling, generation_config, ranks_for_launch, value_text
from glmchat.chat.session import ChatSession
from glmchat.core import locations
from glmchat.core.errors import NotInstalled, UnknownModel, Usage
from glmchat.core.messages import Sampling, parse_sampling_value
from glmchat.core.settings import Settings, load_settings
from glmchat.hub import installed, lookup
from glmchat.hub.installed import Installed


def test_the_higher_rank_decides_each_field_alone() -> None:
    asked: dict[Origin, dict[str, Any]] = {
        origin: {"temperature": 0.1 * (n + 1)} for n, origin in enumerate(ORDER) if origin != "default"
    }
    for origin in ORDER[:-1]:
        chosen = choose_sampling(asked)
        assert chosen.origins["temperature"] == origin
        assert chosen.sampling.temperature == asked[origin]["temperature"]
        del asked[origin]
    assert choose_sampling(asked).origins["temperature"] == "default"
    mixed = choose_sampling({"flag": {"top_p": 0.3}, "catalogue": {"temperature": 0.6, "top_p": 0.9}})
    assert (mixed.sampling.top_p, mixed.sampling.temperature) == (0.3, 0.6)
    assert mixed.origins["top_k"] == "default"


def test_a_set_back_to_none_beats_a_lower_rank() -> None:
    assert choose_sampling({"set": {"seed": None}, "config": {"seed": 5}}).sampling.seed is None


def test_a_value_of_the_wrong_kind_names_who_gave_it() -> None:
    with pytest.raises(Usage, match="catalogue"):
        choose_sampling({"catalogue": {"temperature": "warm"}})
    with pytest.raises(Usage):
        choose_sampling({"catalogue": {"temperature": 99.0}})


def test_the_ranks_below_a_conversation_come_from_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locations.config_file().parent.mkdir(parents=True)
    locations.config_file().write_text("[sampling]\ntemp = 0.2\ntop_p = 0.3\nmin_p = 0.1\n")
    monkeypatch.setenv("GLMCHAT_TOP_P", "0.4")
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"top_k": 7, "temperature": 0.9, "min_p": "x", "do_sample": False, "repetition_penalty": -1})
    )
    chosen = ranks_for_launch({"seed": 1}, catalogue={"repetition_penalty": 1.1}, folder=tmp_path).choose()
    assert {**chosen.origins, "stop": "default"} == {
        "temperature": "config", "top_k": "generation_config", "top_p": "environment", "min_p": "config",
        "repetition_penalty": "catalogue", "seed": "flag", "max_tokens": "default", "stop": "default",
        "ignore_eos": "default", "template_variables": "default",
    }  # fmt: skip
    assert chosen.sampling.top_k == 7 and chosen.sampling.top_p == 0.4 and chosen.sampling.temperature == 0.2


@pytest.mark.parametrize("content", ["", "[]", "{", '{"temperature": true}', '{"top_p": 1e999}', "[" * 99_999])
def test_a_broken_generation_config_says_nothing(tmp_path: Path, content: str) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    assert generation_config(tmp_path) == {}
    assert generation_config(None) == {}


def test_the_model_is_named_by_the_first_who_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plain = Settings()
    assert wanted_model(None, plain) is None
    gguf = tmp_path / "a.gguf"
    gguf.write_bytes(b"GGUF")
    row, bits = locate(str(gguf))
    assert bits is None and row.path == gguf
    config = Settings(default_model="from-config")
    for settings, name, spoken, expected in [
        (config, "given", "spoken", ("given", "argument")),
        (config, None, "spoken", ("spoken", "conversation")),
        (config, None, None, ("from-config", "config")),
    ]:
        found = wanted_model(name, settings, conversation=spoken, environ={})
        assert found is not None and (found.text, found.origin) == expected
    monkeypatch.setenv("GLMCHAT_MODEL", "from-env")
    found = wanted_model(None, load_settings())
    assert found is not None and (found.text, found.origin) == ("from-env", "GLMCHAT_MODEL")


def test_a_known_model_that_is_not_here_names_the_line_to_type() -> None:
    with pytest.raises(NotInstalled) as missing:
        locate("smollm2")
    assert missing.value.hint == "glmchat pull smollm2" and missing.value.exit == 1
    with pytest.raises(UnknownModel) as unknown:
        locate("smolm2")
    assert "smollm2" in unknown.value.hint and unknown.value.exit == 2
    with pytest.raises(Usage):
        locate("smollm2:int4", quant=8)
    with pytest.raises(Usage):
        locate("./nowhere")


def test_a_folder_is_launched_as_it_is_or_quantised_at_load(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    row, bits = locate(str(tmp_path), quant=4)
    launch = launch_installed(LaunchOptions(), row, bits)
    assert (launch.engine.folder, launch.engine.quant, launch.engine.quant_label, launch.family) == (
        tmp_path,
        4,
        "int4",
        "llama",
    )
    row, bits = locate(str(tmp_path))
    assert launch_installed(LaunchOptions(), row, bits).engine.quant is None
    lookup.remember(row)


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_bit": 4},
        {
            "quantization_config": {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "config_groups": {
                    "a": {"weights": {"num_bits": 8, "strategy": "channel"}},
                    "b": {"weights": {"num_bits": 4, "strategy": "group", "group_size": 32}},
                },
            },
        },
    ],
)
def test_a_folder_with_its_own_bits_is_not_quantised_again(tmp_path: Path, config: dict[str, object]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    row, bits = locate(str(tmp_path), quant=4)
    launch = launch_installed(LaunchOptions(), row, bits)
    assert (launch.engine.quant, launch.engine.quant_label) == (None, "int4")
    with pytest.raises(Usage, match="cannot be converted to 8"):
        launch_installed(LaunchOptions(), row, 8)


@pytest.mark.parametrize(
    ("described", "quant"),
    [
        (None, "none"),
        (4, "none"),
        ([], "none"),
        ({"config_groups": [1]}, "?"),
        ({"config_groups": {"a": 1, "b": {"weights": 2}}}, "?"),
    ],
)
def test_an_odd_description_of_the_bits_is_none_or_unknown(tmp_path: Path, described: object, quant: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": described}))
    assert installed.quant_of_folder(tmp_path) == quant


@pytest.mark.parametrize(
    ("config", "sampling"),
    [
        ({"model_type": "chatglm", "vocab_size": 130528}, {"temperature": 0.95, "top_p": 0.7, "top_k": 50}),
        ({"model_type": "chatglm", "padded_vocab_size": 65024}, {"temperature": 0.8, "top_p": 0.8, "top_k": 50}),
        ({"model_type": "llama"}, {}),
    ],
)
def test_a_fine_tuned_chatglm_is_sampled_as_its_family_was(
    config: dict[str, object], sampling: dict[str, float], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    row, bits = locate(str(tmp_path))
    assert dict(launch_installed(LaunchOptions(), row, bits).engine.sampling) == sampling


def test_a_swap_of_adapters_and_an_answer_look_at_no_model_and_at_no_other_adapter(
    history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("poet", "bard", "other"):
        (folder := locations.adapters_dir() / name).mkdir(parents=True)
        (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "some/one"}')
    seen: list[str] = []
    row_of_adapter = installed.row_of_adapter

    def note(folder: Path) -> Installed | None:
        seen.append(folder.name)
        return row_of_adapter(folder)

    def scan() -> NoReturn:
        raise AssertionError("the whole store was looked at")

    monkeypatch.setattr(installed, "row_of_adapter", note)
    monkeypatch.setattr(lookup, "list_installed", scan)
    session = ChatSession(history, LocalSpeaker("Hel", "lo"))
    change(session, ["poet:0.5"], LaunchOptions())
    change(session, ["weight", "0.25"], LaunchOptions())
    change(session, ["bard"], LaunchOptions())
    answer = list(session.ask("hi"))[-1]
    assert isinstance(answer, Done) and answer.answer.text == "Hello"
    assert set(seen) == {"poet", "bard"}


@pytest.mark.parametrize(("lang", "nothing"), [("en", "none"), ("zh", "无")])
def test_what_a_setting_is_shown_as_can_be_typed_again(
    lang: str, nothing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLMCHAT_LANG", lang)
    assert value_text(None) == nothing
    for sampling in (Sampling(), Sampling(seed=7, max_tokens=9, temperature=0.25, top_k=3, stop=("a", "b"))):
        for name, value in sampling.to_json().items():
            if name != "template_variables":
                value = tuple(value) if name == "stop" else value
                assert parse_sampling_value(name, value_text(value)) == value
    assert parse_sampling_value("seed", "none") is None
