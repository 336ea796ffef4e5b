"""What the user has set: `config.toml`, then `GLMCHAT_*` above it. Flags and `/set` stand above both, and are not here.

Every key of the file can be given as an environment variable: `default_model` is `GLMCHAT_DEFAULT_MODEL` (and
`GLMCHAT_MODEL`, the short form), `sampling.top_p` is `GLMCHAT_TOP_P`.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from glmchat.core import locations
from glmchat.core.engine_options import CACHE_TYPES
from glmchat.core.errors import Usage
from glmchat.core.files import read_text
from glmchat.core.language import tr
from glmchat.core.messages import Sampling, minus_one, parse_sampling_value, sampling_name
from glmchat.core.servers import Server, parse_servers
from glmchat.core.text import one_line

THEMES = (
    *("dark", "light", "contrast", "ansi"),
    *("nord", "gruvbox", "dracula", "tokyo-night", "solarized-light", "catppuccin-latte"),
)


@dataclass(frozen=True, slots=True)
class Settings:
    default_model: str | None = None
    theme: str | None = None  # one of THEMES
    enter_sends: bool = True  # False: Enter is a newline and Ctrl+Enter, Alt+Enter or F5 sends
    language: str | None = None
    threads: int | None = None
    context: int | None = None
    cache_type: str | None = None  # of keys and values on a CPU: one of CACHE_TYPES, or "auto"
    keep_alive: float = 300.0  # seconds that an engine stays after its last user left; 0: it ends with its window
    kv_cache: int = 2_000_000_000  # bytes of conversations' caches that may lie on the disk; 0: none
    context_policy: str = "drop"  # "drop" | "refuse"
    endpoints: tuple[str, ...] = ()  # mirrors, in order
    downloads: int = 4  # files at a time
    history: bool = True
    hints: bool = True  # the line of keys below the prompt
    titles: str = "local"  # who writes titles in idle time: "local" engines, "always" (servers too), "never"
    system: str | None = None
    keys: Mapping[str, str] = field(default_factory=dict)  # action -> key
    sampling: Mapping[str, Any] = field(default_factory=dict)
    servers: Mapping[str, Server] = field(default_factory=dict)  # by the names that --server takes


_SCALARS: dict[str, type] = {
    "default_model": str, "theme": str, "enter_sends": bool, "language": str, "threads": int, "context": int,
    "context_policy": str, "downloads": int, "history": bool, "hints": bool, "system": str,
    "titles": str, "cache_type": str,
}  # fmt: skip
_CHOICES = {
    "theme": THEMES,
    "context_policy": ("drop", "refuse"),
    "language": ("en", "zh"),
    "titles": ("local", "always", "never"),
    "cache_type": ("auto", *CACHE_TYPES),
}


def load_settings(path: Path | None = None, environ: Mapping[str, str] | None = None) -> Settings:
    """Read the file (a missing one is fine) and the environment. Raises Usage with the key or the broken line."""
    path = path or locations.config_file()
    environ = os.environ if environ is None else environ
    try:
        data = tomllib.loads(read_text(path))
    except FileNotFoundError:
        data = {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise Usage(
            f"{path}: {one_line(str(reason))}", hint=tr("fix the file or move it out of the way"), code="config.broken"
        ) from None
    values: dict[str, Any] = {}
    for key, value in data.items():
        values[key] = _checked(key, value, str(path))
    sampling = dict(values.get("sampling", {}))
    for key, kind in _SCALARS.items():
        for name in (
            f"GLMCHAT_{key.upper()}",
            *({"default_model": ("GLMCHAT_MODEL",), "language": ("GLMCHAT_LANG",)}.get(key, ())),
        ):
            if text := environ.get(name):
                values[key] = _checked(key, _from_text(kind, text, name), name)
    if text := environ.get("GLMCHAT_KEEP_ALIVE"):
        values["keep_alive"] = _checked("keep_alive", text, "GLMCHAT_KEEP_ALIVE")
    if text := environ.get("GLMCHAT_KV_CACHE"):
        values["kv_cache"] = _checked("kv_cache", text, "GLMCHAT_KV_CACHE")
    if text := environ.get("GLMCHAT_ENDPOINTS"):
        values["endpoints"] = tuple(part for part in text.split(",") if part)
    for item in fields(Sampling):
        for word in (item.name, *(["temp"] if item.name == "temperature" else [])):
            if text := environ.get(f"GLMCHAT_{word.upper()}"):
                sampling[item.name] = parse_sampling_value(item.name, text)
    check_sampling(sampling, str(path))  # here, so that the line at fault is the user's own
    return Settings(**{**values, "sampling": sampling})


_KINDS: Mapping[str, type | tuple[type, ...]] = {
    "float": (int, float), "int": int, "int | None": int, "bool": bool, "tuple[str, ...]": tuple,
    "Mapping[str, Any]": Mapping,
}  # fmt: skip


def check_sampling(values: Mapping[str, Any], where: str) -> None:
    """Raise Usage for a field of Sampling that is of another type or out of its range; unknown names are left alone."""
    known = {item.name: str(item.type) for item in fields(Sampling) if item.name in values}
    for name, kind in known.items():
        value = values[name]
        is_right = isinstance(value, _KINDS[kind]) and (kind == "bool" or not isinstance(value, bool))
        if isinstance(value, tuple):
            is_right = is_right and all(isinstance(one, str) for one in value)
        if not is_right and not (value is None and kind.endswith("None")):
            raise Usage(
                tr("{where}: {key} cannot be {value}", where=where, key=name, value=one_line(repr(value), 60)),
                hint=tr("expected {kind}", kind=kind),
                code="config.value",
            )
    Sampling(**{name: values[name] for name in known})


def parse_seconds(value: object, where: str) -> float:
    """Seconds of 300, "300", "90s", "5m" or "1h". Raises Usage that names `where`."""
    text = str(value).strip().lower()
    found = re.fullmatch(r"(\d{1,9}(?:\.\d+)?)\s*([smh]?)", text)
    if found is None or isinstance(value, bool):
        raise Usage(
            tr("{where}: {text} is not a time", where=where, text=one_line(repr(value), 60)),
            hint=tr('"5m", "90s", "1h", or 0 for an engine that ends with its window'),
            code="config.value",
        )
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]


def parse_bytes(value: object, where: str) -> int:
    """Bytes of 500_000_000, "500MB", "2 GB" or "1.5GiB". Raises Usage that names `where`."""
    found = re.fullmatch(r"(\d{1,15}(?:\.\d+)?)\s*(?:([kmgt]?)(i?)b?)", str(value).strip().lower())
    if found is None or isinstance(value, bool):
        raise Usage(
            tr("{where}: {text} is not a size", where=where, text=one_line(repr(value), 60)),
            hint=tr('"2GB", "500MB", or 0 for none'),
            code="config.value",
        )
    unit = 1024 if found[3] else 1000
    return int(float(found[1]) * unit ** " kmgt".index(found[2] or " "))


def _from_text(kind: type, text: str, where: str) -> Any:
    if kind is bool:
        flags = {
            "1": True,
            "true": True,
            "yes": True,
            "on": True,
            "0": False,
            "false": False,
            "no": False,
            "off": False,
        }
        if text.lower() in flags:
            return flags[text.lower()]
        raise Usage(
            tr("{where} is {text!r}", where=where, text=text), hint=tr("write true or false"), code="config.value"
        )
    try:
        return kind(text)
    except ValueError:
        raise Usage(
            tr("{where} is {text!r}, but a number is expected", where=where, text=text),
            hint=tr("for example {where}=2", where=where),
            code="config.value",
        ) from None


def _checked(key: str, value: Any, where: str) -> Any:
    if key in _SCALARS:
        kind = _SCALARS[key]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise Usage(
                tr("{where}: {key} must be a {name}", where=where, key=key, name=kind.__name__),
                hint=tr("it is {value!r}", value=value),
                code="config.value",
            )
        if key in _CHOICES and value not in _CHOICES[key]:
            raise Usage(
                tr("{where}: {key} cannot be {value!r}", where=where, key=key, value=value),
                hint=tr("one of {names}", names=", ".join(_CHOICES[key])),
                code="config.value",
            )
        return value
    if key == "keep_alive":
        return parse_seconds(value, where)
    if key == "kv_cache":
        return parse_bytes(value, f"{where}: kv_cache")
    if key == "endpoints" and isinstance(value, list) and all(isinstance(v, str) for v in value):
        return tuple(value)
    if key == "keys" and isinstance(value, dict) and all(isinstance(v, str) for v in value.values()):
        return value
    if key == "servers":
        return parse_servers(value, where)
    if key == "sampling" and isinstance(value, dict):
        named = {sampling_name(k): tuple(v) if isinstance(v, list) else v for k, v in value.items()}
        return {field: minus_one(field, v) for field, v in named.items()}
    raise Usage(
        tr("{where}: unknown setting {key!r}", where=where, key=key),
        hint=tr(
            "known names: {names}",
            names=", ".join([*_SCALARS, "keep_alive", "kv_cache", "endpoints", "keys", "sampling", "servers"]),
        ),
        code="config.unknown",
    )
