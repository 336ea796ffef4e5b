"""Only regular files are opened, none is waited for, and none is read beyond its bound."""

from __future__ import annotations

import errno
import os
import resource
import signal
import threading
from pathlib import Path

import pytest
from strange_files import STRANGE, put

from glmchat.core.errors import Damaged, refusal
from glmchat.core.files import (
    TooLarge,
    bound,
    files_below,
    open_file,
    read_file,
    read_given,
    read_text,
    require_plain_folder,
    write_for_person,
)

SECONDS = 5.0  # far above what a look takes, far below a test's own limit


@pytest.mark.parametrize("kind", STRANGE)
def test_what_is_no_file_is_refused_at_once_with_words(tmp_path: Path, kind: str) -> None:
    put(kind, tmp_path / "config.json")
    raised: list[OSError] = []

    def read() -> None:
        try:
            read_file(tmp_path / "config.json")
        except OSError as error:
            raised.append(error)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(SECONDS)
    assert len(raised) == 1 and raised[0].strerror
    assert raised[0].filename == str(tmp_path / "config.json")


@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "spiece.model", "chat_template.jinja", "model.bin"])
def test_a_folder_with_one_of_them_is_refused_by_name(tmp_path: Path, name: str, kind: str) -> None:
    put(kind, tmp_path / name)
    if name == "model.bin" and kind == "terabyte":
        require_plain_folder(tmp_path)  # weights may be as large as they like
        return
    with pytest.raises(Damaged, match=name) as refused:
        require_plain_folder(tmp_path)
    assert refused.value.hint


def test_a_pipe_under_a_name_that_nobody_knows_is_refused_too_and_a_folder_is_not(tmp_path: Path) -> None:
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "weights.part").symlink_to("nowhere")
    require_plain_folder(tmp_path)
    os.mkfifo(tmp_path / "bpe.codes")
    with pytest.raises(Damaged, match=r"bpe\.codes"):
        require_plain_folder(tmp_path)


def test_a_file_that_tells_no_size_is_bounded_while_it_is_read() -> None:
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        pytest.skip("this system has no /proc")
    assert maps.stat().st_size == 0 and read_file(maps)
    with pytest.raises(TooLarge):
        read_file(maps, 100)


def test_the_null_device_is_an_empty_file() -> None:
    assert read_file(Path(os.devnull)) == b""


def test_what_a_shell_hands_over_is_read_to_its_end(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.write(writing, b"key")
    os.close(writing)
    try:
        assert read_given(Path(f"/dev/fd/{reading}"), 100) == b"key"
    finally:
        os.close(reading)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="named pipe"):
        read_given(tmp_path / "pipe", 100)


def test_each_kind_of_file_has_its_bound_and_text_is_utf_8(tmp_path: Path) -> None:
    assert (
        bound(Path("config.json")) < bound(Path("tokenizer_config.json")) < bound(Path("model.safetensors.index.json"))
    )
    (tmp_path / "a.txt").write_text("词", encoding="utf-8")
    assert read_text(tmp_path / "a.txt") == "词"
    (tmp_path / "a.txt").write_bytes(b"\xff")
    assert read_text(tmp_path / "a.txt", errors="replace") == "\ufffd"
    with pytest.raises(UnicodeDecodeError):
        read_text(tmp_path / "a.txt")


def test_a_disk_that_fails_while_a_file_is_read_names_the_file(tmp_path: Path) -> None:
    put("own memory", tmp_path / "x")
    with open_file(tmp_path / "x") as file, pytest.raises(OSError, match="x") as failed:
        file.read(10)
    assert failed.value.errno == errno.EIO
    words = refusal(failed.value)
    assert words is not None and "x: " in words.message and words.hint


def test_a_file_for_a_person_is_whole_or_what_it_was(tmp_path: Path) -> None:
    path = tmp_path / "export.json"
    write_for_person(path, "first")
    with pytest.raises(FileExistsError):
        write_for_person(path, "second")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="export"):
            write_for_person(path, "x" * 100_000, replace=True)
        with pytest.raises(OSError, match="another"):
            write_for_person(tmp_path / "another", "x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert path.read_text() == "first" and [each.name for each in tmp_path.iterdir()] == ["export.json"]
    write_for_person(path, "second", replace=True)
    assert path.read_text() == "second"


def test_a_link_where_the_new_file_grows_is_not_followed(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.write_text("theirs")
    (tmp_path / f".export.json.{os.getpid()}.tmp").symlink_to(theirs)
    write_for_person(tmp_path / "export.json", "mine")
    assert (theirs.read_text(), (tmp_path / "export.json").read_text()) == ("theirs", "mine")


def test_a_disk_is_looked_at_for_a_moment_and_a_folder_that_may_not_be_read_holds_none(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c").write_text("x")
    (tmp_path / "a" / "link").symlink_to(tmp_path / "gone")
    (tmp_path / "round").symlink_to(tmp_path)
    assert sorted(files_below(tmp_path)) == [tmp_path / "a" / "b" / "c", tmp_path / "a" / "link"]
    assert 0 < len(list(files_below(Path("/")))) <= 20_000, "/proc has folders that nobody may read"
