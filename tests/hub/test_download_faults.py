"""What servers get wrong, each against a real one: the file arrives whole, or is refused with the reason.

Covers hub/fetch.py, hub/file_request.py, hub/transfer.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from loopback_hub import LoopbackHub, Synthetic

from glmchat.core.errors import Damaged, Failed, GlmchatError, NetworkFailed
from glmchat.hub.download import Candidate, FetchedFile, FileRequest, Progress, RetryPolicy, download
from glmchat.hub.fetch import retry_after

DATA = Synthetic(1_500_000, seed=7)
BYTES = b"".join(DATA.read(at, 1 << 20) for at in range(0, len(DATA), 1 << 20))
SHA = hashlib.sha256(BYTES).hexdigest()
FAST = RetryPolicy(stall=0.4, first_pause=0.01, longest_pause=0.05, rounds=3)
NAME = "model.bin"


@pytest.fixture
def hub(loopback_hub: LoopbackHub) -> LoopbackHub:
    loopback_hub.add("tiny/model", {NAME: DATA, "config.json": b'{"a": 1}'})
    return loopback_hub


@pytest.fixture
def other() -> Iterator[LoopbackHub]:
    with LoopbackHub() as hub:
        hub.add("tiny/model", {NAME: DATA, "config.json": b'{"a": 1}'})
        yield hub


def url(hub: LoopbackHub, path: str = NAME) -> str:
    return f"{hub.url}/tiny/model/resolve/main/{path}"


def wanted(folder: Path, *hubs: LoopbackHub, path: str = NAME, **known: object) -> FileRequest:
    facts: dict[str, object] = {"size": len(DATA), "sha256": SHA, **known}
    return FileRequest(
        path=path,
        destination=folder / "blobs" / "whole",
        partial=folder / "blobs" / f"{SHA}.glmchat.incomplete",
        candidates=[Candidate(url(one, path)) for one in hubs],
        **facts,  # type: ignore[arg-type]
    )


def fetch(*files: FileRequest, retry: RetryPolicy = FAST) -> list[FetchedFile]:
    return download(files, on_progress=lambda _: None, cancelled=lambda: False, retry=retry)


def refused(want: FileRequest, kind: type[GlmchatError]) -> GlmchatError:
    with pytest.raises(kind) as caught:
        fetch(want)
    assert not want.destination.exists()
    return caught.value


def test_a_healthy_server_is_asked_once_and_the_file_is_whole(hub: LoopbackHub, tmp_path: Path) -> None:
    want = wanted(tmp_path, hub)
    (got,) = fetch(want)
    assert want.destination.read_bytes() == BYTES
    assert (got.size, got.sha256, got.resumed_from) == (len(BYTES), SHA, 0)
    assert got.host == hub.url.removeprefix("http://")
    assert len(hub.requests) == 1 and not want.partial.exists()


def test_a_cut_connection_goes_on_where_it_was_cut(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.fault(NAME, cut_after=400_000)
    hub.fault(NAME, cut_after=300_000)
    fetch(wanted(tmp_path, hub))
    assert (tmp_path / "blobs/whole").read_bytes() == BYTES
    starts = [one.range for one in hub.requests]
    assert starts == [None, (400_000, None), (700_000, None)]


def test_a_server_that_brings_a_little_each_time_still_finishes(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.fault(NAME, cut_after=150_000, times=None)
    fetch(wanted(tmp_path, hub))
    assert (tmp_path / "blobs/whole").read_bytes() == BYTES
    assert hub.sent_for(NAME) == len(BYTES)


@pytest.mark.parametrize("kept", [1, 65_536, 999_999, 1_499_999])
def test_a_half_file_of_an_earlier_run_is_continued(hub: LoopbackHub, tmp_path: Path, kept: int) -> None:
    want = wanted(tmp_path, hub)
    want.partial.parent.mkdir(parents=True)
    want.partial.write_bytes(BYTES[:kept])
    (got,) = fetch(want)
    assert want.destination.read_bytes() == BYTES
    assert got.resumed_from == kept and hub.requests[0].range == (kept, None)
    assert hub.sent_for(NAME) == len(BYTES) - kept


def test_a_half_file_that_is_all_there_needs_no_request(hub: LoopbackHub, tmp_path: Path) -> None:
    want = wanted(tmp_path, hub)
    want.partial.parent.mkdir(parents=True)
    want.partial.write_bytes(BYTES)
    fetch(want)
    assert want.destination.read_bytes() == BYTES and hub.requests == []


@pytest.mark.parametrize("left", [b"x" * 700_000, b"x" * len(BYTES), b"x" * 2_000_000])
def test_a_damaged_half_file_is_found_out_and_fetched_anew(hub: LoopbackHub, tmp_path: Path, left: bytes) -> None:
    want = wanted(tmp_path, hub)
    want.partial.parent.mkdir(parents=True)
    want.partial.write_bytes(left)
    fetch(want)
    assert want.destination.read_bytes() == BYTES


def test_a_server_that_ignores_range_is_compared_and_not_written_twice(hub: LoopbackHub, tmp_path: Path) -> None:
    want = wanted(tmp_path, hub)
    want.partial.parent.mkdir(parents=True)
    want.partial.write_bytes(BYTES[:500_000])
    hub.fault(NAME, ignore_range=True)
    seen: list[Progress] = []
    download([want], on_progress=seen.append, cancelled=lambda: False, retry=FAST)
    assert want.destination.read_bytes() == BYTES
    done = [one.done for one in seen]
    assert done == sorted(done) and done[-1] == len(BYTES), "progress went backwards"


def test_a_server_that_ignores_range_and_changed_the_prefix_starts_over(hub: LoopbackHub, tmp_path: Path) -> None:
    want = wanted(tmp_path, hub)
    want.partial.parent.mkdir(parents=True)
    want.partial.write_bytes(b"other" * 100_000)
    hub.fault(NAME, ignore_range=True)
    fetch(want)
    assert want.destination.read_bytes() == BYTES


def test_a_range_that_begins_earlier_is_taken_from_the_right_place(hub: LoopbackHub, tmp_path: Path) -> None:
    want = wanted(tmp_path, hub)
    want.partial.parent.mkdir(parents=True)
    want.partial.write_bytes(BYTES[:500_000])
    hub.fault(NAME, start_at=100_000)
    fetch(want)
    assert want.destination.read_bytes() == BYTES


def test_a_range_that_begins_later_is_refused(hub: LoopbackHub, tmp_path: Path) -> None:
    want = wanted(tmp_path, hub)
    want.partial.parent.mkdir(parents=True)
    want.partial.write_bytes(BYTES[:500_000])
    hub.fault(NAME, start_at=600_000, times=None)
    error = refused(want, Damaged)
    assert "600000" in error.message


def test_a_stalled_server_gives_way_to_the_next_one(hub: LoopbackHub, other: LoopbackHub, tmp_path: Path) -> None:
    hub.fault(NAME, stall_after=200_000, times=None)
    (got,) = fetch(wanted(tmp_path, hub, other))
    assert (tmp_path / "blobs/whole").read_bytes() == BYTES
    assert got.host in other.url
    assert other.requests_for(NAME)[0].range == (200_000, None), "what the first one sent was thrown away"


@pytest.mark.parametrize("status", [500, 502, 503, 429, 408])
def test_a_server_error_is_tried_again(hub: LoopbackHub, tmp_path: Path, status: int) -> None:
    hub.fault(NAME, status=status)
    fetch(wanted(tmp_path, hub))
    assert len(hub.requests) == 2 and (tmp_path / "blobs/whole").read_bytes() == BYTES


def test_retry_after_is_obeyed(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.fault(NAME, status=429, retry_after="1")
    (got,) = fetch(wanted(tmp_path, hub))
    assert got.seconds >= 1.0


def test_a_source_that_asks_to_wait_is_passed_over_for_another(
    hub: LoopbackHub, other: LoopbackHub, tmp_path: Path
) -> None:
    hub.fault(NAME, status=429, retry_after="200")
    (got,) = fetch(wanted(tmp_path, hub, other))
    assert got.host in other.url and got.seconds < 100


def test_a_wait_that_is_too_long_is_told_and_not_slept(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.fault(NAME, status=429, retry_after="90000", times=None)
    assert "429" in refused(wanted(tmp_path, hub), NetworkFailed).message


def test_a_dead_server_ends_in_one_sentence_and_keeps_what_came(hub: LoopbackHub, tmp_path: Path) -> None:
    want = wanted(tmp_path, hub)
    hub.fault(NAME, cut_after=300_000)
    hub.fault(NAME, status=503, times=None)
    error = refused(want, NetworkFailed)
    assert "503" in error.message and NAME in error.message and "\n" not in error.message
    assert want.partial.read_bytes() == BYTES[:300_000]
    hub.heal()
    (got,) = fetch(want)
    assert got.resumed_from == 300_000 and want.destination.read_bytes() == BYTES


def test_a_refused_connection_names_the_host(tmp_path: Path) -> None:
    with LoopbackHub() as gone:
        want = wanted(tmp_path, gone)
    assert gone.url.removeprefix("http://") in refused(want, NetworkFailed).message


def test_another_file_under_the_name_is_refused_and_not_kept(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.fault(NAME, content=b"y" * len(BYTES), omit=("x-linked-etag", "x-repo-commit", "etag"), times=None)
    want = wanted(tmp_path, hub)
    error = refused(want, Damaged)
    assert error.exit == 3 and "a different file" in error.message
    assert not want.partial.exists() or want.partial.stat().st_size == 0


def test_a_mirror_with_another_version_gives_way_before_a_byte_is_read(
    hub: LoopbackHub, other: LoopbackHub, tmp_path: Path
) -> None:
    hub.add("tiny/model", {NAME: b"z" * len(BYTES)})
    (got,) = fetch(wanted(tmp_path, hub, other))
    assert got.host in other.url and got.size == len(BYTES)


def test_a_file_that_changes_between_attempts_is_started_over(hub: LoopbackHub, tmp_path: Path) -> None:
    gone = ("x-linked-etag", "x-repo-commit")
    hub.fault(NAME, content=b"old" * 500_000, etag="v1", cut_after=400_000, omit=gone)
    hub.fault(NAME, etag="v2", omit=gone, times=None)
    fetch(wanted(tmp_path, hub))
    assert (tmp_path / "blobs/whole").read_bytes() == BYTES


@pytest.mark.parametrize("lie", [1_499_999, 1_500_001, 10])
def test_a_length_that_is_not_the_known_one_is_refused(
    hub: LoopbackHub, other: LoopbackHub, tmp_path: Path, lie: int
) -> None:
    hub.fault(NAME, content_length=lie, times=None)
    (got,) = fetch(wanted(tmp_path, hub, other))
    assert got.host in other.url
    assert (tmp_path / "blobs/whole").read_bytes() == BYTES


def test_a_server_that_sends_more_than_it_should_is_refused(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.fault(NAME, content=BYTES + b"more", omit=("content-length",), times=None)
    want = wanted(tmp_path, hub)
    assert "more than" in refused(want, Damaged).message


def test_a_server_without_content_length_works(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.fault(NAME, omit=("content-length",))
    fetch(wanted(tmp_path, hub))
    assert (tmp_path / "blobs/whole").read_bytes() == BYTES


def test_a_web_page_is_refused_with_its_own_words(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.fault(NAME, html=True, times=None)
    error = refused(wanted(tmp_path, hub, size=None), NetworkFailed)
    assert "web page" in error.message and error.code == "pull.html"


def test_a_compressed_answer_is_unpacked(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.fault(NAME, gzip=True)
    fetch(wanted(tmp_path, hub))
    assert (tmp_path / "blobs/whole").read_bytes() == BYTES


def test_a_mirror_without_the_hubs_headers_works_where_the_hash_is_known(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.fault(NAME, omit=("x-repo-commit", "etag", "x-linked-etag", "x-linked-size"), times=None)
    fetch(wanted(tmp_path, hub))
    assert (tmp_path / "blobs/whole").read_bytes() == BYTES


def test_a_file_whose_hash_nobody_knows_is_refused_unless_the_host_is_trusted(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.fault(NAME, omit=("x-repo-commit", "etag", "x-linked-etag", "x-linked-size"), times=None)
    want = wanted(tmp_path, hub, size=None, sha256=None)
    error = refused(want, Damaged)
    assert error.code == "pull.unknown_hash" and "--trust-host" in error.hint
    trusted = FileRequest(NAME, want.destination, want.partial, [Candidate(url(hub), trusted=True)])
    (got,) = fetch(trusted)
    assert want.destination.read_bytes() == BYTES and got.sha256 == SHA


def test_a_hubs_own_hash_is_used_when_the_planner_has_none(hub: LoopbackHub, tmp_path: Path) -> None:
    want = wanted(tmp_path, hub, size=None, sha256=None)
    hub.fault(NAME, content=b"y" * len(BYTES), times=None)
    assert "a different file" in refused(want, Damaged).message
    hub.heal()
    fetch(want)
    assert want.destination.read_bytes() == BYTES


def test_a_small_file_is_proved_by_its_git_blob(hub: LoopbackHub, tmp_path: Path) -> None:
    blob = hub.file("tiny/model", "config.json").git_blob
    want = wanted(tmp_path, hub, path="config.json", size=8, sha256=None, git_blob=blob)
    (got,) = fetch(want)
    assert want.destination.read_bytes() == b'{"a": 1}'
    assert got.sha256 == hashlib.sha256(b'{"a": 1}').hexdigest()
    want.destination.unlink()
    hub.fault("config.json", content=b'{"a": 2}', times=None)
    refused(want, Damaged)


@pytest.mark.parametrize("known", [True, False])
def test_without_a_hash_a_changed_file_is_never_mixed(hub: LoopbackHub, tmp_path: Path, known: bool) -> None:
    """The ETag is all that binds the halves of a trusted host's file; with a hash, the hash does."""
    gone = ("x-linked-etag", "x-repo-commit", "x-linked-size")
    hub.fault(NAME, content=b"old" * 500_000, etag="v1", cut_after=700_000, omit=gone)
    hub.fault(NAME, etag="v2", omit=gone, times=None)
    facts: dict[str, Any] = {} if known else {"size": None, "sha256": None}
    want = wanted(tmp_path, hub, **facts)
    want = FileRequest(
        NAME, want.destination, want.partial, [Candidate(url(hub), trusted=True)], size=want.size, sha256=want.sha256
    )
    fetch(want)
    assert want.destination.read_bytes() == BYTES


