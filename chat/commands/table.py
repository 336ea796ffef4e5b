"""The one table of commands: slash commands of both faces, keys, the palette and the help are made from it.

`key` is the default; the config's `[keys]` maps a command's name to another one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from glmchat.chat.commands import actions
from glmchat.chat.commands.actions import Action
from glmchat.core.errors import Usage
from glmchat.core.language import tr
from glmchat.core.text import one_line

Kind = Literal["command", "text", "unknown"]


@dataclass(frozen=True, slots=True)
class Command:
    """run: None for what only the window can do; `instead` then says how the same is had without one.

    The sentences are English and translated when shown. lines: the summary in plain mode, where it does something else.
    """

    name: str
    summary: str
    argument: str = ""  # how its argument is shown; "" takes none
    aliases: tuple[str, ...] = ()
    key: str = ""
    group: str = "Conversation"
    unlisted: tuple[str, ...] = ()  # aliases that the help leaves out
    run: Action | None = None
    lines: str = ""
    instead: str = "`glmchat run -c` without --plain opens it"


COMMANDS: tuple[Command, ...] = (
    Command("help", "Keys and commands", aliases=("?",), key="f1", group="Window", run=actions.show_help),
    Command("new", "Start a new conversation", key="ctrl+n", run=actions.new),
    Command("clear", "Start an empty context in this conversation; nothing is deleted", key="ctrl+l",
            run=actions.clear),
    Command("stop", "Stop the answer and keep what was written", instead="Ctrl+C stops an answer"),
    Command("regen", "Answer the last question again, or N times to choose from", "[N] [NAME=VALUE …]", ("retry",),
            "ctrl+t", run=actions.regen, unlisted=("regenerate",), lines="Answer the last question again"),
    Command("continue", "Resume a stopped or cut-off answer from its last token", run=actions.continue_answer),
    Command("undo", "Undo the last question and its answer", run=actions.undo),
    Command("redo", "Restore what /undo removed", run=actions.redo),
    Command("edit", "Edit the last question and ask again; the old branch is kept", run=actions.edit,
            lines="/edit TEXT: ask the last question in other words"),
    Command("copy", "Copy the last answer, or only its code", "[code|all]",
            instead="select the text with the terminal, or use /export"),
    Command("quote", "Quote the last answer into the prompt"),
    Command("set", "Show or change a sampling setting for the next answer", "[NAME VALUE]", key="f2", group="Model",
            run=actions.set_sampling),
    Command("reset", "Undo the changes made with /set", "[NAME]", group="Model", run=actions.reset),
    Command("preset", "Use a preset: precise, balanced, creative or model", "NAME", group="Model",
            instead="/set temperature 0.2"),
    Command("system", "Show or change the system prompt", "[TEXT|none]", group="Model", run=actions.system),
    Command("model", "Show the models on this machine, or switch to one", "[NAME]", key="f4", group="Model",
            instead="`glmchat run NAME -c` continues with another model"),
    Command("adapter", "Use adapters, change their weights, or use none", "[NAME[:WEIGHT]…|weight W|off]", key="f7",
            group="Model", run=actions.adapter),
    Command(
        "compare", "Ask several models, adapters or settings the same question, side by side",
        "[NAME[:int4][+ADAPTER][,SETTING=VALUE] …]", key="f6", group="Model",
    ),
    Command("tune", "Show the runs of tuning, or begin one with a file of rows", "[RUN|FILE [--FLAG …]]", group="Model",
            instead="`glmchat tune --list` lists them, `glmchat tune --attach RUN` follows one"),
    Command("eval", "Show evaluations, or have this model and its adapters answer a file of rows",
            "[NAME|[CANDIDATE …] FILE]", group="Model",
            instead="`glmchat eval --list` lists them, `glmchat eval MODEL FILE` begins one"),
    Command("restart", "Start the engine again", key="f5", group="Model",
            instead="the next question starts the engine again"),
    Command("info", "Show what the next answer is made with: model, sampling, system prompt, adapters, context",
            key="f9", group="Model", run=actions.info),
    Command("context", "Show what fills the context, in tokens, or set the policy", "[drop|refuse]", group="Model",
            run=actions.context),
    Command("policy", "Change what happens when the context is full", "[drop|refuse]", key="f8", group="Model",
            run=actions.policy),
    Command("stats", "Show tokens, speed and memory of the last answer", group="Model", run=actions.stats),
    Command("complete", "Let the model continue a text, without a conversation", "TEXT", group="Model",
            run=actions.complete),
    Command("file", "Put a file into the prompt", "PATH", run=actions.file, lines="Send the text of a file"),
    Command("save", "Name this conversation", "TITLE", ("rename",), run=actions.save),
    Command("load", "Open an earlier conversation", "[NUMBER|WORDS]", ("resume",), run=actions.load),
    Command("history", "Show or hide the conversations", aliases=("conversations",), key="ctrl+b", group="Window",
            run=actions.history, lines="Show the conversation so far"),
    Command("find", "Search every conversation", "[WORDS]", ("search",), "ctrl+f",
            instead="glmchat history search WORDS"),
    Command("delete", "Delete this conversation (Ctrl+Z in the list restores it)",
            instead="glmchat history rm NUMBER"),
    Command("export", "Write this conversation to a file", "[md|json|txt] [PATH]", run=actions.export),
    Command("theme", "Choose a theme; the choice is remembered", "[NAME]", group="Window"),
    Command("editor", "Write the prompt in $EDITOR", key="ctrl+g", group="Window"),
    Command("quit", "Quit", aliases=("bye", "exit"), key="ctrl+q", group="Window", run=actions.leave),
)  # fmt: skip
BY_NAME = {name: command for command in COMMANDS for name in (command.name, *command.aliases, *command.unlisted)}
GROUPS = ("Conversation", "Model", "Window")
_BARE = ("clear", "stop", "exit", "quit", "help")  # words that other programs take as commands


def parse(line: str) -> tuple[Kind, str, str]:
    """What a person entered: ("command", name, argument), ("text", text, "") or ("unknown", word, nearest).

    `//x` is the text `/x`. Only the first line can be a command, and a path or a regular expression ("/etc/hosts",
    "/[a-z]+/") is an unknown command, never silently text: it must not reach the model by a slip of the finger.
    """
    stripped = line.strip()
    if stripped.startswith("//"):
        return "text", stripped[1:], ""
    if not stripped.startswith("/"):
        return "text", line, ""
    word, _, argument = stripped[1:].partition(" ")
    first, newline, rest = word.partition("\n")
    if newline:
        word, argument = first, f"{rest} {argument}".strip()
    command = BY_NAME.get(word.lower())
    if command is None:
        return "unknown", word, nearest(word)
    return "command", command.name, argument.strip()


def unknown(word: str, near: str) -> Usage:
    """For a line that is no command; near: what it may have meant, or ""."""
    return Usage(
        tr("there is no command /{word}", word=one_line(word, 40)),
        hint=(tr("did you mean /{name}? ", name=near) if near else "")
        + tr("/help lists them; start with // to send a slash"),
        code="chat.command",
    )


def bare_word_note(text: str) -> str:
    """What is said beside a question that is a command in other programs; "" for all others."""
    word = text.strip().lower()
    return tr("“{word}” was sent as text; the command is /{word}", word=word) if word in _BARE else ""


def nearest(word: str) -> str:
    """The command a person may have meant; "" if none is near."""
    from difflib import get_close_matches

    matches = get_close_matches(word.lower(), list(BY_NAME), n=1, cutoff=0.6)
    return matches[0] if matches else ""


def completions(text: str) -> list[Command]:
    """The commands that `text` ("/re") may become, best first; empty when it is no beginning of a command."""
    if not text.startswith("/") or text.startswith("//") or "\n" in text or " " in text:
        return []
    word = text[1:].lower()
    begins = [c for c in COMMANDS if c.name.startswith(word)]
    aliased = [c for c in COMMANDS if c not in begins and any(a.startswith(word) for a in c.aliases)]
    inside = [c for c in COMMANDS if len(word) > 1 and c not in begins and c not in aliased and word in c.name]
    return begins + aliased + inside


def usage(command: Command) -> str:
    return f"/{command.name} {argument(command)}".rstrip()


def argument(command: Command) -> str:
    """How its argument is shown; "" if it takes none."""
    return tr(command.argument) if command.argument else ""


def key_name(key: str) -> str:
    """ "ctrl+n" -> "Ctrl+N", as keys are printed on keyboards."""
    names = {"escape": "Esc", "pageup": "PgUp", "pagedown": "PgDn", "enter": "Enter", "slash": "/"}
    parts = key.split("+")
    return "+".join(
        names.get(p, p.upper() if len(p) == 1 or (p[0] == "f" and p[1:].isdigit()) else p.capitalize()) for p in parts
    )


def summary(command: Command) -> str:
    return tr(command.summary)
