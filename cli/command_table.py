"""Commands that are imported when they are used: `glmchat --help` needs only their names and first lines.

Building all of them costs more than the interpreter's own start. A test holds the table to the commands themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

# command -> (the file in cli/ that registers it, the first line of its help; "" for a hidden second name)
COMMANDS: dict[str, tuple[str, str]] = {
    "run": (
        "run",
        "Chat with a model. With a prompt, or with something on stdin: one answer on stdout, nothing else there.",
    ),
    "chat": ("run", ""),
    "attach": (
        "attach",
        "Open the conversation that another terminal left behind (see `glmchat run --finish-on-hangup`).",
    ),
    "pull": ("pull", "Download a model: resumable, verified, into the cache that all Hugging Face tools share."),
    "download": ("pull", ""),
    "get": ("pull", ""),
    "list": ("models", "List the models on this machine."),
    "ls": ("models", ""),
    "show": (
        "models",
        "Show a model: where it is, its files and where they came from, the memory it needs, its licence.",
    ),
    "rm": ("models", "Remove models. Other revisions, and everything they share, stay."),
    "prune": (
        "models",
        "Remove what nothing refers to: partial downloads, blobs without a link, manifests without a model.",
    ),
    "verify": (
        "models",
        "Hash every file of a model or an adapter and compare with what it should be. Needs no network.",
    ),
    "add": ("models", "Give a model folder a name, without copying it."),
    "alias": ("models", "Give a model a name of your own; without arguments list the names."),
    "lock": ("models", "Print a lock file: exact commits and hashes, for `glmchat pull --locked FILE` elsewhere."),
    "quantize": ("quantize", "Make a 4-bit or 8-bit copy of a model that needs a quarter or half of the memory."),
    "quantise": ("quantize", ""),
    "adapters": ("adapters", "LoRA and other adapters: add, list, show, rm, verify, merge."),
    "history": ("history", "Conversations: list, show, search, export, import, delete."),
    "replay": ("replay", "Repeat a stored answer with its weights, seed and passes, and compare the token ids."),
    "compare": ("compare", "Ask several models, quantisations, adapters or settings the same question, side by side."),
    "serve": ("serve", "Serve a model behind the OpenAI API (/v1/chat/completions and the rest) until Ctrl-C."),
    "mirror": (
        "mirror",
        "Keep models in a folder that other machines pull from: `glmchat mirror NAME DIR`, then `serve DIR`.",
    ),
    "bench": (
        "bench",
        "Measure load time, prefill and decode speed, peak memory, and how much of the memory bus decoding uses.",
    ),
    "doctor": (
        "doctor",
        "Report versions, devices, kernels, threads, memory, paths, database, proxies and the terminal.",
    ),
    "env": ("doctor", ""),
}


class _Commands(MutableMapping[str, Any]):
    """name -> command, imported when it is asked for."""

    def __init__(self) -> None:
        self._built: dict[str, Any] = {}

    def __contains__(self, name: object) -> bool:
        return name in COMMANDS

    def __getitem__(self, name: str) -> Any:
        if name not in self._built:
            file, _ = COMMANDS[name]
            app = typer.Typer(context_settings={"help_option_names": ["-h", "--help"]}, rich_markup_mode="rich")
            import_module(f"glmchat.cli.{file}").register(app)
            self._built.update(typer.main.get_group(app).commands)
        return self._built[name]

    def __setitem__(self, name: str, command: Any) -> None:
        self._built[name] = command

    def __delitem__(self, name: str) -> None:
        del self._built[name]

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


class CommandTable(TyperGroup):
    """The top of the command line: lists its commands from the table, imports the one that runs."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.commands = _Commands()
        self._listing = False

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if self._listing:
            _, summary = COMMANDS[cmd_name]
            return TyperCommand(cmd_name, help=summary, hidden=not summary)
        return self.commands.get(cmd_name)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self._listing = True
        try:
            super().format_help(ctx, formatter)
        finally:
            self._listing = False
