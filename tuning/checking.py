"""What is refused of a run by its words and its rows alone: no tokenizer is read, and torch is not imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glmchat.checkpoints import gpt2
from glmchat.checkpoints.adapter_fit import CHATGLM
from glmchat.checkpoints.device_plan import plan_device
from glmchat.checkpoints.families import is_native
from glmchat.checkpoints.fit import config_at, has_chat, spec_at
from glmchat.checkpoints.spec import ModelSpec
from glmchat.core.cards import installed_torch, look
from glmchat.core.errors import GlmchatError, Usage
from glmchat.core.json_files import read_json
from glmchat.core.language import tr
from glmchat.core.messages import Message
from glmchat.core.text import one_line
from glmchat.engine.prompts.base import NO_VARIABLES, PromptFormat
from glmchat.tuning.formats import Form
from glmchat.tuning.options import DataOptions
from glmchat.tuning.page import Facts, FileFacts, kinds
from glmchat.tuning.pairs import read_pair
from glmchat.tuning.raw import Fault, Raw
from glmchat.tuning.recipes import Recipe
from glmchat.tuning.rows import RowFault, read_row
from glmchat.tuning.settings import ALL_LINEAR, targeted, targets_of
from glmchat.tuning.sources import Opened, Source, find_sources, form_of, share_of

_TIED = ("lm_head", "transformer.output_layer")  # heads that a file may leave out
_ENOUGH = 20  # rows that can be learned from: those behind them are read once, when they are tokenised


@dataclass(frozen=True, slots=True)
class Base:
    """What the files of a model tell. spec: its measures, None: they do not say. is_native: glmchat computes it."""

    family: str
    spec: ModelSpec | None
    has_chat: bool
    is_native: bool = True

    @staticmethod
    def at(path: Path) -> Base:
        """Of a folder or a GGUF file."""
        config, spec = config_at(path), spec_at(path)
        family = spec.family if spec is not None else str(config.get("model_type") or "")
        return Base(family, spec, has_chat(path), is_native(config))


def check_run(recipe: Mapping[str, Any]) -> None:
    """recipe: as it stands in recipe.json.

    Raises Usage for words that do not go together, with the model or with the data, and for data of which no row can be
    learned from; Damaged for a file that cannot be read.
    """
    options, method = DataOptions.of(recipe), str(recipe.get("method") or "lora")
    if "words" in recipe:
        config, words = read_gpt2(Path(recipe["config"])), Path(recipe["words"])
        base = Base("gpt2", gpt2.parse(config), words.is_dir() and has_chat(words))
    else:
        base = Base.at(Path(recipe["folder"]))
    refuse_family(base.family, method, is_native=base.is_native)
    original = options.recipe(base.family)
    if base.spec is not None:
        options.limit(original, base.spec.context)
        refuse_targets(recipe.get("targets"), base.spec)
    refuse_machine(recipe, is_whole=method in ("full", "scratch"))
    check_data(recipe["data"], options, original, has_chat=base.has_chat)


def read_gpt2(path: Path) -> dict[str, Any]:
    """The configuration of a model from scratch. Raises Usage for one of another network, or of none."""
    try:
        given = read_json(path)
        gpt2.parse(given)
    except GlmchatError as error:
        raise no_gpt2(error.message) from None
    if given.get("model_type", "gpt2") != "gpt2":
        raise Usage(
            tr("{path} is of a {kind}, and only a GPT-2 is made from scratch", path=one_line(str(path), 200),
               kind=one_line(str(given.get("model_type")), 40)),
            hint=tr("take a configuration of GPT-2: n_layer, n_head, n_embd, n_positions"),
            code="tune.config",
        )  # fmt: skip
    return given


def no_gpt2(why: str) -> Usage:
    """For a configuration that no network can be made of."""
    return Usage(
        tr("the configuration makes no GPT-2: {error}", error=one_line(why, 240)),
        hint=tr("a config.json of GPT-2: n_layer, n_head, n_embd, n_positions; n_embd is divided among n_head heads"),
        code="tune.config",
    )


def refuse_family(family: str, method: str, *, is_native: bool) -> None:
    """Raise Usage for a prefix or virtual tokens with which nobody could run the model: GLM-4's code has no place for a
    prefix, that of the other ChatGLMs none but THUDM's own."""
    if method not in ("prefix", "prompt"):
        return
    others = ("glm4",) if method == "prefix" else CHATGLM
    if is_native and family not in others:
        return
    raise Usage(
        tr("--method {method} does not know models of the family {family}", method=method, family=one_line(family)),
        hint=tr("--method lora fits every model")
        if family not in CHATGLM or family == "glm4"
        else tr("--method prefix learns P-Tuning v2 for it; --method lora fits every model"),
        code="tune.family",
    )


