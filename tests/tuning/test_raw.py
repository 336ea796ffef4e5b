"""What is no text is told by its name, with a command that makes rows of it, not as a row of wrong bytes."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import zipfile
from pathlib import Path

import pytest

from glmchat.core.errors import Damaged
from glmchat.tuning.reading import read_rows


def _refusal(path: Path) -> Damaged:
    with pytest.raises(Damaged) as error:
        list(read_rows(path, lambda kind, line: None))
    return error.value


def test_what_gzip_packed_is_rows_once_the_hint_was_followed(tmp_path: Path) -> None:
    for name in ("我的 数据.jsonl.gz", "rows\n.json"):
        packed = tmp_path / name
        packed.write_bytes(gzip.compress(b'{"question": "a", "answer": "b"}\n'))
        problem = _refusal(packed)
        assert problem.message.endswith("holds no rows: it is gzip") and problem.code == "data.foreign"
        subprocess.run(["bash", "-c", problem.hint], check=True)
    for made in ("我的 数据.jsonl", "rows\n.json.jsonl"):
        assert json.loads((tmp_path / made).read_text(encoding="utf-8"))["answer"] == "b"


def test_sheets_and_documents_are_told_by_their_kind(tmp_path: Path) -> None:
    sheet, archive = tmp_path / "a.xlsx", tmp_path / "a.zip"
    with zipfile.ZipFile(sheet, "w") as file:
        file.writestr("[Content_Types].xml", "<x/>")
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("rows.jsonl", "{}")
    assert "Excel" in _refusal(sheet).message and "CSV" in _refusal(sheet).hint
    assert _refusal(archive).hint == f"unzip {archive}"
    for head, kind in ((b"%PDF-1.7", "PDF"), (b"PAR1", "Parquet"), (b"SQLite format 3\0", "SQLite")):
        other = tmp_path / "other.json"
        other.write_bytes(head + os.urandom(100))
        assert _refusal(other).message.endswith(f"it is {kind}")


def test_a_pipe_is_not_called_missing_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows.jsonl")
    assert "it is a named pipe" in _refusal(tmp_path / "rows.jsonl").message
