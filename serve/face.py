"""What the HTTP server asks of an engine. The real one and the tests' FakeEngine both answer to it.

torch is imported by `engine_loader`, inside the engine's thread.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from glmchat.core.decoding import Decoding, TokenLogprob
from glmchat.core.engine_options import EngineOptions
from glmchat.core.messages import FinishReason, Message, Sampling

if TYPE_CHECKING:  # the server answers before torch is imported
    from glmchat.engine.decoding.decoder import Decoder
    from glmchat.engine.gpu.prompt import OnPrefill

Report = Callable[[str, float], None]
"""Progress of a load: the stage ("import", "tokenizer", "weights", "warmup") and how much of it is done, 0 to 1."""


class Chunk(Protocol):
    """A piece of an answer. Only the last one has a finish reason, counts and times (milliseconds)."""

    @property
    def text(self) -> str: ...
    @property
    def token_ids(self) -> Sequence[int]: ...
    @property
    def finish_reason(self) -> FinishReason | None: ...
    @property
    def logprobs(self) -> Sequence[TokenLogprob]:
        """One for each token that is shown, where a decoder tells them."""
        ...

    @property
    def facts(self) -> Mapping[str, Any]:
        """On the last one: prompt_n, cached_n, prompt_ms, predicted_n, predicted_ms, ttft_ms, seed, stopped_by."""
        ...


class EngineFace(Protocol):
    """One loaded model. All calls come from one thread, but for `render`, `render_open`, `complete`, `tokenize` and
    `detokenize`, and `family`, `facts` and `identified`, which the event loop asks for and which therefore answer at
    once.
    """

    context: int

    @property
    def parallel(self) -> int:
        """How many answers it can write at once."""
        ...

    @property
    def mixes_adapters(self) -> bool:
        """Whether answers with different adapters can be written at once; else they take turns."""
        ...

    @property
    def family(self) -> str: ...
    @property
    def identified(self) -> bool:
        """Whether `facts` hold all that they ever will; the hashes of what was loaded come some time after the load."""
        ...

    # adapters: folders of those that will answer: one may bring words and a chat template of its own.

    def render(
        self, messages: Sequence[Message], variables: Mapping[str, Any] = ..., adapters: Sequence[Path] | None = ...
    ) -> list[int]:
        """variables: what the chat template is told beside the messages."""
        ...

    def render_open(
        self, messages: Sequence[Message], variables: Mapping[str, Any] = ..., adapters: Sequence[Path] | None = ...
    ) -> list[int]: ...
    def prepends_system(self, messages: Sequence[Message], adapters: Sequence[Path] | None = ...) -> bool:
        """Whether the family has no place for a system prompt, so that it stands before this first question."""
        ...

    def complete(self, text: str, adapters: Sequence[Path] | None = ...) -> list[int]: ...
    def tokenize(self, text: str, adapters: Sequence[Path] | None = ...) -> list[int]: ...
    def detokenize(self, ids: Sequence[int], adapters: Sequence[Path] | None = ...) -> str: ...
    def marks(self) -> Mapping[str, tuple[str, int]]:
        """ "bos_token", "eos_token": name and id, where there is one."""
        ...

    def decoder(
        self, decoding: Decoding, ids: Sequence[int] = ..., adapters: Sequence[Path] | None = ...
    ) -> Decoder | None:
        """For `stream_tokens`: what holds one answer behind `ids` to `decoding`; None where that asks for nothing.

        Raises Usage for what this model cannot do.
        """
        ...

    def facts(self) -> Mapping[str, Any]:
        """What the `glmchat` object of an answer says of the model: quant, threads, kernel, …"""
        ...

    def stream_tokens(
        self,
        ids: Sequence[int],
        sampling: Sampling,
        *,
        cancelled: Callable[[], bool],
        on_prefill: OnPrefill,
        answer: Sequence[int] = (),
        chat: bool = True,
        decoder: Decoder | None = None,
        conversation: str | None = None,
    ) -> Generator[Chunk | None, None, None]:
        """The answer to `ids`; yields after each token, and while the prompt is read, None where nothing is said yet.

        `cancelled` is asked between tokens and between layers; `on_prefill(done, total)`.

        answer: the ids at the end of `ids` that are the beginning of the answer itself (a continued one).
        chat: False for the completion of a text, which is not cleaned up. conversation: the name under which its cache
        may be kept on the disk (`core.kv_files`), or UNNAMED; None: it may not.
        """
        ...

    def step(self) -> None:
        """Compute the next token of every `stream_tokens` that is under way, as far as that can be done together."""
        ...

    def attach(self, folder: Path, name: str) -> object: ...
    def detach(self, name: str) -> None: ...
    def activate(self, adapters: Mapping[str, float]) -> None:
        """For answers that begin from now on."""
        ...

    def leave(self, seconds: float = 0.0) -> None:
        """Nobody is here any more: write what is to be kept now, and wait for that so long at most. From any thread."""
        ...

    def close(self) -> None: ...


Load = Callable[[Report], EngineFace]


def engine_loader(options: EngineOptions, scope: str = "") -> Load:
    """scope: of the caches on the disk; what clients of a server ask is kept apart from the user's own."""

    def load(report: Report) -> EngineFace:
        report("import", 0.0)
        from glmchat.engine.engine import Engine
        from glmchat.engine.native.cards import choose_devices

        # Refused now, not after minutes of quantising.
        choose_devices(options.device, options.require_folder(), options.quant, options.dtype, options.context)
        report("import", 1.0)
        if options.quant is not None and options.copy is not None:
            from glmchat.engine.quantize.quantiser import kept_copy

            out = Path(options.copy["out"])
            kept_copy(options.require_folder(), options.quant, out, options.copy["manifest"], report)
            engine = Engine.load(out, **replace(options, quant=None).for_load(), on_progress=report)
        else:
            engine = Engine.load(options.require_folder(), **options.for_load(), on_progress=report)
        engine.identify()
        if options.kv_cache:
            engine.keep_caches(options.kv_cache, scope)
        return engine

    return load
