"""Rows as other readers read them, and every fault by its line and column.

Covers tuning/reading.py, tuning/raw.py, tuning/rows.py, tuning/gathering.py.
Right values come from json and csv.
"""

from __future__ import annotations

import csv
import io
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glmchat.tuning import reading
from glmchat.tuning.dataset import DataOptions, read_dataset
from glmchat.tuning.formats import recognise
from glmchat.tuning.prompt_side import PromptSide
from glmchat.tuning.raw import Fault, Raw
from glmchat.tuning.reading import read_rows
from glmchat.tuning.rows import RowFault, read_row

Sides = Callable[[str], PromptSide]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | TEXT
    | st.sampled_from(['"', "[", "]}", "\\", "},{", ","]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
ROWS = st.lists(st.dictionaries(TEXT, VALUES, max_size=4), max_size=8)


def read(path: Path) -> list[Raw | Fault]:
    return list(read_rows(path, lambda kind, line: None))


@given(ROWS, st.sampled_from([None, 0, 2]), st.booleans(), st.sampled_from(["\n", "\r\n"]), st.integers(1, 64))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
def test_an_array_has_the_rows_that_json_reads_at_the_lines_where_they_begin(
    tmp_path: Path, rows: list[dict[str, Any]], indent: int | None, plain: bool, end: str, block: int
) -> None:
    text = json.dumps(rows, ensure_ascii=plain, indent=indent).replace("\n", end)
    path = tmp_path / "a.json"
    path.write_bytes(text.encode())
    whole, reading._BLOCK = reading._BLOCK, block + 1
    try:
        found = read(path)
    finally:
        reading._BLOCK = whole
    assert [row.value for row in found if isinstance(row, Raw)] == rows == json.loads(path.read_bytes())
    lines = path.read_bytes().decode().split("\n")
    for row in found:
        assert isinstance(row, Raw)
        assert lines[row.place.line - 1][row.column - 1] == "{"


@given(ROWS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_lines_have_the_rows_that_json_reads(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    found = read(path)
    assert [(row.value, row.place.line) for row in found if isinstance(row, Raw)] == [
        (row, 2 * number + 1) for number, row in enumerate(rows)
    ]


@given(st.lists(st.tuples(TEXT, TEXT), max_size=6))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_table_has_the_cells_that_csv_reads(tmp_path: Path, rows: list[tuple[str, str]]) -> None:
    written = io.StringIO(newline="")
    csv.writer(written).writerows([("question", "answer"), *rows])
    path = tmp_path / "a.csv"
    path.write_bytes(written.getvalue().encode())
    right = list(csv.DictReader(io.StringIO(written.getvalue(), newline="")))
    assert [row.value for row in read(path) if isinstance(row, Raw)] == right


def test_a_cut_or_changed_file_is_read_to_its_end_with_every_fault_inside_it(tmp_path: Path) -> None:
    noise = random.Random(1)
    rows = [{"question": f"问 {n}", "answer": '答 [x] {y} "z"'} for n in range(8)]
    for indent in (None, 1):
        good = json.dumps(rows, ensure_ascii=False, indent=indent).encode()
        path = tmp_path / "a.json"
        for _ in range(300):
            at = noise.randrange(1, len(good))
            path.write_bytes(noise.choice([good[:at], good[:at] + b'"' + good[at:], good[:at] + good[at + 1 :],
                                           good[:at] + bytes([noise.randrange(256)]) + good[at:]]))  # fmt: skip
            lines = path.read_bytes().count(b"\n") + 1
            for row in read(path):
                assert 1 <= row.place.line <= lines and (row.column is None or row.column >= 1)


def test_a_broken_row_costs_no_other_row_where_rows_stand_on_lines_of_their_own(tmp_path: Path) -> None:
    rows = [json.dumps({"question": str(n), "answer": "a [b] {c}"}, indent=1).replace("\n", "\n ") for n in range(9)]
    for broken in ('"open', "[1", "{", "}", '"a" "b"', "tru", "1,,2"):
        text = [row if n != 4 else row.replace('"a [b] {c}"', broken) for n, row in enumerate(rows)]
        path = tmp_path / "a.json"
        path.write_text("[\n " + ",\n ".join(text) + "\n]")
        found = [row.value["question"] for row in read(path) if isinstance(row, Raw)]
        assert found == [str(n) for n in range(9) if n != 4], broken


GOOD = {"question": "问", "answer": "答"}


def planted(filler: int) -> tuple[bytes, dict[int, str]]:
    """A file of rows on lines with faults among them: its bytes, and line -> what is to be said of it."""
    good = json.dumps({"question": "问" * 20, "answer": "答" * 20}, ensure_ascii=False).encode()
    faults: list[tuple[bytes, str]] = [
        (b'{"question": "\xff\xfe", "answer": "b"}', "utf8"),
        (b'{"question": 7, "answer": "b"}', "type"),
        (b'{"question": "a"}', "missing"),
        (b'{"question": "a", "answer": ""}', "empty"),
        (b'{"question": "' + b"a b " * 9000 + b'", "answer": "b"}', "cut"),
        (good + b"]", "json"),
        (good + b"\r", "crlf"),
        (b'{"question": "a", "answer": [["b"]]}', "type"),
        (b'{"question": "a", "answer": "b",}', "json"),
        (b'{"question": "<|im_start|>", "answer": "b"}', "control"),
        (b'{"question": "a", "answer": "{{name}}"}', "placeholder"),
    ]
    lines, told = [b"\xef\xbb\xbf" + good], {1: "bom"}
    for number, (line, kind) in enumerate(faults):
        lines += [json.dumps({**GOOD, "id": [number, n]}).encode() for n in range(filler)]
        lines.append(line)
        told[len(lines)] = kind
    return b"\n".join(lines), told


def test_twelve_planted_faults_are_named_by_line_and_the_counts_add_up(sides: Sides, tmp_path: Path) -> None:
    data, told = planted(20)
    path = tmp_path / "a.jsonl"
    path.write_bytes(data)
    dataset = read_dataset([str(path)], DataOptions(over_length="cut-answer"), sides("smollm2"))
    facts = dataset.facts
    said = {kind: what.first for kind, what in (*facts.refused.items(), *facts.warned.items())}
    for line, kind in told.items():
        assert any(f"{path}:{line}" in words for words in said[kind]), (line, kind)
    refusing = [kind for kind in told.values() if kind in facts.refused]
    assert facts.read == data.count(b"\n") + 1 == facts.used + facts.refusals
    assert facts.refusals == len(refusing) == 8
    dataset.close()


@pytest.mark.parametrize(
    ("row", "where", "found"),
    [
        ('{"question": "a", "answer": 12}', (1, 29), "a number: 12"),
        ('{"question": "a",\t"answer": null}', (1, 29), "null"),
        ('{"messages": [{"role": "user", "content": "é"}, {"role": "assistant", "content": {"x": 1, "y": [2]}}]}',
         None, None),
        ('{"messages": [{"role": "user", "content": "é"}, {"role": "assistant", "content": false}]}', (1, 82), "false"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "boss", "content": "b"}]}', (1, 58), "boss"),
        ('{"instruction": "a", "output": "b", "history": [["c"]]}', (1, 49), "a list"),
        ('{"conversations": [{"from": "human", "value": "a"}]}', (1, 19), "no answer"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "loss": false}]}',
         (1, 14), "no answer that is to be learned"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]}',
         (1, 14), "no answer that is to be learned"),
    ],
)  # fmt: skip
def test_a_fault_says_where_its_value_stands_and_what_was_wanted(
    sides: Sides, tmp_path: Path, row: str, where: tuple[int, int] | None, found: str | None
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{row}\n{{"question": "a", "answer": "b"}}\n')
    side = sides("chatglm3")
    faults = []
    raw = next(row for row in read(path) if isinstance(row, Raw))
    try:
        read_row(raw, recognise([raw], "a"), side.prompt)
    except RowFault as refused:
        faults.append(refused.of(raw))
    if where is None:
        assert not faults
        return
    (fault,) = faults
    assert (fault.place.line, fault.column) == where
    assert found is not None and found in fault.found and fault.wanted


def test_a_large_file_is_read_in_little_memory(tmp_path: Path, starter_model: Path) -> None:
    """A fifth of the size that benchmarks/data_memory.py reads, and less than a fifth of what it may take."""
    data, _ = planted(3)
    path = tmp_path / "a.jsonl"
    row = json.dumps({"question": "word " * 400, "answer": "word " * 400}).encode()
    path.write_bytes(data + b"\n" + b"\n".join([row] * 5000))
    program = (
        "import resource, sys; from pathlib import Path\n"
        "from glmchat.tuning.raw import Raw\n"
        "from glmchat.tuning.reading import read_rows\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "count = sum(isinstance(row, Raw) for row in read_rows(Path(sys.argv[1]), lambda kind, line: None))\n"
        "print(count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program, str(path)], capture_output=True, text=True, check=True)
    count, grown = map(int, done.stdout.split())
    assert count > 5000 and path.stat().st_size > 2e7
    assert grown < 20_000  # kB


@given(st.dictionaries(TEXT, VALUES, min_size=1, max_size=4), st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
def test_a_name_that_an_object_has_twice_is_refused_by_its_line_and_no_value_hides_another(
    tmp_path: Path, row: dict[str, Any], data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(sorted(row)))
    twice = json.dumps(row)[:-1] + f", {json.dumps(name)}: 1}}"
    whole, deep = json.dumps(row), json.dumps({"talk": "here"})[:-1] + f', "turns": [{twice}]}}'
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([whole, twice, deep, whole]) + "\n")
    first, second, third, fourth = read(path)
    assert isinstance(first, Raw) and isinstance(fourth, Raw)
    for line, fault in ((2, second), (3, third)):
        assert isinstance(fault, Fault)
        assert (fault.place.line, fault.reason) == (line, "json")
        assert fault.found.endswith("twice in one object")
