"""What a person types to name a model."""

from __future__ import annotations

from pathlib import Path

import pytest

from glmchat.core.errors import Usage
from glmchat.hub.references import Reference, parse


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("chatglm-6b", Reference(name="chatglm-6b")),
        ("chatglm-6b@096f3de6", Reference(name="chatglm-6b", revision="096f3de6")),
        ("chatglm-6b:int4", Reference(name="chatglm-6b", quant="int4")),
        ("THUDM/chatglm-6b@v0.1.0:int8", Reference(repo="THUDM/chatglm-6b", revision="v0.1.0", quant="int8")),
        ("owner/repo@refs/pr/1", Reference(repo="owner/repo", revision="refs/pr/1")),
        ("https://huggingface.co/THUDM/chatglm-6b/tree/main", Reference(repo="THUDM/chatglm-6b", revision="main")),
        ("https://www.modelscope.cn/models/ZhipuAI/chatglm3-6b", Reference(repo="ZhipuAI/chatglm3-6b")),
        ("hf://owner/repo@v1", Reference(repo="owner/repo", revision="v1")),
        ("小模型", Reference(name="小模型")),
    ],
)
def test_every_form_of_a_reference_is_understood(text: str, expected: Reference) -> None:
    assert parse(text) == expected


@pytest.mark.parametrize("text", ["./folder", "/no/such/folder", "~/models/x", "../x", "model.gguf", "."])
def test_a_path_is_a_path_even_if_nothing_is_there(text: str) -> None:
    reference = parse(text)
    assert reference.path is not None
    assert reference.path.is_absolute()
    assert reference.repo is None


def test_an_existing_folder_is_never_taken_for_a_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "THUDM" / "chatglm-6b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert parse("THUDM/chatglm-6b").path == tmp_path / "THUDM" / "chatglm-6b"
    assert parse("THUDM/chatglm2-6b").repo == "THUDM/chatglm2-6b"


def test_a_quantisation_may_follow_a_path(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    assert parse(f"{tmp_path}/m:int4") == Reference(path=tmp_path / "m", quant="int4")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  ",
        "a/b/c",
        "chatglm:int3",
        "x@",
        "x@..",
        "x@a/../b",
        "a\0b",
        "../" * 3 + "\0",
        "name\x1b[31m",
        "a--b/c",
        "https://x.y/only",
        "https://[",
        "./" + "x" * 256,
    ],
)
def test_nonsense_is_a_usage_error_with_a_hint(text: str) -> None:
    with pytest.raises(Usage) as caught:
        parse(text)
    assert caught.value.hint
    assert "\x1b" not in caught.value.message
    assert "\0" not in caught.value.message


def test_two_different_revisions_contradict_each_other() -> None:
    assert parse("a/b", revision="v1").revision == "v1"
    assert parse("a/b@v1", revision="v1").revision == "v1"
    with pytest.raises(Usage, match="conflict"):
        parse("a/b@v1", revision="v2")


@pytest.mark.parametrize(
    ("text", "file", "revision"),
    [
        ("acme/x-GGUF:Q6_K", "Q6_K", None),
        ("acme/x-GGUF:iq4_xs", "IQ4_XS", None),
        ("acme/x-GGUF@v2:q6_k", "Q6_K", "v2"),
        ("hf.co/acme/x-GGUF:Q6_K", "Q6_K", None),
        ("https://huggingface.co/acme/x-GGUF:Q4_K_M", "Q4_K_M", None),
        ("acme/x-GGUF/x.Q6_K.gguf", "x.Q6_K.gguf", None),
        ("acme/x-GGUF@v2/q6/x.gguf", "q6/x.gguf", "v2"),
        ("https://huggingface.co/acme/x-GGUF/blob/main/x.Q6_K.gguf", "x.Q6_K.gguf", None),
        ("https://huggingface.co/acme/x-GGUF/resolve/main/x.Q6_K.gguf?download=true", "x.Q6_K.gguf", None),
        ("https://huggingface.co/acme/x-GGUF/blob/v2/q6/x%20y.gguf", "q6/x y.gguf", "v2"),
        ("huggingface.co/acme/x-GGUF/blob/main/x.Q6_K.gguf", "x.Q6_K.gguf", None),
    ],
)
def test_one_file_of_twenty_is_named_as_other_programs_name_it(text: str, file: str, revision: str | None) -> None:
    assert parse(text) == Reference(repo="acme/x-GGUF", file=file, revision=revision)
    assert parse(str(parse(text))) == parse(text)


def test_a_file_and_the_bits_to_quantise_it_to_are_told_apart() -> None:
    assert parse("acme/x-GGUF:F16:int4") == Reference(repo="acme/x-GGUF", file="F16", quant="int4")
    for text in ("acme/x-GGUF:Q6_K:Q8_0", "acme/x:int4:int8"):
        with pytest.raises(Usage, match="does not support"):
            parse(text)


def test_a_file_in_a_folder_that_is_here_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "acme" / "x").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert parse("acme/x/model.gguf").path == tmp_path / "acme" / "x" / "model.gguf"


@pytest.mark.parametrize("text", ["huggingface.co/acme/x", "hf.co/acme/x", "modelscope.cn/models/acme/x"])
def test_an_address_needs_no_scheme(text: str) -> None:
    assert parse(text).repo == "acme/x"
