"""The log of a run is read while it grows, whole lines alone, and what was done twice counts once."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmchat.core.run_log import LogReader, LogWriter, Progress, curve_svg


def step(number: int, loss: float) -> dict[str, object]:
    return {"kind": "step", "step": number, "loss": loss}


def test_a_half_line_is_no_record_until_the_rest_is_there(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    reader = LogReader(path)
    assert reader.read() == []  # not there yet
    whole = (json.dumps(step(1, 2.5)) + "\n" + json.dumps({"kind": "sample", "answer": "你好\n"}) + "\n").encode()
    heard = []
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        heard += reader.read()
    assert heard == [step(1, 2.5), {"kind": "sample", "answer": "你好\n"}]


def test_a_writer_takes_a_half_line_away_and_goes_on_behind_it(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    first = LogWriter(path)
    first(step(1, 3.0))
    first.close()
    with path.open("ab") as file:
        file.write(b'{"kind": "step", "st')
    reader = LogReader(path)
    assert reader.read() == [step(1, 3.0)]
    second = LogWriter(path)
    second(step(2, 2.0))
    second.close()
    assert reader.read() == [step(2, 2.0)]
    assert path.stat().st_mode & 0o777 == 0o600


def test_lines_that_are_no_records_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'nonsense\n[1]\n\xff\xfe\n{"kind": "end"}\n')
    assert LogReader(path).read() == [{"kind": "end"}]


def test_a_record_that_the_disk_does_not_take_leaves_the_log_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "log.jsonl"
    log = LogWriter(path)
    log(step(1, 3.0))
    write = os.write
    taken: list[bytes] = []

    def full(descriptor: int, data: bytes) -> int:
        if taken:
            raise OSError(28, "No space left on device")
        taken.append(data)
        return write(descriptor, data[:7])

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space"):
            log(step(2, 2.0))
    log(step(3, 1.0))
    assert LogReader(path).read() == [step(1, 3.0), step(3, 1.0)]
    log.close()


def test_what_is_no_number_is_written_as_a_word(tmp_path: Path) -> None:
    log = LogWriter(tmp_path / "log.jsonl")
    log({"kind": "step", "step": 1, "loss": math.nan, "grad_norm": math.inf})
    log.close()
    json.loads((tmp_path / "log.jsonl").read_text(), parse_constant=lambda word: pytest.fail(word))
    progress = Progress()
    progress.add(LogReader(tmp_path / "log.jsonl").read())
    assert progress.losses == []


@given(st.lists(st.tuples(st.integers(1, 12), st.floats(0, 9)), max_size=40))
def test_of_steps_that_were_done_again_the_later_word_counts(said: list[tuple[int, float]]) -> None:
    """However often a run was gone on with, its curve is the steps in their order, none twice."""
    progress = Progress()
    progress.add([step(number, loss) for number, loss in said])
    numbers = [number for number, _ in progress.losses]
    assert numbers == sorted(set(numbers))
    if said:
        assert progress.losses[-1] == said[-1]
        assert all((number, loss) in said for number, loss in progress.losses)


def test_a_run_that_is_gone_on_with_has_not_ended() -> None:
    progress = Progress()
    progress.add([step(1, 3.0), {"kind": "checkpoint", "step": 1}, step(2, 2.0), {"kind": "end", "state": "stopped"}])
    assert progress.end is not None
    progress.add([{"kind": "start", "step": 2}])
    assert progress.end is None
    assert progress.checkpoint == 1


def test_the_drawing_is_an_image_that_loads_nothing() -> None:
    progress = Progress()
    for many in (0, 1, 50):
        progress.add([step(number, 3.0 / number) for number in range(1, many + 1)])
        progress.add([{"kind": "evaluation", "step": many, "loss": 1.0}])
        drawn = curve_svg(progress)
        root = ElementTree.fromstring(drawn)
        lines = [one for one in root.iter() if one.tag.endswith("polyline")]
        assert len((lines[0].get("points") or "").split()) == len(progress.losses)
        assert "href" not in drawn
