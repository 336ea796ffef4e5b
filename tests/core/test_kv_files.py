"""The files of conversations' caches: whose they are, which go first, and that a deleted conversation leaves none."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from glmchat.core import kv_files, locations

KEY, ONE, TWO = "a" * 32, "1" * 32, "2" * 32


def put(conversation: str, size: int, used: int, key: str = KEY) -> Path:
    kv_files.open_folder()
    path = kv_files.kv_path(key, conversation)
    path.write_bytes(bytes(size))
    os.utime(path, (used, used))
    return path


def test_the_folder_is_this_users_alone() -> None:
    assert kv_files.open_folder() == locations.cache_dir() / "kv"
    assert locations.kv_dir().stat().st_mode & 0o777 == 0o700
    locations.kv_dir().chmod(0o755)
    kv_files.open_folder()
    assert locations.kv_dir().stat().st_mode & 0o777 == 0o700


def test_a_folder_of_somebody_else_is_not_used() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder away")
    os.chown(kv_files.open_folder(), 12345, 12345)
    with pytest.raises(PermissionError):
        kv_files.open_folder()


def test_where_there_is_no_folder_there_are_no_files() -> None:
    assert (kv_files.kv_files(), kv_files.everything(), kv_files.kv_bytes()) == ([], [], 0)


def test_room_is_made_by_taking_away_what_was_used_least_recently() -> None:
    paths = [put(str(number) * 32, 100, used) for number, used in ((1, 30), (2, 10), (3, 20))]
    assert kv_files.make_room(100, 300, kv_files.kv_path(KEY, "4" * 32))
    assert [path.exists() for path in paths] == [True, False, True]
    assert kv_files.make_room(150, 250, paths[0])  # which takes the place of one of 100
    assert [path.exists() for path in paths] == [True, False, True]
    assert not kv_files.make_room(301, 300, paths[0])
    assert kv_files.kv_bytes() == 200


def test_a_deleted_conversation_leaves_nothing_and_only_a_later_use_of_it_is_written() -> None:
    before = time.time()
    mine, others, foreign = put(ONE, 10, 1), put(ONE, 10, 2, "b" * 32), put(TWO, 10, 3)
    kv_files.forget(ONE)
    assert [path.exists() for path in (mine, others, foreign)] == [False, False, True]
    assert kv_files.is_forgotten(ONE, before) and not kv_files.is_forgotten(TWO, before)
    assert not kv_files.is_forgotten(ONE, time.time() + 1)


def test_what_killed_engines_left_goes_and_what_others_put_there_stays() -> None:
    path = put(ONE, 10, 1)
    half, fresh = (path.with_name(f"{path.name}.{n}-0.incomplete") for n in (1, 2))
    mark, mine = path.with_name(f"{ONE}.gone"), path.with_name("notes.txt")
    for file in (half, fresh, mark, mine):
        file.write_bytes(b"x")
    for file in (half, mark, mine):
        os.utime(file, (1, 1))
    assert kv_files.everything() == sorted([path, half, fresh, mark])
    kv_files.make_room(1, 100, path)
    assert [file.exists() for file in (half, fresh, mark, mine, path)] == [False, True, False, True, True]


@pytest.mark.parametrize("text", ["", "../" + "a" * 29, "A" * 32, "a" * 31, "a" * 33, "a" * 31 + "\n"])
def test_a_name_is_nothing_that_could_lead_elsewhere(text: str) -> None:
    assert not kv_files.is_name(text)
    assert kv_files.is_name(kv_files.conversation_name(Path("/x/history.db"), 7))


def test_conversations_of_other_histories_have_other_names() -> None:
    names = {kv_files.conversation_name(Path(path), number) for path in ("/a/h.db", "/b/h.db") for number in (1, 2)}
    assert len(names) == 4
