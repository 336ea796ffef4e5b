"""The command line from its start to its end: commands, the language, and what is said of a wrong one.

Commands are imported when they are used: building all of them costs more than the interpreter's own start, and
`glmchat --help` needs only their names and first lines. A test holds the table to the commands themselves.
"""

from __future__ import annotations

import gc
import io
import re
import sys
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from functools import cache, partial
from importlib import import_module
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from glmchat.cli import output
from glmchat.cli.completion import named_shell
from glmchat.core import language
from glmchat.core.errors import GlmchatError, Interrupted, Usage, refusal
from glmchat.core.files import take_notes
from glmchat.core.language import tr
from glmchat.core.text import one_line

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
        "show",
        "Show a model: where it is, its files and where they came from, the memory it needs, its licence.",
    ),
    "rm": ("models", "Remove models. Other revisions, and everything they share, stay."),
    "prune": (
        "models",
        "Remove conversations' caches, and what nothing refers to: partial downloads, blobs without a link, manifests.",
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
    "tune": (
        "tune",
        "Teach a model from your own rows: the plan, then an adapter or a model. `glmchat tune BASE DATA --dry-run`.",
    ),
    "adapters": ("adapters", "LoRA and other adapters: add, list, show, rm, verify, merge."),
    "history": ("history", "Conversations: list, show, search, export, import, delete."),
    "replay": ("replay", "Repeat a stored answer with its weights, seed and passes, and compare the token ids."),
    "compare": ("compare", "Ask several models, quantisations, adapters or settings the same question, side by side."),
    "eval": (
        "eval",
        "Have models, quantisations, adapters or settings answer the rows of a file, and compare what they wrote.",
    ),
    "serve": ("serve", "Serve a model behind the OpenAI API (/v1/chat/completions and the rest) until Ctrl-C."),
    "ps": ("engines", "List the engines that run: their memory, their device, who uses them, and how long they stay."),
    "stop": ("engines", "End engines that stay for whoever comes next, and give their memory back."),
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
            built = typer.main.get_group(app).commands
            for command in built.values():
                _spare_coercion(command)
            self._built.update(built)
        return self._built[name]

    def __setitem__(self, name: str, command: Any) -> None:
        self._built[name] = command

    def __delitem__(self, name: str) -> None:
        del self._built[name]

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


def _spare_coercion(command: Any) -> None:
    """See `_spared`: all that a command takes, and its own commands."""
    for child in getattr(command, "commands", {}).values():
        _spare_coercion(child)
    list_params = command.get_params
    command.get_params = lambda ctx: [_spared(parameter) for parameter in list_params(ctx)]


def _spared(parameter: Any) -> Any:
    """What nobody typed, and a plain text, stays as it is: to find that out Typer would load pydantic (70 ms)."""
    if "process_value" not in vars(parameter) and parameter.nargs == 1:
        parameter.process_value = partial(_process, parameter, parameter.process_value)
    return parameter


def _process(parameter: Any, coerce: Callable[[Any, Any], Any], ctx: Any, value: Any) -> Any:
    is_text = type(value) is str and parameter.type_descriptor.annotation is str and not parameter.multiple
    if not is_text and (value is not None or parameter.required):
        return coerce(ctx, value)
    unchanged = () if parameter.multiple else value
    return unchanged if parameter.callback is None else parameter.callback(ctx, parameter, unchanged)


class CommandTable(TyperGroup):
    """The top of the command line: lists its commands from the table, imports the one that runs."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.commands = _Commands()
        self._listing = False

    def get_params(self, ctx: Any) -> list[Any]:
        return [_spared(parameter) for parameter in super().get_params(ctx)]

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


# As Typer words them; each is a key of core/zh.toml. What is not here (a newer Typer's sentence) stays as it is.
SENTENCES = (
    "No such command {name}. Did you mean {names}?",
    "No such command {name}.",
    "No such option: {name} (Possible options: {names})",
    "No such option: {name}",
    "Missing argument {name}.",
    "Missing option {name}.",
    "Missing command.",
    "Option {name} does not take a value.",
    "Option {name} requires an argument.",
    "Got unexpected extra argument(s) ({names})",
    "Invalid value for {name}: {reason}",
    "Input should be a valid integer, unable to parse string as an integer",
    "Input should be a valid number, unable to parse string as a number",
)


def usage_words(text: str) -> str:
    """The same sentence in the chosen language; `text` itself where there is none."""
    for sentence in SENTENCES:
        if match := _pattern(sentence).fullmatch(text):
            values = match.groupdict()
            if "reason" in values:
                values["reason"] = usage_words(values["reason"])
            return tr(sentence, **values)
    return text


@cache
def _pattern(sentence: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>.+?)", re.escape(sentence)), re.DOTALL)


def _version(is_set: bool) -> None:
    if is_set:
        from glmchat import __version__

        output.data(f"glmchat {__version__}")
        raise typer.Exit


def _language(code: str | None) -> None:
    if code is None:
        return
    if code not in ("en", "zh"):
        raise Usage(tr("--lang cannot be {code!r}", code=code), hint=tr("en or zh"), code="language.unknown")
    language.choose(code)


def build() -> typer.Typer:
    """The whole command line as a Typer application."""
    app = typer.Typer(
        name="glmchat",
        cls=CommandTable,
        context_settings={"help_option_names": ["-h", "--help"]},
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        invoke_without_command=True,
    )

    @app.callback(epilog="Exit codes: 0 done, 1 failed, 2 usage, 3 damaged file, 4 does not fit, 130 interrupted.")
    def glmchat(
        context: typer.Context,
        version: Annotated[
            bool, typer.Option("--version", "-V", callback=_version, is_eager=True, help="Print the version.")
        ] = False,
        lang: Annotated[
            str | None,
            typer.Option("--lang", callback=_language, is_eager=True, help="Interface language: en or zh."),
        ] = None,
    ) -> None:
        """Talk to a local language model in a terminal. Without a command the chat window opens."""
        if context.invoked_subcommand is None:
            from glmchat.cli.run import open_window

            open_window()

    return app


def _language_first(arguments: Sequence[str]) -> list[str]:
    """`glmchat run NAME --lang zh` means `glmchat --lang zh run NAME`; what follows `--` stays where it is."""
    rest = list(arguments)
    options = rest[: rest.index("--")] if "--" in rest else rest
    for at, word in enumerate(options):
        words = options[at : at + 2] if word == "--lang" else [word]
        if words in (["--lang", "en"], ["--lang", "zh"], ["--lang=en"], ["--lang=zh"]):
            return [*words, *rest[:at], *rest[at + len(words) :]]
    return rest


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; failures are on the screen when this returns."""
    as_json = "--json" in arguments
    try:
        return _run(arguments, as_json=as_json)
    finally:
        for sentence in take_notes():
            output.say(sentence)


# How the programs that people come from call what `tune` can do.
_PEERS = {
    "--learning-rate": "--lr", "--name": "--as", "--output-dir": "--as", "--output-name": "--as",
    "--lora-rank": "--rank", "--lora-r": "--rank", "--lora-alpha": "--alpha", "--lora-dropout": "--dropout",
    "--lora-target": "--targets", "--target-modules": "--targets", "--pre-seq-len": "--prefix-length",
    "--num-train-epochs": "--epochs", "--num-epochs": "--epochs", "--max-steps": "--steps",
    "--batch-size": "--tokens-per-step", "--per-device-train-batch-size": "--tokens-per-step",
    "--cutoff-len": "--max-length", "--max-seq-length": "--max-length", "--max-source-length": "--max-length",
    "--save-steps": "--save-every", "--quantization-bit": "--quant", "--finetuning-type": "--method",
    "--gradient-checkpointing": "--checkpointing", "--val-size": "--eval", "--pref-beta": "--beta",
}  # fmt: skip


def _usage_hint(text: str, arguments: Sequence[str], command: str) -> str:
    """What helps against a mistake that Typer has found; `text` is its sentence, `command` the one that was called."""
    rest = arguments[2:] if arguments[:1] == ["--lang"] else arguments
    first = one_line(rest[0].partition("=")[0], 40) if rest else ""
    if text == f"No such option: {first}" and len(first) > 1:
        return tr("what `run` takes stands behind it: {example}", example=f"glmchat run {first}")
    if re.match("No such option: -[^-]", text) or any(re.match(r"-.*\s", word) for word in arguments):
        return tr("text that begins with a dash stands behind two: {example}", example='glmchat run NAME -- "-5"')
    unknown = re.match(r"No such option: (--[\w-]+)", text)
    if unknown and command == "glmchat tune" and (near := _PEERS.get(unknown[1].replace("_", "-"))):
        return tr("did you mean {near}?", near=near)
    return f"{command} --help"


def _command(wrong: typer.TyperException) -> str:
    """The command that was wrongly called, as it is typed."""
    context = getattr(wrong, "ctx", None)
    return context.command_path if context is not None else "glmchat"


def _run(arguments: Sequence[str], *, as_json: bool) -> int:
    try:
        if named_shell(arguments):
            return 0
        result = build()(_language_first(arguments), prog_name="glmchat", standalone_mode=False)
        return result if isinstance(result, int) and not isinstance(result, bool) else 0
    except GlmchatError as problem:
        output.error(problem, as_json=as_json)
        return problem.exit
    except typer.Abort:
        output.error(
            Interrupted(tr("stopped: the input ended"), hint=tr("answer the question, or say --yes")), as_json=as_json
        )
        return Interrupted.exit
    except typer.TyperException as wrong:
        text = wrong.format_message()
        output.error(Usage(usage_words(text), hint=_usage_hint(text, arguments, _command(wrong))), as_json=as_json)
        return Usage.exit
    except BrokenPipeError:  # the reader went away (`glmchat list | head`): quiet, as every filter is
        output.discard(sys.stdout)
        return 1
    except OSError as error:
        if (refused := refusal(error)) is None:
            raise
        output.error(refused, as_json=as_json)
        return refused.exit


def main() -> NoReturn:
    """Entry point of the `glmchat` script."""
    gc.set_threshold(
        100_000, 10, 10
    )  # what is imported stays: looking through it again and again took 40 ms of a start
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None where the descriptor is closed
            # LANG=C and friends: UTF-8 whatever the locale. A path that is no UTF-8 is spelled as JSON spells it.
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    sys.exit(run(sys.argv[1:]))
