"""The engine's public face: a checkpoint folder or GGUF file, text in, text out."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from glmchat.checkpoints.device_plan import DevicePlan
from glmchat.checkpoints.fit import LONGEST_CONTEXT, refuse_cache_type
from glmchat.checkpoints.spec import ModelSpec
from glmchat.checkpoints.vocabulary_trial import try_vocabulary
from glmchat.core.decoding import Decoding
from glmchat.core.errors import Damaged, FieldError, Usage
from glmchat.core.fingerprints import of_adapter, program_state
from glmchat.core.language import tr
from glmchat.core.messages import Message, Sampling
from glmchat.engine.decoding.answer import Asked, Chunk, ids_of, write
from glmchat.engine.decoding.decoder import Decoder, Decoders
from glmchat.engine.decoding.kv_store import IDLE_SECONDS, KVStore, key_of
from glmchat.engine.decoding.passes import Pass
from glmchat.engine.decoding.sequences import Sequences, Slot
from glmchat.engine.families import Checkpoint, identify
from glmchat.engine.formats.packed_cache import weights_state
from glmchat.engine.formats.weights import trim
from glmchat.engine.gpu.prompt import OnPrefill
from glmchat.engine.identity import Identity, versions
from glmchat.engine.loading import Progress, load_model, set_dtype
from glmchat.engine.models.base import LanguageModel
from glmchat.engine.native.cards import card_facts, choose_devices, load_in_words, needs_wide_residual, set_up
from glmchat.engine.native.self_test import card_step, step_fault
from glmchat.engine.placement import (
    choose_dtype,
    choose_parallel,
    multiply_coarsely,
    multiply_exactly,
    settle_dtype,
    tune,
)
from glmchat.engine.prompts.adapted import Adapters, Formats
from glmchat.engine.prompts.base import NO_VARIABLES, PromptFormat, read_messages
from glmchat.engine.quantize.linear import kernels_in
from glmchat.engine.sampling import Sampler, make_sampler, new_seed
from glmchat.engine.text_stream import TextStream
from glmchat.engine.tokenizers.base import Tokenizer
from glmchat.engine.tokenizers.loading import tokenizer_of_files

if TYPE_CHECKING:
    from glmchat.engine.adapters.attach import AdapterSet
    from glmchat.engine.adapters.files import Adapter

_Said = Sequence[Message | Mapping[str, Any]]
_Named = Mapping[str, Any]
_Active = tuple[tuple[str, float], ...]  # the name of a cache: the adapters it was computed with
_COMPUTES = ("ATEN_", "DNNL_", "GLMCHAT_KERNEL", "MKL_", "ONEDNN_", "TORCH")  # of the environment: how torch does
_LAST_SECONDS = 1.0  # for caches that are still to be written when the engine ends


class Engine:
    """One loaded model. Answers come from one thread, in turns; rendering and encoding may be asked for beside it."""

    def __init__(self, checkpoint: Checkpoint, model: LanguageModel, device: str, context: int) -> None:
        """Use `Engine.load`."""
        self.checkpoint = checkpoint
        self.model = model
        self.device = device  # the first, where there are several: where ids go
        self.plan = DevicePlan((device,))
        self._card: dict[str, Any] = {}  # which cards compute, for `facts`
        self.context = context
        self.threads = torch.get_num_threads()
        self.load_seconds = 0.0
        self.asked_dtype: str | None = None
        self.products: str | None = None
        self.identity: Identity | None = None  # started by `identify`
        self.sequences = Sequences(model, context, device)
        self._tokenizer: Tokenizer | Damaged = Damaged(tr("no tokenizer"), hint="", code="tokenizer.missing")
        self._formats = Formats(None, checkpoint.spec)
        self._adapters: AdapterSet | None = None
        self._decoders: dict[PromptFormat | None, Decoders] = {}
        self._kernel = "dense"
        self._loaded: list[Any] = []  # what was asked for, and of which files
        self._digests: dict[str, str | None] = {}  # of attached adapters

    @classmethod
    def load(
        cls,
        folder: str | Path,
        quant: int | None = None,
        dtype: str | None = None,
        device: str = "cpu",
        threads: int | None = None,
        *,
        context: int | None = None,
        parallel: int | None = 1,
        products: str | None = None,
        cache_type: str | None = None,
        on_progress: Progress | None = None,
    ) -> Engine:
        """Load a Hugging Face folder, a GGUF file, or a quantised folder of ours.

        quant: 4 or 8 quantises in memory; None keeps the file's precision. dtype: of the activations ("float32",
        "bfloat16", "float16"), None takes the fastest. context: positions to reserve, at most the model's own.
        parallel: answers that will be written at once, each with a cache of its own; None: as many as memory allows.
        products: "int8" rounds activations to 8 bits where they meet weights of 4: faster, and less exact.
        cache_type: of keys and values on a CPU ("float32", "bfloat16", "int8"), None that of the activations.
        on_progress(stage, done): stages "tokenizer", "weights", "warmup", each from 0 to 1.
        A folder without tokenizer files loads too; only what needs text then raises.
        Raises Damaged, Hostile, DoesNotFit, NotInstalled or Usage.
        """
        started = time.perf_counter()
        report = on_progress or (lambda stage, done: None)
        checkpoint = identify(Path(folder))
        spec, loaded = checkpoint.spec, [quant, dtype, products, weights_state(checkpoint.path)]
        room = _room(spec, context)
        plan = choose_devices(device, checkpoint.path, quant, dtype, room)
        device = plan.devices[0]
        refuse_cache_type(cache_type, checkpoint.config, device)
        set_up(plan)
        report("tokenizer", 0.0)
        tokenizer, prompt = _load_text(checkpoint)
        report("tokenizer", 1.0)
        activations = choose_dtype(dtype, checkpoint, device)
        with load_in_words(checkpoint.path, quant, dtype, room, plan):
            wide = needs_wide_residual(checkpoint.config, activations, device)
            model = load_model(checkpoint, dtype=activations, quant=quant, plan=plan, wide=wide, on_progress=report)
            model.step_fault, model.cache_type = step_fault, cache_type
            if device.startswith("cuda") and len(plan.devices) == 1:
                model.make_step, model.step_fault = card_step()
            if products == "int8":
                multiply_coarsely(model)
            elif dtype == "float32":
                multiply_exactly(model)
            report("warmup", 0.0)
            if dtype is None:
                settle_dtype(model, device, room)
            count = tune(model, device, threads)
        trim()
        engine = cls(checkpoint, model, device, room)
        engine.threads, engine.asked_dtype, engine.plan, engine.products = count, dtype, plan, products
        engine._tokenizer, engine._formats = tokenizer, Formats(prompt, spec)
        engine._card, engine._loaded = card_facts(plan.devices), loaded
        engine._kernel = _kernels(engine.model)
        engine.sequences.most = choose_parallel(model, device, room, parallel)
        engine.load_seconds = time.perf_counter() - started
        report("warmup", 1.0)
        return engine

    @property
    def parallel(self) -> int:
        """How many answers it can write at once."""
        return self.sequences.most

    @property
    def mixes_adapters(self) -> bool:
        """Whether answers with different adapters are written at once: a card's step is made anew for each set."""
        return self.device == "cpu"

    @property
    def sequence(self) -> Slot:
        """The one that was used last."""
        return self.sequences.current

    @property
    def family(self) -> str:
        return self.checkpoint.spec.family

    @property
    def spec(self) -> ModelSpec:
        return self.checkpoint.spec

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations."""
        return self.model.dtype

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises Damaged if the folder has no tokenizer files."""
        if isinstance(self._tokenizer, Damaged):
            raise self._tokenizer
        return self._tokenizer if self._formats.active is None else self._formats.active.tokenizer

    @property
    def prompt(self) -> PromptFormat:
        """The chat format of what is active. Raises Damaged if the folder has no tokenizer files."""
        return self._prompt_with(None)

    def _prompt_with(self, adapters: Adapters) -> PromptFormat:
        if (prompt := self._formats.of(adapters)) is None:
            self.tokenizer  # noqa: B018 - says what is missing
            raise Damaged(tr("this folder has no chat format"), hint=tr("use --complete"), code="prompt.missing")
        return prompt

    @property
    def speaks(self) -> bool:
        """The folder has a tokenizer, so text can be asked for."""
        return self._formats.own is not None

    @property
    def template(self) -> str | None:
        """What the chat format is, as a hash or a name; None without one."""
        return None if self._formats.active is None else self._formats.active.identity

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return self._formats.stop_ids(self._formats.active)

    # Text

    def render(self, messages: _Said, variables: _Named = NO_VARIABLES, adapters: Adapters = None) -> list[int]:
        """Ids of a conversation, with everything the family puts around it and before the next answer.

        variables: what the chat template is told, as {"enable_thinking": False}. adapters: see `Adapters`.
        """
        prompt = self._prompt_with(adapters)
        prompt.require_heard(variables)
        return self._formats.with_rows(prompt, prompt.render(read_messages(messages, prompt), variables))

    def render_open(self, messages: _Said, variables: _Named = NO_VARIABLES, adapters: Adapters = None) -> list[int]:
        """Like `render`; the last message is an answer that is to be continued."""
        prompt = self._prompt_with(adapters)
        prompt.require_heard(variables)
        return self._formats.with_rows(prompt, prompt.render_open(read_messages(messages, prompt), variables))

    def prepends_system(self, messages: Sequence[Message], adapters: Adapters = None) -> bool:
        """Whether a system prompt was put in front of the first question here, for want of a place of its own."""
        return self._prompt_with(adapters).prepends_system(messages)

    def complete(self, text: str, adapters: Adapters = None) -> list[int]:
        """Ids of raw text that is to be continued, control tokens recognised."""
        prompt = self._prompt_with(adapters)
        return self._formats.with_rows(prompt, prompt.complete(text))

    def tokenize(self, text: str, adapters: Adapters = None) -> list[int]:
        return self._prompt_with(adapters).tokenizer.encode(text)

    def detokenize(self, ids: Sequence[int], adapters: Adapters = None) -> str:
        return self._prompt_with(adapters).tokenizer.decode(ids)

    def marks(self) -> dict[str, tuple[str, int]]:
        """ "bos_token" and "eos_token": name and id of what begins and what ends a text, where the vocabulary names
        one."""
        prompt = self._prompt_with(())
        names = {token: name for name, token in prompt.tokenizer.controls.items()}
        begin = [one for one in (self.spec.bos_id, *reversed(prompt.complete(""))) if one is not None]
        found = (("bos_token", begin), ("eos_token", [*prompt.stop_ids, *self.spec.eos_ids]))
        chosen = ((mark, next((one for one in ids if one in names), None)) for mark, ids in found)
        return {mark: (names[one], one) for mark, one in chosen if one is not None}

    # Numbers

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """float32 [len(ids), vocab]: one uncached forward pass."""
        self._check(ids)
        self._wear()
        with torch.inference_mode():
            logits: torch.Tensor = self.model(torch.tensor(ids, device=self.device))
        return logits.float().cpu()

    def loss(self, ids: Sequence[int], labels: Sequence[int]) -> float:
        """Mean cross entropy of labels[1:] under the logits before them; a label of -100 is left out."""
        if len(labels) != len(ids) or len(ids) < 2:
            raise Usage(
                tr("labels and ids differ in length"),
                hint=tr("one label for each id, -100 to ignore"),
                code="loss.labels",
            )
        target = torch.tensor(labels[1:])
        return float(torch.nn.functional.cross_entropy(self.logits(ids)[:-1], target, ignore_index=-100))

    def generate(
        self, ids: Sequence[int], sampling: Sampling, *, cancelled: Callable[[], bool] | None = None
    ) -> Generator[int, None, None]:
        """The ids that follow; the id that ends an answer is the last one. Close it to stop."""
        yield from ids_of(self.sequences, self._asked(ids, sampling, cancelled, None, None))

    def stream(
        self,
        messages: _Said,
        sampling: Sampling,
        *,
        continue_final: bool = False,
        cancelled: Callable[[], bool] | None = None,
        on_prefill: OnPrefill | None = None,
    ) -> Generator[Chunk, None, None]:
        """The answer to a conversation; `continue_final` goes on with its last, unfinished answer."""
        said, variables = read_messages(messages, self.prompt), sampling.template_variables
        self.prompt.require_heard(variables)
        if continue_final:
            ids, answer = self.prompt.render_open(said, variables), self.prompt.encode_answer(said[-1].content)
        else:
            ids, answer = self.prompt.render(said, variables), []
        return self.stream_ids(ids, sampling, cancelled=cancelled, on_prefill=on_prefill, answer=answer)

    def stream_ids(
        self,
        ids: Sequence[int],
        sampling: Sampling,
        *,
        cancelled: Callable[[], bool] | None = None,
        on_prefill: OnPrefill | None = None,
        answer: Sequence[int] = (),
        chat: bool = True,
        decoder: Decoder | None = None,
    ) -> Generator[Chunk, None, None]:
        """The text that follows `ids`; `decoder` (see there) holds it to more than `sampling`.

        cancelled: asked between tokens and between layers. on_prefill(done, total): while the prompt is read.
        answer: the ids at the end of `ids` that are the beginning of the answer itself. chat: it is an answer, and is
        cleaned up as the family's own program did; what completes a text is given as the model wrote it.
        """
        with closing(
            self.stream_tokens(
                ids, sampling, cancelled=cancelled, on_prefill=on_prefill, answer=answer, chat=chat, decoder=decoder
            )
        ) as steps:
            for chunk in steps:
                if chunk is not None:
                    yield chunk

    def step(self) -> None:
        """Compute the next token of all `stream_tokens` that are under way, in one step where that is possible."""
        self.sequences.step()

    def stream_tokens(
        self,
        ids: Sequence[int],
        sampling: Sampling,
        *,
        cancelled: Callable[[], bool] | None = None,
        on_prefill: OnPrefill | None = None,
        answer: Sequence[int] = (),
        chat: bool = True,
        decoder: Decoder | None = None,
        conversation: str | None = None,
    ) -> Generator[Chunk | None, None, None]:
        """`stream_ids`, which yields after every token, and None where there is nothing to say yet.

        So several can be under way in turns, in one thread; with `step` before each round the weights are read once for
        all of them. Each goes on with the adapters that were active when it began, whatever is activated meanwhile.
        conversation: see `keep_caches`.
        """
        text = TextStream(self.tokenizer, sampling.stop, self._formats.active if chat else None)
        text.resume(answer)
        asked = self._asked(ids, sampling, cancelled, on_prefill, decoder)
        yield from write(self.sequences, asked, text, decoder, conversation)

    def _asked(
        self,
        ids: Sequence[int],
        sampling: Sampling,
        cancelled: Callable[[], bool] | None,
        on_prefill: OnPrefill | None,
        decoder: Decoder | None,
    ) -> Asked:
        self._check(ids)
        self._wear()
        self._kernel = _kernels(self.model)
        seed = new_seed() if sampling.seed is None else sampling.seed
        choose, active = self.sampler(sampling, seed, ids), self._formats.active
        on_rows = None if decoder is None else decoder.reader(ids)
        return Asked(
            ids,
            sampling,
            seed,
            choose if decoder is None else decoder.sampler(choose),
            ends=(*(() if sampling.ignore_eos else self.stop_ids), *(() if decoder is None else decoder.ends)),
            # Who is told the prompt's numbers too counts on as many tokens behind it as were asked for.
            run_on=() if active is None or on_rows is not None else active.sentence_ends,
            context=self.context,
            cancelled=cancelled,
            on_prefill=on_prefill,
            on_rows=on_rows,
            only_reads=decoder is not None and decoder.only_reads,
        )

    def decoder(self, decoding: Decoding, ids: Sequence[int] = (), adapters: Adapters = None) -> Decoder | None:
        """What holds one answer behind `ids` to `decoding`. Raises Usage for what this model cannot do."""
        prompt = self._formats.of(adapters)
        rows = self._formats.rows(prompt)
        if decoding.of_prompt and not self.spec.causal:
            raise FieldError(
                tr(
                    "{family} reads a prompt in both directions, so its tokens have no log probabilities",
                    family=self.family,
                ),
                hint=tr("leave out echo or logprobs"),
                code="decoding.both_ways",
                param="echo",
            )
        if ids:
            self._check(ids, rows)
        if prompt not in self._decoders:
            tokenizer = self.tokenizer if prompt is None else prompt.tokenizer
            self._decoders[prompt] = Decoders(tokenizer, self._formats.stop_ids(prompt), rows)
        return self._decoders[prompt].make(decoding, ids)

    def sampler(self, sampling: Sampling, seed: int, ids: Sequence[int]) -> Sampler:
        """What chooses the ids that follow `ids`."""
        banned = self._formats.active.banned_ids if self._formats.active is not None else ()
        return make_sampler(sampling, seed, ids, banned)

    def rebuild(self, ids: Sequence[int], passes: Sequence[Pass]) -> torch.Tensor:
        """Logits [vocab] behind `ids`, computed in the very passes that computed them once. For replays."""
        self._check(ids)
        return self.sequence.rebuild(ids, passes)

    def use_dtype(self, dtype: torch.dtype) -> None:
        """Compute in this type from now on, as if the load had settled on it. For replays."""
        set_dtype(self.model, dtype, self.device)
        self.sequences = Sequences(self.model, self.context, self.device, self.sequences.most)
        if self._adapters is not None:
            self._settle_cache()
        self._kernel = _kernels(self.model)

    def advance(self, token: int) -> torch.Tensor:
        """Logits [vocab] behind one more id after `rebuild`."""
        return self.sequence.advance(token)

    def _check(self, ids: Sequence[int], rows: int | None = None) -> None:
        rows = rows or self._formats.rows(self._formats.active)
        if not ids:
            raise Usage(tr("there is nothing to read: no ids"), hint=tr("give at least one token"), code="prompt.empty")
        if min(ids) < 0 or max(ids) >= rows:
            raise Usage(
                tr("an id is outside the vocabulary of {vocab_size}", vocab_size=rows),
                hint=tr("the ids were made by another model's tokenizer"),
                code="prompt.ids",
            )

    # Adapters

    def attach(self, folder: str | Path, name: str, *, force: bool = False, alpha: float | None = None) -> Adapter:
        """Read and check an adapter and keep it ready under `name`; it speaks once it is activated.

        force: attach one that names another base of the same shape. alpha: of a raw LoRA file, which does not say it.
        Raises NotInstalled, Usage, Damaged or Hostile; the model is then as it was.
        """
        adapter = self._adapter_set().attach(Path(folder), name, self._formats.check, force=force, alpha=alpha)
        self._digests[name] = None
        if self.sequences.store is not None:
            with suppress(OSError):  # taken away meanwhile: what it computes is not kept
                self._digests[name] = f"{of_adapter(Path(folder))} {alpha}"
        self._settle_cache(gone=name)
        return adapter

    def activate(self, adapters: Mapping[str, float]) -> None:
        """The adapters that speak from now on, with their weights; {} is the base model, bit for bit."""
        if not adapters and self._adapters is None:
            return
        attached = self._adapter_set()
        self._formats.of(attached.folders(name for name, weight in adapters.items() if weight))
        attached.activate(adapters)
        self._settle_cache()

    def detach(self, name: str) -> None:
        """Forget an adapter. Raises UnknownModel if it is not attached."""
        self._adapter_set().detach(name)
        self._settle_cache(gone=name)

    def _settle_cache(self, gone: str | None = None) -> None:
        """A cache belongs to the adapters that it was computed with; `gone` is a name that now means something else."""
        attached = self._adapter_set()
        self._formats.active = self._formats.of(attached.folders(attached.active))
        self.sequences.switch(tuple(sorted(attached.active.items())), attached.variant)
        if gone is not None:
            self.sequences.drop(lambda name: any(adapter == gone for adapter, _ in cast(_Active, name)))
        self._wear()
        self._kernel = _kernels(self.model)

    def _wear(self) -> None:
        """The model computes with what is active; meanwhile it may have done so for an answer with other adapters."""
        self.model.wear(self.model.plain if self._adapters is None else self._adapters.variant)

    def _adapter_set(self) -> AdapterSet:
        if self._adapters is None:
            from glmchat.engine.adapters.attach import AdapterSet

            self._adapters = AdapterSet(self.model, self.checkpoint, self.device)
        return self._adapters

    # What is kept

    def keep_caches(self, limit: int, scope: str = "", idle_seconds: float = IDLE_SECONDS) -> None:
        """Keep the caches of conversations on the disk from now on, `limit` bytes of all together, and use them.

        A conversation is what `stream_tokens` is told as one; what has no name is never written. scope: who shares
        them. A file is used by engines that have all in common with the one that wrote it on which a number could
        depend.
        """
        types = [str(self.dtype), str(self.model.cache_dtype)]
        computed = [*types, self.plan.name, self._card, self.threads, self._kernel]
        environment = {name: value for name, value in os.environ.items() if name.startswith(_COMPUTES)}
        what = [scope, program_state(), versions(), self.checkpoint.config, *self._loaded, *computed, environment]

        def key(name: Hashable) -> str | None:
            digests = [self._digests.get(adapter) for adapter, _ in cast(_Active, name)]
            return None if None in digests else key_of([*what, name, digests])

        self.sequences.store = KVStore(key, limit, lambda: self.sequences.is_busy, idle_seconds)

    def leave(self, seconds: float = 0.0) -> None:
        """Nobody is here any more: write what is to be kept now; wait for that so long at most. From any thread."""
        if (store := self.sequences.store) is not None:
            store.hurry()
            if seconds:
                store.close(seconds)

    # What it is and costs

    def memory(self) -> dict[str, int]:
        """Bytes of weights, cache (reserved; touched as it fills) and adapters."""
        tensors = (*self.model.parameters(), *self.model.buffers())
        weights = sum(t.nbytes for t in {(t.device, t.data_ptr()): t for t in tensors}.values())
        adapters = self._adapters.nbytes if self._adapters is not None else 0
        return {"weights": weights, "cache": self.sequences.cache_bytes, "adapters": adapters}

    def facts(self) -> dict[str, Any]:
        """What the server tells of the model with every answer. From any thread: nothing is built or waited for."""
        return {
            "family": self.family,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.plan.name,
            **({"device_reason": self.plan.reason} if self.plan.reason else {}),
            **self._card,
            "threads": self.threads,
            "kernel": self._kernel,
            **({"products": self.products} if self.products else {}),
            **({"cache_type": self.model.cache_type} if self.model.cache_type else {}),
            "context": self.context,
            "load_ms": self.load_seconds * 1000,
            **(self.identity.facts() if self.identity is not None else {}),
            **({"template": self.template} if self._formats.active is not self._formats.own else {}),
        }

    def identify(self) -> None:
        """From now on `facts` tell by hashes what was loaded, once these are computed: see `identified`."""
        self.identity = Identity(self.checkpoint.path, self.template, self.asked_dtype)

    @property
    def identified(self) -> bool:
        """Whether `facts` hold all that they ever will; hashes of large files come long after the load."""
        return self.identity is None or self.identity.complete

    def close(self) -> None:
        """End the helper process that renders templates. The engine may still be used; it starts another."""
        self.leave(_LAST_SECONDS)
        self._formats.close()


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint without its weights; a folder of tokenizer files alone will do."""
    path = Path(folder).expanduser()
    if path.exists():
        try_vocabulary(path)
    if path.is_dir() and not (path / "config.json").is_file():
        return tokenizer_of_files(path)
    checkpoint = identify(path)
    return checkpoint.family.load_tokenizer(checkpoint.path, checkpoint.spec)


def _load_text(checkpoint: Checkpoint) -> tuple[Tokenizer | Damaged, PromptFormat | None]:
    try_vocabulary(checkpoint.path)
    try:
        tokenizer = checkpoint.family.load_tokenizer(checkpoint.path, checkpoint.spec)
    except Damaged as error:
        if error.code != "tokenizer.missing":
            raise
        return error, None  # said when text is asked for
    return tokenizer, checkpoint.family.prompt(checkpoint.path, tokenizer, checkpoint.spec)


def _room(spec: ModelSpec, asked: int | None) -> int:
    if asked is None:
        return min(spec.context, LONGEST_CONTEXT)
    if not 16 <= asked <= spec.context:
        raise Usage(
            tr("a context of {asked} tokens is not possible", asked=asked),
            hint=tr("this model takes 16 to {context}", context=spec.context),
            code="context.range",
        )
    return asked


def _kernels(model: LanguageModel) -> str:
    """Compile the step of the model as it is now, and name what multiplies, for `facts`."""
    names = kernels_in(model)
    if model.step() is not None:
        names.append("step")  # one token is one call (native/step.py)
    return "+".join(names) or "dense"