def refuse_targets(asked: Any, spec: ModelSpec) -> None:
    """Raise Usage for layers that a network whose tensors are known does not have."""
    if isinstance(asked, str) and asked != ALL_LINEAR and spec.layout is not None:
        names = [name.removesuffix(".weight") for name, shape in spec.shapes().items() if len(shape) == 2]
        packed = [name.replace(".weight", ".linear") for name in spec.ends()]  # the table of a quantised embedding
        targeted(targets_of(asked), [*names, *packed, *_TIED], spec.linear_shapes())


def refuse_machine(recipe: Mapping[str, Any], *, is_whole: bool) -> None:
    """Raise Usage for a card that this machine does not have, and for a type that its processor does not learn in."""
    device = recipe.get("device")
    if device == "cuda":
        plan_device(device, None, look(), installed_torch())
    if recipe.get("dtype") == "float16" and (is_whole or device == "cpu" or not look().visible):
        raise no_float16()


def no_float16() -> Usage:
    """For a run that was to learn in float16."""
    return Usage(
        tr("learning in float16 overflows, and a CPU computes it slowly"),
        hint=tr("take bfloat16 or float32; weights that lie in float16 are read as they are"),
        code="tune.dtype",
    )


def check_data(data: Sequence[str], options: DataOptions, original: Recipe | None, *, has_chat: bool) -> None:
    """Raises what a reading of these data would raise, as far as that takes no tokenizer. Of files in which rows can be
    learned from, only the first rows are read."""
    form = form_of(options.format, options.columns)
    sources = find_sources(data, mixes=options.mixes, evaluation=options.evaluation, form=form)
    opened = [source.opened() for source in sources]
    for source, file in zip(sources, opened, strict=True):
        if file.form.columns:
            require_form(file.form, str(source.path), options, original, has_chat=has_chat)
    facts, used = Facts(), 0
    for source, file in zip(sources, opened, strict=True):
        facts.files.append(FileFacts(str(source.path), "", source.use))
        if source.use != "train" or used < _ENOUGH:
            used += _used(source, file, options.system, facts) * (source.use == "train")
    require_rows(facts)
    share = share_of(options.evaluation or "")
    if share and used < _ENOUGH and used <= held_out(share, used):
        raise none_left(options.evaluation)


def held_out(share: float, rows: int) -> int:
    """How many of so many rows are held out."""
    return max(1, round(share * rows))


def none_left(share: str | None) -> Usage:
    """For a share that is held out and leaves no row to learn from."""
    return Usage(
        tr("{share} of the rows leave none to learn from", share=str(share)),
        hint=tr("hold out fewer, or name a file: --eval held.jsonl"),
        code="data.eval",
    )


def check_questions(data: Sequence[str], form: str | None, columns: Mapping[str, str], system: str | None) -> None:
    """Raises what a reading of rows to judge by would raise, as far as that takes no tokenizer."""
    sources = find_sources(data, form=form_of(form, columns))
    facts = Facts()
    for source in sources:
        facts.files.append(FileFacts(str(source.path), "", source.use))
        if _used(source, source.opened(), system, facts):
            return
    first = next((line for file in facts.files for what in facts.refused.values() for line in what.first
                  if line.startswith(f"{file.file}:")), None)  # fmt: skip
    raise no_questions(first, sources)


def no_questions(first: str | None, sources: Sequence[Source]) -> Usage:
    """For data of which no row can be used. first: what is wrong with the first one; None: the sources hold none."""
    reason = first or tr("{file} holds no rows", file=str(sources[0].path))
    return Usage(
        tr("no row can be used: {first}", first=one_line(reason, 300)),
        hint=tr("the rows hold questions and answers, pairs of answers, or texts; --columns names the fields"),
        code="data.nothing",
    )


