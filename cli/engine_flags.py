"""The flags of commands that load an engine: declared once, for `run`, `serve`, `bench` and `compare`.

A command takes `engine: EngineFlags` and is wrapped in `with_engine_flags`, which puts the flags in its place.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Annotated, Any, get_type_hints

import typer

from glmchat.core.engine_options import (
    EngineOptions,
    parse_cache_type,
    parse_device,
    parse_dtype,
    parse_parallel,
    parse_products,
    parse_quant,
)
from glmchat.core.settings import Settings, parse_seconds

_PANEL = "Model"


@dataclass(frozen=True, slots=True)
class EngineFlags:
    """As they were typed. Each is a field of `EngineOptions`, or decides one."""

    quant: Annotated[
        str | None,
        typer.Option("--quant", metavar="4|8", help="Run a quantised copy: 4 or 8 bits.", rich_help_panel=_PANEL),
    ] = None
    revision: Annotated[
        str | None, typer.Option("--revision", help="Commit, branch or tag.", rich_help_panel=_PANEL)
    ] = None
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32, bfloat16 or float16.", rich_help_panel=_PANEL)
    ] = None
    products: Annotated[
        str | None,
        typer.Option(
            "--products",
            metavar="int8",
            help="Round activations to 8 bits where weights have 4: faster on a CPU, and less exact.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    cache_type: Annotated[
        str | None,
        typer.Option(
            "--cache-type",
            metavar="auto|float32|bfloat16|int8",
            help="Keep keys and values so on a CPU: int8 takes about a quarter of float32's memory.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    device: Annotated[
        str,
        typer.Option(
            "--device",
            help="auto, cpu, cuda, cuda:N, cuda:0,cuda:1 (they share the layers) or mps.",
            rich_help_panel=_PANEL,
        ),
    ] = "auto"
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads.", rich_help_panel=_PANEL)] = None
    context: Annotated[
        int | None, typer.Option("--context", min=16, help="Context size in tokens.", rich_help_panel=_PANEL)
    ] = None
    parallel: Annotated[
        int | None,
        typer.Option(
            "--parallel",
            parser=parse_parallel,
            metavar="auto|N",
            help="Answers to write at once; auto: as memory allows, at most 16.",
            rich_help_panel=_PANEL,
        ),
    ] = None

    keep_alive: Annotated[
        str | None,
        typer.Option(
            "--keep-alive",
            metavar="TIME",
            help="How long the engine stays after its last user left: 5m, 90s; 0: it ends with this command.",
            rich_help_panel=_PANEL,
        ),
    ] = None

    @property
    def bits(self) -> int | None:
        """What `--quant` asks for, of a model or of its copy. Raises Usage."""
        return parse_quant(self.quant)

    def options(self, settings: Settings) -> EngineOptions:
        """The options before a model is chosen, which adds the rest. Raises Usage."""
        return EngineOptions(
            dtype=parse_dtype(self.dtype),
            products=parse_products(self.products),
            cache_type=parse_cache_type(self.cache_type or settings.cache_type),
            device=parse_device(self.device),
            threads=self.threads or settings.threads,
            context=self.context or settings.context,
            parallel=self.parallel,
            kv_cache=settings.kv_cache,
            keep_alive=settings.keep_alive
            if self.keep_alive is None
            else parse_seconds(self.keep_alive, "--keep-alive"),
        )


def with_engine_flags(command: Callable[..., None], without: tuple[str, ...] = ()) -> Callable[..., None]:
    """The command as Typer sees it: the flags where it takes `engine`. without: fields that have no flag there."""
    hints = get_type_hints(EngineFlags, include_extras=True)
    flags = [
        inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=one.default, annotation=hints[one.name])
        for one in fields(EngineFlags)
        if one.name not in without
    ]

    def typed(**values: Any) -> None:
        given = {flag.name: values.pop(flag.name, flag.default) for flag in flags}
        command(**values, engine=EngineFlags(**given))

    parameters: list[inspect.Parameter] = []
    for one in inspect.signature(command, eval_str=True).parameters.values():
        parameters += flags if one.name == "engine" else [one.replace(kind=inspect.Parameter.KEYWORD_ONLY)]
    typed.__name__, typed.__doc__ = command.__name__, command.__doc__
    typed.__annotations__ = {one.name: one.annotation for one in parameters}
    vars(typed)["__signature__"] = inspect.Signature(parameters)
    return typed