def test_a_missing_file_and_a_closed_door_say_so(hub: LoopbackHub, tmp_path: Path) -> None:
    error = refused(wanted(tmp_path, hub, path="nothing.bin"), Failed)
    assert error.code == "pull.missing" and "404" in error.message
    hub.repos["tiny/model"].gated_by = "hf_secret"
    error = refused(wanted(tmp_path, hub), Failed)
    assert error.code == "pull.denied" and "HF_TOKEN" in error.hint


def test_an_empty_file_is_a_file(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.add("tiny/model", {"empty": b""})
    want = wanted(tmp_path, hub, path="empty", size=0, sha256=hashlib.sha256(b"").hexdigest())
    (got,) = fetch(want)
    assert got.size == 0 and want.destination.read_bytes() == b""


def test_a_failing_source_is_asked_last_for_the_files_that_follow(
    hub: LoopbackHub, other: LoopbackHub, tmp_path: Path
) -> None:
    files = {f"part-{i}.bin": Synthetic(10_000, seed=i) for i in range(6)}
    for one in (hub, other):
        one.add("tiny/model", dict(files))
    hub.fault("*", status=503, times=None)
    wants = [
        FileRequest(
            name,
            tmp_path / name,
            tmp_path / f"{name}.glmchat.incomplete",
            [Candidate(url(hub, name)), Candidate(url(other, name))],
            sha256=other.file("tiny/model", name).sha256,
            size=10_000,
        )
        for name in files
    ]
    got = download(wants, on_progress=lambda _: None, cancelled=lambda: False, retry=FAST, concurrency=1)
    assert [one.path for one in got] == list(files), "the order of the answer is the order of the question"
    assert all(one.host in other.url for one in got)
    assert len(hub.requests) == 2, "a source that failed twice was asked again before the one that works"


@pytest.mark.parametrize("target", ["http://[/", "http://x:99999999/", "file:///etc/passwd", "http://"])
def test_a_redirect_to_nowhere_is_refused(target: str, hub: LoopbackHub, tmp_path: Path) -> None:
    hub.fault(NAME, redirect=target, times=None)
    assert "redirects to" in refused(wanted(tmp_path, hub), Damaged).message


def test_numbers_without_end_are_no_numbers(hub: LoopbackHub, tmp_path: Path) -> None:
    """int() raises for more than 4300 digits, and isdigit() takes a superscript for one."""
    hub.fault(NAME, cut_after=400_000)
    hub.fault(NAME, total=int("9" * 4000), times=None)
    assert "did not say which" in refused(wanted(tmp_path, hub), Damaged).message
    assert retry_after("²") is None