class _AnyFormat(PromptFormat):
    """Takes whatever some family takes: a row that is faulty with it is faulty with every model."""

    takes_tools = True

    def __init__(self) -> None:
        """Without a tokenizer."""

    def render(self, messages: Sequence[Message], variables: Mapping[str, Any] = NO_VARIABLES) -> list[int]:
        raise NotImplementedError


def _used(source: Source, file: Opened, system: str | None, facts: Facts) -> int:
    """How many rows can be learned from, up to _ENOUGH; counted in the last of the facts' files, as faults are."""
    about, prompt = facts.files[-1], _AnyFormat()
    for row in file.rows:
        about.read += 1
        fault = row if isinstance(row, Fault) else _fault(row, file.form, prompt, system)
        if fault is None:
            about.used += 1
        else:
            about.refused += 1
            facts.refuse(fault)
        if about.used >= _ENOUGH:
            break
    return about.used


def _fault(row: Raw, form: Form, prompt: PromptFormat, system: str | None) -> Fault | None:
    read = read_pair if form.is_pairs else read_row
    try:
        read(row, form, prompt, system)
    except RowFault as fault:
        return fault.of(row)
    return None


def require_form(form: Form, file: str, options: DataOptions, original: Recipe | None, *, has_chat: bool) -> None:
    """Raise Usage for a form that this model, or what is asked for, cannot learn from at all."""
    name = one_line(file)
    if form.is_pairs and not options.pairs:
        of = next((part for part in ("messages", "prompt") if part in form.columns), None)
        columns = f"{of}={form.columns[of]}" if of is not None else "prompt=…"
        raise Usage(
            tr("{file} holds pairs of a better and a worse answer, and these are learned as answers", file=name),
            hint=tr(
                "learn what is preferred with --method dpo, or the better ones alone: "
                "--columns {columns},answer={chosen}",
                columns=columns,
                chosen=form.columns["chosen"],
            ),
            code="data.pairs",
        )
    if options.pairs and not form.is_pairs:
        raise Usage(
            tr("{file} holds no pairs of a better and a worse answer; its format is {form}", file=name,
               form=form.name),
            hint=tr("name the columns: --columns prompt=…,chosen=…,rejected=…, or leave out --method dpo"),
            code="data.no_pairs",
        )  # fmt: skip
    if original is not None and original.is_text != form.is_text:
        raise Usage(
            tr("--like {name} does not learn rows of the format {form}", name=original.name, form=form.name),
            hint=tr("it takes texts") if original.is_text else tr("it takes questions and answers"),
            code="data.recipe_rows",
        )
    if form.is_text:
        return
    if options.stride is not None:
        raise Usage(
            tr("--stride is of texts, and {file} holds questions and answers", file=name),
            hint=tr("leave out --stride, or name the column of the text: --columns text=…"),
            code="data.stride",
        )
    if options.on == "text":
        raise Usage(
            tr("{file} holds questions and answers, no texts", file=name),
            hint=tr("leave out --on text, or name the column of the text: --columns text=…"),
            code="data.text",
        )
    if not has_chat:
        raise Usage(
            tr("this model has no chat format, so it cannot learn the questions and answers of {file}", file=name),
            hint=tr('take its instruction-tuned sister, or give texts: rows with a field "text", or .txt files'),
            code="data.no_chat",
        )


def require_rows(facts: Facts) -> None:
    """Raise Usage where no row can be learned from, or none judged by, with the commonest reason and the first row that
    it befell."""
    judged = [file for file in facts.files if file.use == "eval"]
    is_taught = any(file.used for file in facts.files if file.use == "train")
    if is_taught and (not judged or any(file.used for file in judged)):
        return
    named = next(file.file for file in facts.files if not file.used and file.use == ("eval" if is_taught else "train"))
    commonest = sorted(facts.refused.values(), key=lambda what: -what.count)
    faults = (line for what in commonest for line in what.first if line.startswith(f"{named}:"))
    first = one_line(next(faults, tr("{file} holds no rows", file=named)), 300)
    words = kinds()
    reasons = ", ".join(f"{words.get(kind, kind)} ({what.count:,})" for kind, what in facts.refused.items())
    raise Usage(
        tr("no row can be judged by: {first}", first=first)
        if is_taught
        else tr("no row can be learned from: {first}", first=first),
        hint=tr("refused: {reasons}", reasons=reasons)
        if reasons
        else tr("for example: {example}", example='{"question": "…", "answer": "…"}'),
        code="data.nothing",
    )
