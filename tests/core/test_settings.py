"""Settings: the file, the environment above it, and errors that name the key.

Covers core/messages.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from glmchat.core.errors import DoesNotFit, Failed, GlmchatError, Usage
from glmchat.core.language import said_here, tr
from glmchat.core.messages import Sampling, parse_sampling_value, sampling_name
from glmchat.core.settings import Settings, load_settings, parse_bytes


def test_a_missing_file_is_all_defaults(tmp_path: Path) -> None:
    assert load_settings(tmp_path / "none.toml", {}) == Settings()


def test_the_environment_stands_above_the_file(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text('default_model = "chatglm-6b"\nthreads = 4\n[sampling]\ntemp = 0.5\ntop_p = 0.9\n')
    settings = load_settings(file, {"GLMCHAT_MODEL": "smollm2", "GLMCHAT_TOP_P": "0.4"})
    assert settings.default_model == "smollm2"
    assert settings.threads == 4
    assert settings.sampling == {"temperature": 0.5, "top_p": 0.4}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("default_model = 3", "default_model"),
        ("colour = 'red'", "colour"),
        ("theme = 'puce'", "theme"),
        ("cache_type = 'int4'", "cache_type"),
        ("a = = 1", "line 1"),
        ("[sampling]\ntemperature = 9.0", "temperature"),
        ("[sampling]\nwarmth = 1", "warmth"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, text: str, named: str) -> None:
    file = tmp_path / "config.toml"
    file.write_text(text)
    with pytest.raises(Usage) as caught:
        load_settings(file, {})
    assert named in caught.value.message
    assert caught.value.hint


def test_a_wrong_variable_is_named() -> None:
    with pytest.raises(Usage, match="GLMCHAT_THREADS"):
        load_settings(Path("/nonexistent"), {"GLMCHAT_THREADS": "many"})


@pytest.mark.parametrize(
    ("word", "name"),
    [("temp", "temperature"), ("top-p", "top_p"), ("TOP_K", "top_k"), ("num_predict", "max_tokens"), ("seed", "seed")],
)
def test_sampling_settings_have_the_names_that_users_know(word: str, name: str) -> None:
    assert sampling_name(word) == name


@pytest.mark.parametrize(("name", "value"), [("temperature", -0.1), ("top_p", 1.5), ("temperature", float("nan"))])
def test_a_value_outside_its_range_is_refused(name: str, value: float) -> None:
    with pytest.raises(Usage, match=name):
        Sampling(**{name: value})  # type: ignore[arg-type]


def test_a_value_that_is_no_number_is_refused_with_an_example() -> None:
    with pytest.raises(Usage) as caught:
        parse_sampling_value("top_p", "high")
    assert "/set top_p" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "variables"),
    [
        ("enable_thinking=false", {"enable_thinking": False}),
        ("enable_thinking=off effort=low", {"enable_thinking": False, "effort": "low"}),
        ('note="two words" n=3', {"note": "two words", "n": 3}),
        ('{"a": [1, null]}', {"a": [1, None]}),
        ("", {}),
    ],
)
def test_a_templates_variables_are_typed_as_pairs_or_as_json(text: str, variables: dict[str, object]) -> None:
    assert parse_sampling_value("template_variables", text) == variables


@pytest.mark.parametrize("text", ["enable_thinking", "{", "[1]", "a=1 b"])
def test_what_is_no_pair_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(Usage) as caught:
        parse_sampling_value("template_variables", text)
    assert "enable_thinking=false" in caught.value.hint


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt", "a b", ""])
def test_a_templates_own_arguments_are_not_for_setting(name: str) -> None:
    with pytest.raises(Usage) as caught:
        Sampling(template_variables={name: 1})
    assert caught.value.code == "sampling.template_variables"


def test_the_record_of_an_answer_names_template_variables_only_where_there_are_some() -> None:
    assert "template_variables" not in Sampling().to_json()
    assert Sampling(template_variables={"a": 1}).to_json()["template_variables"] == {"a": 1}


@pytest.mark.parametrize("error", [Usage("a", hint="b"), DoesNotFit("a", hint="b", code="c.d"), Failed("a", hint="b")])
def test_an_error_survives_the_wire(error: GlmchatError) -> None:
    again = GlmchatError.from_json(error.to_json())
    assert (type(again), again.to_json()) == (type(error), error.to_json())


def test_minus_one_means_what_other_programs_mean_by_it(tmp_path: Path) -> None:
    typed = {name: parse_sampling_value(name, "-1") for name in ("max_tokens", "seed", "top_k")}
    assert typed == {"max_tokens": None, "seed": None, "top_k": 0}
    file = tmp_path / "config.toml"
    file.write_text("[sampling]\nmax_tokens = -1\nseed = -1\ntop_k = -1\n")
    assert load_settings(file, {"GLMCHAT_TOP_K": "-1"}).sampling == typed
    assert Sampling(**typed) == Sampling()
    with pytest.raises(Usage, match="between 1 and"):
        Sampling(max_tokens=0)


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ('temperature = "hot"', "temperature"),
        ("temperature = true", "temperature"),
        ("top_k = 1.5", "top_k"),
        ('top_k = "../../x"', "top_k"),
        ("seed = []", "seed"),
        ('stop = "a"', "stop"),
        ("stop = [1]", "stop"),
        ("ignore_eos = 1", "ignore_eos"),
        ("template_variables = 7", "template_variables"),
    ],
)
def test_a_sampling_value_of_another_type_is_named_with_its_file(tmp_path: Path, line: str, name: str) -> None:
    file = tmp_path / "config.toml"
    file.write_text(f"[sampling]\n{line}\n")
    with pytest.raises(Usage, match=name) as refused:
        load_settings(file, {})
    assert str(file) in refused.value.message


@pytest.mark.parametrize("content", [b"\xff\xfe", b"x = " + b"[" * 100_000, b"a = 1979-13-45", b"\x00"])
def test_a_file_that_is_no_toml_is_refused_with_its_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.toml").write_bytes(content)
    with pytest.raises(Usage, match=r"config\.toml"):
        load_settings(tmp_path / "config.toml", {})


@pytest.mark.parametrize(
    ("text", "count"),
    [("2GB", 2 * 10**9), ("1.5 gib", 3 * 2**29), ("500M", 5 * 10**8), ("0", 0), (0, 0), (12, 12), ("7b", 7)],
)
def test_a_size_is_written_as_people_write_it(text: object, count: int) -> None:
    assert parse_bytes(text, "here") == count


@pytest.mark.parametrize("text", ["much", "-1", True, "2XB", [], "1e9", "", "GB"])
def test_what_is_no_size_is_refused_with_its_place(text: object, tmp_path: Path) -> None:
    with pytest.raises(Usage, match="kv_cache"):
        parse_bytes(text, "config.toml: kv_cache")
    if isinstance(text, str) and text:
        with pytest.raises(Usage, match="GLMCHAT_KV_CACHE"):
            load_settings(tmp_path / "none.toml", {"GLMCHAT_KV_CACHE": text})


def test_the_environment_stands_above_the_file_for_the_size_of_caches(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text('kv_cache = "3GB"')
    assert load_settings(file, {}).kv_cache == 3 * 10**9
    assert load_settings(file, {"GLMCHAT_KV_CACHE": "0"}).kv_cache == 0
    assert load_settings(tmp_path / "none.toml", {}).kv_cache == 2 * 10**9


@pytest.mark.parametrize("spoken", ["en", "zh"])
@pytest.mark.parametrize("heard", ["en", "zh"])
def test_a_sentence_of_a_shared_engine_is_said_in_the_language_of_the_window(
    spoken: str, heard: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for sentence in ("no NVIDIA driver responds", "the machine has no NVIDIA card"):
        monkeypatch.setenv("GLMCHAT_LANG", spoken)
        said = tr(sentence)
        monkeypatch.setenv("GLMCHAT_LANG", heard)
        assert said_here(said) == tr(sentence)
    assert said_here("RTX 3090, 22.1 GB free") == "RTX 3090, 22.1 GB free" and said_here(None) is None
