"""The options of an engine: what one process writes another reads, and people can say whatever they may decide."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from glmchat.cli.engine_flags import EngineFlags
from glmchat.cli.main import CommandTable
from glmchat.core.engine_options import (
    CACHE_TYPES,
    DTYPES,
    PRODUCTS,
    EngineOptions,
    parse_cache_type,
    parse_device,
    parse_dtype,
    parse_parallel,
    parse_products,
)
from glmchat.core.errors import Usage
from glmchat.core.settings import Settings

WORDS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)
PATHS = WORDS.map(lambda text: Path("/", text))
JSON = st.recursive(st.none() | st.booleans() | st.integers() | WORDS, lambda inner: st.lists(inner, max_size=3))
OBJECTS = st.dictionaries(WORDS, JSON, max_size=3)
NAMES = st.from_regex(r"\w[\w.+-]{0,20}", fullmatch=True)  # of adapters in the store

EVERY_FIELD: dict[str, st.SearchStrategy[Any]] = {
    "folder": PATHS,
    "model": WORDS,
    "revision": WORDS,
    "quant": st.sampled_from((4, 8)),
    "quant_label": WORDS,
    "copy": OBJECTS,
    "dtype": st.sampled_from(DTYPES),
    "products": st.sampled_from(PRODUCTS),
    "cache_type": st.sampled_from(CACHE_TYPES),
    "device": st.sampled_from(("auto", "cpu", "cuda:1")),
    "threads": st.integers(1, 512),
    "context": st.integers(16, 1 << 20),
    "parallel": st.integers(1, 64),
    "adapters": st.lists(st.tuples(NAMES, PATHS), max_size=3).map(tuple),
    "sampling": OBJECTS,
    "keep_alive": st.floats(0, 1e6),
    "kv_cache": st.integers(0, 10**12),
}


def test_every_field_is_tried() -> None:
    assert set(EVERY_FIELD) == {field.name for field in fields(EngineOptions)}


@given(st.fixed_dictionaries({}, optional=EVERY_FIELD))
def test_a_child_reads_the_options_as_they_were_meant(values: dict[str, Any]) -> None:
    options = EngineOptions(**values)
    assert EngineOptions.from_arguments(options.to_arguments()) == options


def test_a_relative_folder_is_found_from_wherever_the_child_starts(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert EngineOptions(Path("model")).to_arguments() == [f"--folder={tmp_path / 'model'}"]


@pytest.mark.parametrize("command", ["run", "serve"])
def test_what_a_person_may_decide_of_an_engine_is_a_flag(command: str) -> None:
    """The other fields come from the model that is chosen, from the config, `--adapter` and the flags of sampling."""
    elsewhere = {"kv_cache", "folder", "model", "quant_label", "copy", "adapters", "sampling"}
    flags = {field.name for field in fields(EngineFlags)}
    assert flags == {field.name for field in fields(EngineOptions)} - elsewhere
    context = typer.Context(CommandTable().commands[command])
    # A server stays until somebody ends it.
    typed = {"--" + flag.replace("_", "-") for flag in flags if (command, flag) != ("serve", "keep_alive")}
    assert typed <= {name for one in context.command.params for name in one.opts}


TYPED: dict[str, Any] = {
    "dtype": "float32", "products": "int8", "cache_type": "int8", "device": "cpu", "threads": 3, "context": 64,
    "parallel": 2,
}  # fmt: skip


@pytest.mark.parametrize("flag", TYPED)
def test_a_flag_that_was_typed_reaches_the_engine(flag: str) -> None:
    given = {flag: TYPED[flag]}
    options = EngineFlags(**given).options(Settings(keep_alive=0.0, kv_cache=0))
    assert options == EngineOptions(**given)
    assert options.for_load()[flag] == TYPED[flag]


def test_no_flag_is_forgotten_on_its_way_to_the_engine() -> None:
    """Bits and revision go with the model that is chosen."""
    assert set(TYPED) == {field.name for field in fields(EngineFlags)} - {"quant", "revision", "keep_alive"}


@pytest.mark.parametrize(
    ("typed", "seconds"), [(None, 40.0), ("90", 90.0), ("5m", 300.0), ("1.5h", 5400.0), ("0", 0.0)]
)
def test_how_long_an_engine_stays_is_said_by_flag_or_setting(typed: str | None, seconds: float) -> None:
    assert EngineFlags(keep_alive=typed).options(Settings(keep_alive=40.0)).keep_alive == seconds


@pytest.mark.parametrize("typed", ["soon", "-1", "5 minutes", "nan", "1e9"])
def test_what_is_no_time_is_refused_by_the_name_of_the_flag(typed: str) -> None:
    with pytest.raises(Usage, match="--keep-alive"):
        EngineFlags(keep_alive=typed).options(Settings())


def test_a_load_is_told_everything_that_it_can_be_told() -> None:
    from glmchat.engine import Engine

    keywords = set(inspect.signature(Engine.load).parameters) - {"folder", "on_progress"}
    assert set(EngineOptions().for_load()) == keywords
    options = EngineOptions(quant=4, **TYPED)
    assert options.for_load() == {"quant": 4, **TYPED}


@pytest.mark.parametrize("word", ["auto", "cpu", "mps", "cuda", "cuda:1", " CUDA:0 ", "cuda:0,cuda:1"])
def test_known_devices_are_taken_in_small_letters(word: str) -> None:
    assert parse_device(word) == word.strip().lower()


@pytest.mark.parametrize(
    "word",
    ["gpu", "cuda:", "cuda:x", "cuda:-1", "cpu:0", "", "cuda,cpu", "cuda:0,cuda:0", "cuda:0,", "cuda:0;\x1b[31m"],
)
def test_any_other_device_is_refused_with_those_there_are(word: str) -> None:
    with pytest.raises(Usage) as refused:
        parse_device(word)
    assert "cuda:N" in refused.value.hint and "\x1b" not in refused.value.message


@pytest.mark.parametrize(
    ("parse", "names"), [(parse_dtype, DTYPES), (parse_products, PRODUCTS), (parse_cache_type, CACHE_TYPES)]
)
def test_an_unknown_type_is_refused_with_those_there_are(
    parse: Callable[[str | None], str | None], names: tuple[str, ...]
) -> None:
    assert [parse(name) for name in (None, *names)] == [None, *names]
    with pytest.raises(Usage) as refused:
        parse("float8\x1b[31m")
    assert all(name in refused.value.hint for name in names) and "\x1b" not in refused.value.message


def test_the_type_of_a_cache_is_typed_or_set_and_auto_stands_above_a_setting() -> None:
    narrow = Settings(cache_type="int8")
    assert [EngineFlags(cache_type=word).options(narrow).cache_type for word in (None, "auto", "bfloat16")] == [
        *("int8", None, "bfloat16"),
    ]
    assert EngineFlags().options(Settings()).cache_type is None


def test_how_many_answers_at_once_is_a_number_or_left_to_the_engine() -> None:
    assert [parse_parallel(word) for word in ("auto", "AUTO", "1", "64")] == [None, None, 1, 64]
    for word in ("0", "65", "-1", "many", "", "1.5"):
        with pytest.raises(Usage, match="--parallel"):
            parse_parallel(word)
