"""`glmchat run` (and `chat`): one answer on stdout, a conversation in plain lines, or the window."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glmchat.cli import output
from glmchat.cli.asking import TextCommand
from glmchat.cli.choosing import choose_model
from glmchat.cli.completion import complete_adapters, complete_conversations, complete_models, complete_themes
from glmchat.cli.engine_flags import EngineFlags, with_engine_flags
from glmchat.core import typed_ahead
from glmchat.core.errors import GlmchatError, Usage
from glmchat.core.language import tr
from glmchat.core.messages import Message, Sampling, minus_one, parse_template_variables
from glmchat.core.settings import THEMES
from glmchat.core.text import one_line

if TYPE_CHECKING:
    from glmchat.chat.history.history import History
    from glmchat.chat.launch import LaunchOptions

_SAMPLING, _MODEL, _CHAT = "Sampling", "Model", "Conversation"  # the panels of its help


def register(app: typer.Typer) -> None:
    app.command("run", cls=TextCommand)(with_engine_flags(run))
    app.command("chat", hidden=True, cls=TextCommand)(with_engine_flags(run))


def run(
    *,
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]",
            help="The model. Default: $GLMCHAT_MODEL, else default_model in the config, else the one last used.",
            autocompletion=complete_models,
        ),
    ] = None,
    prompt: Annotated[
        str | None, typer.Argument(metavar="[PROMPT]", help="Answer this and exit. Stdin is appended to it.")
    ] = None,
    text: Annotated[
        str | None, typer.Option("-p", "--prompt", metavar="TEXT", help="The prompt, when no NAME is given.")
    ] = None,
    model: Annotated[str | None, typer.Option("-m", "--model", hidden=True, autocompletion=complete_models)] = None,
    messages: Annotated[
        Path | None,
        typer.Option("--messages", metavar="FILE", help="A JSON list of messages instead of a prompt; - is stdin."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines on stdout.")] = False,
    complete: Annotated[
        bool, typer.Option("--complete", help="Continue the text instead of answering it (base models).")
    ] = False,
    no_stream: Annotated[bool, typer.Option("--no-stream", help="Print the answer when it is complete.")] = False,
    plain: Annotated[
        bool, typer.Option("--plain", help="A conversation in plain lines, for screen readers and simple terminals.")
    ] = False,
    temperature: Annotated[
        float | None,
        typer.Option("--temp", "--temperature", help="0 always picks the likeliest token.", rich_help_panel=_SAMPLING),
    ] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", "--top_p", rich_help_panel=_SAMPLING)] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", "--top_k", help="0: off.", rich_help_panel=_SAMPLING)] = None,
    min_p: Annotated[float | None, typer.Option("--min-p", "--min_p", rich_help_panel=_SAMPLING)] = None,
    repetition_penalty: Annotated[
        float | None,
        typer.Option("--repetition-penalty", "--repetition_penalty", "--repeat-penalty", rich_help_panel=_SAMPLING),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", rich_help_panel=_SAMPLING)] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens",
            "--max_tokens",
            "--max-new-tokens",
            "-n",
            help="Longest answer, in tokens.",
            rich_help_panel=_SAMPLING,
        ),
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="Stop before this text; repeatable.", rich_help_panel=_SAMPLING)
    ] = None,
    template_variables: Annotated[
        list[str] | None,
        typer.Option(
            "--template-var",
            "--chat-template-kwargs",
            metavar="NAME=VALUE",
            help="Tell the chat template something, for example enable_thinking=false; repeatable, or a JSON object.",
            rich_help_panel=_SAMPLING,
        ),
    ] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", hidden=True)] = False,
    engine: EngineFlags,
    no_keep: Annotated[
        bool, typer.Option("--no-keep", help="With --quant: in memory only, keep no copy.", rich_help_panel=_MODEL)
    ] = False,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            metavar="NAME[:WEIGHT]",
            help="An adapter in the store, or its folder; repeatable.",
            autocompletion=complete_adapters,
            rich_help_panel=_MODEL,
        ),
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Use adapters trained on another base too; answers say so.", rich_help_panel=_MODEL
        ),
    ] = False,
    server: Annotated[
        str | None,
        typer.Option(
            "--server",
            "--base-url",
            metavar="URL|NAME",
            help="An OpenAI-compatible server, or its name in the config.",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            "--api-key-file", metavar="FILE", help="Its key; default: $OPENAI_API_KEY.", rich_help_panel=_MODEL
        ),
    ] = None,
    system: Annotated[
        str | None, typer.Option("--system", "-s", metavar="TEXT", help="System prompt.", rich_help_panel=_CHAT)
    ] = None,
    last: Annotated[
        bool, typer.Option("--continue", "-c", help="Continue the last conversation.", rich_help_panel=_CHAT)
    ] = False,
    resume: Annotated[
        int | None,
        typer.Option(
            "--resume",
            metavar="ID",
            help="Continue this conversation.",
            rich_help_panel=_CHAT,
            autocompletion=complete_conversations,
        ),
    ] = None,
    no_history: Annotated[bool, typer.Option("--no-history", help="Save nothing.", rich_help_panel=_CHAT)] = False,
    theme: Annotated[
        str | None,
        typer.Option(
            "--theme",
            help="dark, light, nord … (/theme in the window lists all).",
            autocompletion=complete_themes,
            rich_help_panel=_CHAT,
        ),
    ] = None,
    finish_on_hangup: Annotated[
        bool,
        typer.Option(
            "--finish-on-hangup",
            help="If the terminal goes away, finish the answer (see `glmchat attach`).",
            rich_help_panel=_CHAT,
        ),
    ] = False,
) -> None:
    """Chat with a model. With a prompt, or with something on stdin: one answer on stdout, nothing else there."""
    from glmchat.chat.launch import LaunchOptions
    from glmchat.checkpoints.fit import refuse_unheard
    from glmchat.core.servers import find_server
    from glmchat.core.settings import load_settings

    _refuse_contradictions(name, prompt, text, model, messages, last, resume, no_history, complete)
    bits = engine.bits
    if server is not None:
        _refuse_engine_flags(engine)
    flags: dict[str, Any] = {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "max_tokens": max_tokens,
        "stop": tuple(stop) if stop else None,
        "ignore_eos": True if ignore_eos else None,
        "template_variables": _template_variables(template_variables),
    }
    sampling = {field: minus_one(field, value) for field, value in flags.items() if value is not None}
    Sampling(**sampling)  # the ranges, before anything is loaded
    settings = load_settings()
    named = find_server(server, settings.servers) if server else None
    if named is not None:
        server, name = named.url, name if name or model else named.model
    launch = LaunchOptions(
        engine=engine.options(settings),
        keep_copy=not no_keep,
        server=server,
        api_key=(named.read_key() if named and not api_key_file else _key(api_key_file)) if server else None,
        sampling=sampling,
        system=system,
        history=settings.history and not no_history,
        theme=_theme(theme),
        finish_on_hangup=finish_on_hangup,
    )
    question = _Question.of(prompt if prompt is not None else text, messages)
    mode = _mode(question, plain=plain, as_json=as_json)
    if mode != "window":
        typed_ahead.release()
    if mode == "once":
        question = question.with_stdin(server)
    with _history(launch) as history:
        launch, spoken_with = _conversation(history, launch, last, resume)
        launch = choose_model(launch, name or model, settings, spoken_with, bits, engine.revision, mode)
        brought: list[str] = []
        if adapter is not None:
            launch, brought = _adapters(launch, adapter, force=force)
        variables = sampling.get("template_variables", ())
        if launch.server is None and (folder := launch.engine.folder) is not None and variables and not complete:
            from glmchat.chat.adapters_choice import folder_of_template

            try:
                refuse_unheard(folder_of_template(launch.adapters or (), folder), variables)
            except GlmchatError:
                _take_out(brought)
                raise
        if mode == "once":
            from glmchat.cli.one_shot import answer_once

            stream = not no_stream
            try:
                code = answer_once(
                    history, launch, settings, question.content, as_json=as_json, stream=stream, complete=complete
                )
            except GlmchatError as error:
                if error.code.startswith("adapter."):
                    _take_out(brought)
                raise
            raise typer.Exit(code)
        if mode == "plain":
            from glmchat.cli.line_mode import converse

            raise typer.Exit(converse(history, launch, settings))
        launch = replace(launch, note=history.note)
    _window(launch)


def open_window() -> None:
    """Bare `glmchat`: the window with the model last used, or its picker; plain lines where it cannot be shown."""
    run(engine=EngineFlags())


def _window(launch: LaunchOptions) -> None:
    before = typed_ahead.hold()
    try:
        from glmchat.tui.app import run_window

        code = run_window(launch, before)
    finally:
        typed_ahead.release()
    if code:
        raise typer.Exit(code)


@dataclass(frozen=True, slots=True)
class _Question:
    """What is asked once: a text, or whole messages."""

    content: str | tuple[Message, ...] | None
    from_stdin: bool = False  # the messages took it

    @staticmethod
    def of(prompt: str | None, messages: Path | None) -> _Question:
        from glmchat.cli.asking import read_messages

        if messages is None:
            return _Question(prompt)
        return _Question(read_messages(messages), from_stdin=str(messages) == "-")

    def with_stdin(self, server: str | None = None) -> _Question:
        from glmchat.cli.asking import read_stdin

        if self.from_stdin or isinstance(self.content, tuple):
            return self
        read = read_stdin(wait=self.content is None, beside=self.content is not None)
        parts = [part for part in (self.content, read) if part and part.strip()]
        if not parts:
            raise Usage(
                tr("there is no prompt"),
                hint=tr("glmchat run NAME PROMPT, -p TEXT, or text on stdin")
                if server is None
                else tr("with --server too the first word names the model: give MODEL PROMPT, or -p TEXT"),
                code="run.no_prompt",
            )
        return replace(self, content="\n\n".join(parts))


def _mode(question: _Question, *, plain: bool, as_json: bool) -> str:
    """ "once", "plain" or "window"."""
    if question.content is not None or as_json or not output.is_terminal(sys.stdin):
        return "plain" if plain and question.content is None and not as_json else "once"
    if not output.is_terminal(sys.stdout):
        return "plain" if plain else "once"
    return "plain" if plain or os.environ.get("TERM") in ("dumb", "unknown", "", None) else "window"


def _refuse_contradictions(
    name: str | None,
    prompt: str | None,
    text: str | None,
    model: str | None,
    messages: Path | None,
    last: bool,
    resume: int | None,
    no_history: bool,
    complete: bool,
) -> None:
    pairs = (
        (complete and messages is not None, "--complete", "--messages"),
        (prompt is not None and text is not None, "PROMPT", "--prompt"),
        (messages is not None and (prompt is not None or text is not None), "--messages", tr("a prompt")),
        (last and resume is not None, "--continue", "--resume"),
        (
            no_history and (last or resume is not None),
            "--no-history",
            "--resume" if resume is not None else "--continue",
        ),
        (messages is not None and (last or resume is not None), "--messages", "--continue"),
        (name is not None and model is not None, "NAME", "--model"),
    )
    for wrong, one, other in pairs:
        if wrong:
            raise Usage(
                tr("{one} and {other} conflict", one=one, other=other),
                hint=tr("give one of them"),
                code="usage.contradiction",
            )


def _refuse_engine_flags(given: EngineFlags) -> None:
    for name in ("quant", "revision", "dtype", "products", "cache_type", "threads", "context"):
        if getattr(given, name) is not None:
            raise Usage(
                tr(
                    "{flag} applies to a model loaded on this machine; with --server the model is already loaded",
                    flag=f"--{name.replace('_', '-')}",
                ),
                hint=tr("leave out one of them"),
                code="usage.contradiction",
            )


def _template_variables(given: list[str] | None) -> dict[str, Any] | None:
    """Raises Usage for what is neither NAME=VALUE nor a JSON object."""
    if not given:
        return None
    try:
        return parse_template_variables(given)
    except ValueError as error:
        raise Usage(
            tr("{flag} cannot be {value}", flag="--template-var", value=one_line(repr(str(error)), 60)),
            hint=tr("for example enable_thinking=false"),
            code="usage.value",
        ) from None


def _theme(name: str | None) -> str | None:
    if name is not None and name not in THEMES:
        raise Usage(
            tr("{flag} cannot be {value}", flag="--theme", value=repr(one_line(name))),
            hint=", ".join(THEMES),
            code="usage.value",
        )
    return name


def _adapters(launch: LaunchOptions, given: list[str], *, force: bool) -> tuple[LaunchOptions, list[str]]:
    """The options with the adapters that flags name, checked against the model; a folder goes into the store first.

    Second: names of those that came into the store now. Where one of them cannot be used, none stays there."""
    from glmchat.chat.adapters_choice import own_texts, parse_adapter, parse_path, require_usable
    from glmchat.chat.trained import trained_system, trained_words
    from glmchat.cli.adapters import bring_in
    from glmchat.hub.adapters import is_forced

    if launch.server is not None:  # its own store knows them
        return replace(launch, adapters=tuple(parse_adapter(text) for text in given)), []
    chosen: list[tuple[str, float]] = []
    brought: list[str] = []
    try:
        for text in given:
            path = parse_path(text)
            if path is None:
                chosen.append(parse_adapter(text))
                continue
            name, made = bring_in(path[0], launch.engine.folder, force)
            brought += [name] if made else []
            chosen.append((name, path[1]))
        require_usable(chosen, launch.engine.folder, force=force)
    except BaseException:
        _take_out(brought)
        raise
    for name, _ in chosen:
        if is_forced(name):
            output.say(
                tr("{name} is attached by force: it may have been trained on another model", name=one_line(name))
            )
    system = launch.system if launch.system is not None else trained_system(chosen)
    for sentence in [*own_texts(chosen, launch.engine.folder), *trained_words(chosen, launch.engine.folder, system)]:
        output.say(sentence)
    return replace(launch, adapters=tuple(chosen)), brought


def _take_out(brought: list[str]) -> None:
    from glmchat.cli.adapters import take_out

    take_out(brought)


def _key(file: Path | None) -> str | None:
    from glmchat.core.servers import read_key

    return read_key(file, os.environ.get("OPENAI_API_KEY") or os.environ.get("GLMCHAT_API_KEY"))


def _history(launch: LaunchOptions) -> History:
    from glmchat.chat.history.history import History

    history = History.default() if launch.history else History.open(None)
    if history.note:
        output.say(history.note)
    if launch.history and history.problem:
        output.say(tr("this conversation is not being saved: {why}", why=one_line(history.problem)))
    return history


def _conversation(
    history: History, launch: LaunchOptions, last: bool, resume: int | None
) -> tuple[LaunchOptions, str | None]:
    """The options with the conversation to go on with, and the model it was last held with."""
    if last:
        head = history.last()
        if head is None:
            raise Usage(
                tr("there is no conversation to continue"), hint=tr("glmchat run NAME starts one"), code="history.empty"
            )
    elif resume is not None:
        head = history.load(resume).conversation
    else:
        return launch, None
    return replace(launch, resume=head.id), head.model
