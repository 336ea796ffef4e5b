"""Fakes that run: an engine behind the server's face that says what it was told to say, at the speed it was given."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from glmchat.checkpoints.families import family_of, is_native, spec_of
from glmchat.core.decoding import PLAIN, Decoding, TokenLogprob
from glmchat.core.errors import GlmchatError, Hostile
from glmchat.core.messages import FinishReason, Message, Sampling

if TYPE_CHECKING:  # a server over a fake engine runs without torch
    from glmchat.engine.decoding.decoder import Decoder

_NONE: Mapping[str, Any] = MappingProxyType({})
_HEADER = b'{"a": {"dtype": "U8", "shape": [262144], "data_offsets": [0, 262144]}}'
WEIGHTS = len(_HEADER).to_bytes(8, "little") + _HEADER + bytes(262144)  # safetensors, for folders that stand for models
LLAMA: Mapping[str, Any] = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 272, "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}  # fmt: skip
_TOKENIZER: Mapping[str, Any] = {
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
    "pre_tokenizer": None, "post_processor": None, "decoder": None,
    "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []},
}  # fmt: skip
_IGNORED = ("model.rotary_emb.inv_freq",)
STAGES = (("import", 0.0), ("tokenizer", 0.1), ("weights", 0.2), ("weights", 0.6), ("weights", 1.0), ("warmup", 1.0))


def stored_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor as a file of this config.json holds it; {} where they are not known."""
    spec = spec_of(config)
    if spec is None or not is_native(config):
        return {}
    turned = family_of(config).transposed or (lambda name: False)
    return {name: shape[::-1] if turned(name) else shape for name, shape in spec.shapes().items()}


def weights_of(config: Mapping[str, Any]) -> bytes:
    """A safetensors file of zeros, one byte each, with every tensor that a config.json describes, and as large as
    `WEIGHTS` where a name is ignored that can fill it up; `WEIGHTS` itself where the tensors are not known."""
    stored = stored_shapes(config)
    if not stored:
        return WEIGHTS
    ignored = [name for name in _IGNORED if family_of(config).rename(name) is None]

    def written(filler: int) -> bytes:
        header, at = {}, 0
        for name, shape in {**stored, **dict.fromkeys(ignored, (filler,))}.items():
            header[name] = {"dtype": "U8", "shape": shape, "data_offsets": [at, at + prod(shape)]}
            at += prod(shape)
        text = json.dumps(header).ljust(4096).encode()
        return len(text).to_bytes(8, "little") + text + bytes(at)

    return written(max(len(WEIGHTS) - len(written(0)), 0))


