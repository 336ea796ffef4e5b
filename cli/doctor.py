"""What `glmchat doctor` finds out, as one JSON object. What needs torch is asked of a child process."""

from __future__ import annotations

import os
import platform
import stat
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from glmchat import __version__
from glmchat.chat.engine_process import gpu_memory, total_memory
from glmchat.chat.history.database import filesystem, is_network
from glmchat.chat.jobs import run_job
from glmchat.cli import output
from glmchat.core import kv_files, locations, machine
from glmchat.core.errors import GlmchatError
from glmchat.core.http import ProxyRules, trusted_certificates, without_password
from glmchat.core.language import language, tr
from glmchat.core.sockets import socket_dir
from glmchat.core.text import human_bytes, one_line
from glmchat.hub.modelscope_cache import modelscope_cache

PROBE_SECONDS = 120.0
_MOST_CLOSED = 5  # folders that are named
_PACKAGES = (
    "torch", "transformers", "huggingface_hub", "textual", "typer", "rich", "httpx2", "starlette", "uvicorn", "gguf",
    "safetensors", "sentencepiece", "tokenizers", "peft", "numpy", "cpm_kernels",
)  # fmt: skip


def diagnose(on_wait: Callable[[], None] = lambda: None, environ: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Sections of facts, and `problems`: a list of {"message", "hint"}. on_wait: called before the slow part."""
    environ = os.environ if environ is None else environ
    problems: list[dict[str, str]] = []

    def trouble(message: str, hint: str) -> None:
        problems.append({"message": message, "hint": hint})

    found: dict[str, Any] = {"versions": _versions(), "machine": _machine()}
    on_wait()
    found["engine"] = _engine(trouble)
    found["paths"] = _paths(trouble)
    found["history"] = _history(trouble)
    found["conversation caches"] = _kv_caches(trouble)
    found["evaluations and runs"] = _work()
    found["proxies"] = _proxies(environ, trouble)
    found["servers"] = _servers(trouble)
    found["terminal"] = terminal(environ)
    found["problems"] = problems
    return found


Trouble = Callable[[str, str], None]


def _versions() -> dict[str, Any]:
    packages: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            packages[name] = None
    return {
        "glmchat": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        **packages,
    }


def _machine() -> dict[str, Any]:
    card = gpu_memory()
    return {
        "physical_cores": machine.physical_cores(),
        "cpus": os.cpu_count(),
        "cpu_quota": machine.cpu_quota(),
        "memory_bytes": total_memory(),
        "available_bytes": machine.available_memory(),
        "memory_limit_bytes": machine.memory_limit(),
        "gpu_memory_bytes": card[1] if card else None,
        "memory_kills_counted": machine.oom_kills() is not None,
    }


def _engine(trouble: Trouble) -> dict[str, Any]:
    """Devices and kernels, as the engine itself sees them."""
    deadline = time.monotonic() + PROBE_SECONDS
    try:
        *_, result = run_job("probe", {}, cancelled=lambda: time.monotonic() > deadline)
    except (GlmchatError, OSError) as error:
        reason = error.message if isinstance(error, GlmchatError) else str(error)
        trouble(tr("the engine cannot start: {reason}", reason=one_line(reason)), tr("reinstall glmchat and torch"))
        return {}
    for obstacle in result.pop("obstacles"):
        trouble(one_line(obstacle["message"], 300), one_line(obstacle["hint"], 300))
    return {name: value for name, value in result.items() if name != "event"}


def _paths(trouble: Trouble) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, path in (
        ("config", locations.config_dir()),
        ("data", locations.data_dir()),
        ("state", locations.state_dir()),
        ("cache", locations.cache_dir()),
        ("hub cache", locations.hf_cache()),
        ("logs", locations.logs_dir()),
    ):
        found[name] = _path(path)
        private, is_there = name not in ("hub cache", "config"), os.path.isdir(path)  # noqa: PTH112 (may be another's)
        if private and is_there and path.stat().st_mode & 0o077:
            trouble(tr("{path} can be read by others", path=one_line(str(path))), f"chmod 700 {one_line(str(path))}")
        if is_there and name == "hub cache" and not os.access(path, os.W_OK):
            trouble(
                tr("{path} cannot be written: its models are used, but none can be added", path=one_line(str(path))),
                tr("to pull models set HF_HOME to a folder that you can write to"),
            )
        elif is_there and not os.access(path, os.W_OK):
            trouble(
                tr("{path} cannot be written", path=one_line(str(path))),
                tr("set GLMCHAT_HOME to a folder that you can write to"),
            )
    for root, variable in ((locations.hf_cache(), "HF_HOME"), (modelscope_cache(), "MODELSCOPE_CACHE")):
        for folder in islice(_closed(root), _MOST_CLOSED) if root is not None else ():
            trouble(
                tr("{path} cannot be read: what lies there is not used", path=one_line(str(folder))),
                tr("ask its owner for the right to read it, or set {variable} to another folder", variable=variable),
            )
    try:
        found["sockets"] = _path(socket_dir())
    except GlmchatError as error:
        found["sockets"] = {"path": "-"}
        trouble(error.message, error.hint)
    return found


def _closed(folder: Path, depth: int = 3) -> Iterator[Path]:
    """The folders of a cache in which this user may not look: ROOT/hub/models/OWNER, ROOT/models--OWNER--NAME/blobs."""
    try:
        inside = sorted(entry.path for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False))
    except PermissionError:
        yield folder
    except OSError:
        return
    else:
        if not os.access(folder, os.X_OK):  # one may be listed and yet not be entered
            yield folder
            return
        for path in inside if depth else ():
            yield from _closed(Path(path), depth - 1)


def _path(path: Path) -> dict[str, Any]:
    try:
        mode = oct(stat.S_IMODE(path.stat().st_mode))[2:]
    except OSError:
        mode = None
    return {"path": one_line(str(path), 400), "mode": mode, "file_system": filesystem(path)}


def _history(trouble: Trouble) -> dict[str, Any]:
    import sqlite3

    path = locations.history_file()
    found: dict[str, Any] = {
        "path": one_line(str(path), 400),
        "sqlite": sqlite3.sqlite_version,
        "network_file_system": is_network(path.parent),
        "journal": "delete" if is_network(path.parent) else "wal",
        "size_bytes": None,
        "mode": None,
    }
    if not path.exists():
        return found
    found["size_bytes"] = path.stat().st_size
    found["mode"] = oct(stat.S_IMODE(path.stat().st_mode))[2:]
    try:
        connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=2)
        try:
            found["journal"] = str(connection.execute("PRAGMA journal_mode").fetchone()[0])
            whole = str(connection.execute("PRAGMA quick_check(1)").fetchone()[0])
        finally:
            connection.close()
    except sqlite3.Error as error:
        whole = str(error)
    if whole != "ok":
        trouble(
            tr("the history is damaged: {reason}", reason=one_line(whole)),
            tr("the next start moves it aside and begins a new one"),
        )
    if path.stat().st_mode & 0o077:
        trouble(tr("{path} can be read by others", path=one_line(str(path))), f"chmod 600 {one_line(str(path))}")
    return found


def _kv_caches(trouble: Trouble) -> dict[str, Any]:
    """Those on the disk, and how many bytes the config lets them take."""
    from glmchat.core.settings import load_settings

    try:
        limit: int | None = load_settings().kv_cache
    except GlmchatError:  # said with the servers
        limit = None
    folder, files = locations.kv_dir(), kv_files.kv_files()
    if folder.exists() and folder.stat().st_uid != os.getuid():
        trouble(
            tr("{path} belongs to another user: no caches are kept there", path=one_line(str(folder))),
            tr("take it away, or set GLMCHAT_HOME to a folder of your own"),
        )
    return {
        **_path(folder),
        "files": len(files),
        "size_bytes": sum(file.size for file in files),
        "limit_bytes": limit,
    }


def _work() -> dict[str, Any]:
    """What `glmchat eval` and `glmchat tune` have left on the disk; `glmchat prune` takes away what is over."""
    from glmchat.core import eval_folder, run_folder

    runs, tables = run_folder.runs(), eval_folder.evaluations()
    return {
        "evaluations": len(tables),
        "evaluations_bytes": sum(one.size() for one in tables) + eval_folder.size_below(locations.evals_dir()),
        "runs": len(runs),
        "runs_bytes": sum(eval_folder.size_below(run.folder) for run in runs),
    }


def _proxies(environ: Mapping[str, str], trouble: Trouble) -> dict[str, Any]:
    """What a request to the hub would go through, and what the variables were taken to mean."""
    rules = ProxyRules.from_environment(environ)
    found: dict[str, Any] = {}
    try:
        trusted_certificates()
    except GlmchatError as error:
        trouble(error.message, error.hint)
    for scheme in ("https", "http"):
        try:
            chosen = rules.choose(scheme, "huggingface.co")
            found[f"{scheme}://huggingface.co"] = without_password(chosen) if chosen else tr("direct")
        except GlmchatError as error:
            found[f"{scheme}://huggingface.co"] = "-"
            trouble(error.message, error.hint)
    found["exempt"] = [one_line(entry) for entry in rules.exempt]
    found["HF_ENDPOINT"] = one_line(without_password(environ["HF_ENDPOINT"])) if environ.get("HF_ENDPOINT") else None
    return found


def _servers(trouble: Trouble) -> dict[str, Any]:
    """Those of the config, and whether each has a key; a config that cannot be read is a problem of its own."""
    from glmchat.core.settings import load_settings

    try:
        servers = load_settings().servers
    except GlmchatError as error:
        trouble(error.message, error.hint)
        return {}
    for server in servers.values():
        if (problem := server.key_problem()) is not None:
            trouble(f"servers.{server.name}: {problem.message}", problem.hint)
    return {
        name: {"url": one_line(server.url), "key_file": server.key_file is not None, "model": server.model}
        for name, server in servers.items()
    }


def terminal(environ: Mapping[str, str]) -> dict[str, Any]:
    """What the terminal says of itself. Nothing is written to it to find out."""
    colours = environ.get("COLORTERM", "").lower()
    term = environ.get("TERM", "")
    size = None
    for stream in (sys.stdout, sys.stderr, sys.stdin):
        try:
            size = os.get_terminal_size(stream.fileno())
            break
        except (OSError, ValueError, AttributeError):
            continue
    return {
        "stdin_is_terminal": bool(sys.stdin and sys.stdin.isatty()),
        "stdout_is_terminal": bool(sys.stdout and sys.stdout.isatty()),
        "size": f"{size.columns}x{size.lines}" if size else None,
        "TERM": one_line(term) or None,
        "colours": "none" if "NO_COLOR" in environ or term in ("", "dumb")
        else "truecolor" if colours in ("truecolor", "24bit")
        else "256" if "256" in term else "16",
        "tmux": "TMUX" in environ,
        "screen": "STY" in environ,
        "ssh": "SSH_CONNECTION" in environ or "SSH_TTY" in environ,
        "encoding": getattr(sys.stdout, "encoding", None),
        "interface_language": language(),
    }  # fmt: skip


def register(app: typer.Typer) -> None:
    app.command("doctor")(doctor)
    app.command("env", hidden=True)(doctor)


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="JSON on stdout.")] = False,
) -> None:
    """Report versions, devices, kernels, threads, memory, paths, database, proxies and the terminal."""

    report = diagnose(on_wait=lambda: output.say(tr("asking the engine about devices and kernels…")))
    if as_json:
        output.json_line(report)
        return
    for section, rows in report.items():
        if section == "problems":
            continue
        output.data(f"{tr(section)}")
        for name, value in rows.items():
            for line in _lines(name, value):
                output.data(f"  {line}")
    problems: list[dict[str, str]] = report["problems"]
    output.data(tr("problems") if problems else tr("no problems found"))
    for problem in problems:
        output.data(f"  {problem['message']}")
        output.data(f"    {tr('hint')}: {problem['hint']}")


def _lines(name: str, value: Any) -> list[str]:
    """One fact, in as many lines as it needs."""
    if name == "kernels" and isinstance(value, list):
        return [line for row in value for line in _kernel(row)]
    if name == "cards" and isinstance(value, list):
        return [_card(row) for row in value]
    if name == "not_chosen" and isinstance(value, dict):
        return [tr("{device} is not used: {reason}", device=one_line(d), reason=one_line(w)) for d, w in value.items()]
    return [f"{name}: {_shown(name, value)}"]


def _card(row: dict[str, Any]) -> str:
    return tr(
        "{device}: {name}, compute capability {capability}, {free} of {total} free",
        device=row["device"],
        name=one_line(row["name"]),
        capability=row["capability"],
        free=human_bytes(row["free_bytes"]),
        total=human_bytes(row["memory_bytes"]),
    )


def _kernel(row: dict[str, Any]) -> list[str]:
    """Which kernel multiplies at a width, and below it each better one that was passed over, with the reason."""
    first = tr("{bits} bits on {device}: {kernel}", bits=row["bits"], device=row["device"], kernel=row["kernel"])
    return [
        first,
        *(
            "  " + tr("not {kernel}: {reason}", kernel=one_line(kernel), reason=one_line(str(reason)))
            for kernel, reason in row["passed_over"].items()
        ),
    ]


def _shown(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return tr("yes") if value else tr("no")
    if isinstance(value, int) and name.endswith("bytes"):
        return human_bytes(value)
    if isinstance(value, list):
        return "; ".join(_shown(name, item) for item in value) or "-"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(key, item)}" for key, item in value.items())
    return str(value)