def model_in(folder: Path, **config: Any) -> Path:
    """A folder that stands for a model: everything that is looked at before an engine starts is there."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**LLAMA, **config}))
    (folder / "model.safetensors").write_bytes(weights_of({**LLAMA, **config}))
    (folder / "tokenizer.json").write_text(json.dumps(_TOKENIZER))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}{{ enable_thinking }}"}))
    return folder


@dataclass(frozen=True)
class FakeChunk:
    text: str
    token_ids: Sequence[int] = ()
    finish_reason: FinishReason | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    logprobs: Sequence[TokenLogprob] = ()


class FakeEngine:
    """`FakeEngine(["one ", "two"])` answers every question with these pieces, one token each.

    Ids: a character's code point is its id, so that prompts can be counted; piece number i of the answer has id i.
    seconds_per_token, seconds_per_prefill: how slow it is. prefill_steps: how often it looks up while reading a prompt.
    repeat: say all pieces that many times. echo: answer with the last question instead.
    until: begin again with the pieces as long as this file is not there.
    device: where it says that it computes.
    fail_after: raise `failure` after that many pieces. die_after: kill the process (-9) after that many.
    Everything it was asked is recorded in `asked`; `stopped` counts answers that were stopped.
    """

    def __init__(
        self,
        pieces: Sequence[str] = ("one ", "two"),
        *,
        seconds_per_token: float = 0.0,
        seconds_per_prefill: float = 0.0,
        prefill_steps: int = 4,
        fail_after: int | None = None,
        failure: Exception | None = None,
        die_after: int | None = None,
        echo: bool = False,
        repeat: int = 1,
        until: str | None = None,
        context: int = 4096,
        parallel: int = 1,
        device: str | None = None,
        mixes: bool = True,
    ) -> None:
        self.pieces = tuple(pieces) * repeat
        self.seconds_per_token = seconds_per_token
        self.seconds_per_prefill = seconds_per_prefill
        self.prefill_steps = prefill_steps
        self.fail_after = fail_after
        self.failure = failure or RuntimeError("the fake engine was told to fail")
        self.die_after = die_after
        self.echo = echo
        self.until = until
        self.context = context
        self.family = "fake"
        self.parallel = parallel
        self.device = device
        self.mixes_adapters = mixes
        self.steps = 0  # how often several answers were advanced together
        self.identified = True  # False: the hashes in `facts` are still to come
        self.asked: list[tuple[list[int], Sampling]] = []
        self.decoded: list[Decoding | None] = []
        self.stopped = 0
        self.conversations: list[str | None] = []
        self.left = 0  # how often it was told that nobody is here any more
        self.closed = False
        self.attached: dict[str, Path] = {}
        self.attachments: list[str] = []  # every call of attach
        self.active: dict[str, float] = {}

    @classmethod
    def loader(
        cls, *arguments: Any, seconds_to_load: float = 0.0, load_failure: GlmchatError | None = None, **options: Any
    ) -> Callable[[Callable[[str, float], None]], FakeEngine]:
        """A `Load` for serve: passes through the stages, then hands out the engine, or fails with `load_failure`."""

        def load(report: Callable[[str, float], None]) -> FakeEngine:
            for stage, done in STAGES:
                report(stage, done)
                time.sleep(seconds_to_load / len(STAGES))
            if load_failure:
                raise load_failure
            return cls(*arguments, **options)

        return load

    def render(
        self, messages: Sequence[Message], variables: Mapping[str, Any] = _NONE, adapters: Sequence[Path] | None = None
    ) -> list[int]:
        """Variables of the template stand before the messages, as `{name=value}`."""
        told = [ord(c) for name, value in variables.items() for c in f"{{{name}={value}}}"]
        return told + [ord(c) for c in "".join(f"<{m.role}>{m.content}" for m in messages) + "<assistant>"]

    def prepends_system(self, messages: Sequence[Message], adapters: Sequence[Path] | None = None) -> bool:
        return False

    def render_open(
        self,
        messages: Sequence[Message],
        variables: Mapping[str, Any] = MappingProxyType({}),
        adapters: Sequence[Path] | None = None,
    ) -> list[int]:
        return self.render(messages[:-1], variables) + self.tokenize(messages[-1].content)

    def complete(self, text: str, adapters: Sequence[Path] | None = None) -> list[int]:
        return self.tokenize(text)

    def tokenize(self, text: str, adapters: Sequence[Path] | None = None) -> list[int]:
        return [ord(c) for c in text]

    def detokenize(self, ids: Sequence[int], adapters: Sequence[Path] | None = None) -> str:
        return "".join(map(chr, ids))

    def marks(self) -> Mapping[str, tuple[str, int]]:
        return {"eos_token": ("<end>", 1)}

    def decoder(self, decoding: Decoding, ids: Sequence[int] = (), adapters: Sequence[Path] | None = None) -> None:
        """What is asked for is recorded in `decoded`; a fake engine does none of it."""
        self.decoded.append(None if decoding == PLAIN else decoding)

    def facts(self) -> Mapping[str, Any]:
        return {"threads": 1, "kernel": "fake", "family": "fake", **({"device": self.device} if self.device else {})}

    def attach(self, folder: Path, name: str) -> None:
        if not folder.is_dir():
            raise Hostile(f"{folder} is no adapter", hint="name another", code="adapter.damaged")
        self.attached[name] = folder
        self.attachments.append(name)

    def detach(self, name: str) -> None:
        del self.attached[name]
        self.active.pop(name, None)

    def activate(self, adapters: Mapping[str, float]) -> None:
        self.active = dict(adapters)

    def leave(self, seconds: float = 0.0) -> None:
        self.left += 1

    def close(self) -> None:
        self.closed = True

    def step(self) -> None:
        self.steps += 1

    def stream_tokens(self, *given: Any, **options: Any) -> Generator[FakeChunk, None, None]:
        return self.stream_ids(*given, **options)

    def stream_ids(
        self,
        ids: Sequence[int],
        sampling: Sampling,
        *,
        cancelled: Callable[[], bool] = lambda: False,
        on_prefill: Callable[[int, int], None] = lambda done, total: None,
        answer: Sequence[int] = (),
        chat: bool = True,
        decoder: Decoder | None = None,
        conversation: str | None = None,
    ) -> Generator[FakeChunk, None, None]:
        self.asked.append((list(ids), sampling))
        self.conversations.append(conversation)
        started = time.perf_counter()
        finished = False
        try:
            for step in range(self.prefill_steps if self.seconds_per_prefill else 0):
                time.sleep(self.seconds_per_prefill / self.prefill_steps)
                on_prefill((step + 1) * len(ids) // self.prefill_steps, len(ids))
                if cancelled():
                    yield FakeChunk("", (), "cancelled")
                    return
            read = time.perf_counter()
            pieces = list(self._answer(ids) if self.echo else self.pieces)
            limit = min(sampling.max_tokens or 2048, self.context - len(ids))
            for number, piece in enumerate(pieces):
                if number >= limit:
                    break
                if self.fail_after is not None and number >= self.fail_after:
                    raise self.failure
                if number == self.die_after:
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(self.seconds_per_token)
                if cancelled():
                    yield FakeChunk("", (), "cancelled")
                    return
                yield FakeChunk(piece, (number,))
                if number + 1 == len(pieces) and self.until and not Path(self.until).exists():
                    pieces += self.pieces
            finished = True
            said = min(limit, len(pieces))
            yield FakeChunk(
                "",
                (),
                "length" if len(pieces) > limit else "stop",
                {
                    "prompt_n": len(ids),
                    "cached_n": 0,
                    "prompt_ms": (read - started) * 1000,
                    "predicted_n": said,
                    "predicted_ms": (time.perf_counter() - read) * 1000,
                    "stopped_by": "length" if len(pieces) > limit else "eos",
                    "seed": sampling.seed if sampling.seed is not None else 7,
                },
            )
        finally:
            if not finished:
                self.stopped += 1

    def _answer(self, ids: Sequence[int]) -> tuple[str, ...]:
        """The last question, a character a token."""
        text = "".join(chr(i) for i in ids)
        with suppress(IndexError):
            text = text.rsplit("<user>", 1)[1].removesuffix("<assistant>")
        return tuple(text)


class GatedEngine(FakeEngine):
    """A fake engine that answers only when `gate` is set."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.gate = threading.Event()

    def stream_ids(
        self,
        ids: Sequence[int],
        sampling: Sampling,
        *,
        cancelled: Callable[[], bool] = lambda: False,
        **rest: Any,
    ) -> Generator[FakeChunk, None, None]:
        while not self.gate.wait(0.005):
            if cancelled():
                self.stopped += 1
                return
        yield from super().stream_ids(ids, sampling, cancelled=cancelled, **rest)
