"""The words of a conversation, spoken by every layer: messages, sampling, and what a stream says."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from glmchat.core.errors import Usage
from glmchat.core.language import tr
from glmchat.core.text import number_text, one_line

Role = Literal["system", "user", "assistant", "tool", "observation"]
FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True)
class Message:
    role: str
    content: str
    name: str | None = None  # the tool's name, in a turn that calls one or brings its result
    tools: tuple[Mapping[str, Any], ...] | None = None  # offered by a system message: ChatGLM3's and GLM-4's own form

    def to_json(self) -> dict[str, Any]:
        data: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.name is not None:
            data["name"] = self.name
        return data if self.tools is None else {**data, "tools": list(self.tools)}

    @staticmethod
    def from_json(item: Mapping[str, Any]) -> Message:
        """A message as a file or the API gives it; `metadata` is what ChatGLM3 calls a tool's name.

        Raises ValueError that names the field that is missing or of another kind.
        """
        values: dict[str, Any] = {key: item.get(key) for key in ("role", "content", "name", "metadata", "tools")}
        for key, kind in (("role", str), ("content", str), ("name", str | None), ("metadata", str | None)):
            if not isinstance(values[key], kind):
                raise ValueError(key)
        tools = values["tools"]
        if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
            raise ValueError("tools")
        name = values["metadata"] or values["name"]
        return Message(values["role"], values["content"], name, None if tools is None else tuple(tools))


@dataclass(frozen=True, slots=True)
class Sampling:
    """How an answer is made: how the next token is chosen, where it ends, and what the chat template is told.

    temperature 0 is argmax and nothing else is looked at.
    top_k 0, top_p 1.0, min_p 0.0 and repetition_penalty 1.0 switch their filter off.
    max_tokens None: the smaller of 2,048 and what is left of the context.
    """

    temperature: float = 0.95
    top_k: int = 0
    top_p: float = 0.7
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    # What the chat template is told by name, as `enable_thinking`; values are plain JSON.
    template_variables: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        check_template_variables(self.template_variables)
        for name, low, high in SAMPLING_RANGES:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:  # NaN fails the comparison too
                raise Usage(
                    tr(
                        "{name} is {value}, but it must be between {low} and {high}",
                        name=name,
                        value=one_line(str(value), 40),
                        low=number_text(low),
                        high=number_text(high),
                    ),
                    hint=tr("for example {name} {low:g}", name=name, low=max(low, min(high, 0.8 if high < 10 else 40))),
                    code="sampling.range",
                )

    def to_json(self) -> dict[str, Any]:
        """For the record of an answer: template variables only where somebody set one."""
        data = {item.name: getattr(self, item.name) for item in fields(self)}
        return data if self.template_variables else {k: v for k, v in data.items() if k != "template_variables"}


# What the templates of thinking models are told; `/set` takes these names as they are.
THINKING_VARIABLES = ("enable_thinking", "thinking", "thinking_budget", "reasoning_effort")
# The names of a template's own arguments, which nobody may set beside the conversation.
_TEMPLATE_ARGUMENTS = frozenset({"messages", "tools", "add_generation_prompt", "raise_exception", "strftime_now"})


def check_template_variables(variables: Mapping[str, Any]) -> None:
    """Raise Usage for a name that no template could read, or that is the conversation's own."""
    for name in variables:
        if not name.isidentifier() or name in _TEMPLATE_ARGUMENTS:
            raise Usage(
                tr("a chat template has no variable {name} to set", name=one_line(repr(name), 60)),
                hint=tr("for example enable_thinking=false"),
                code="sampling.template_variables",
            )


SAMPLING_RANGES: tuple[tuple[str, float, float], ...] = (
    ("temperature", 0.0, 5.0),
    ("top_k", 0, 1_000_000),
    ("top_p", 0.0, 1.0),
    ("min_p", 0.0, 1.0),
    ("repetition_penalty", 0.1, 10.0),
    ("seed", 0, 2**63 - 1),
    ("max_tokens", 1, 10_000_000),
)
# The names users know from other tools, and ours.
SAMPLING_ALIASES: Mapping[str, str] = {
    "temp": "temperature",
    "num_predict": "max_tokens",
    "max_new_tokens": "max_tokens",
    "n_predict": "max_tokens",
    "repeat_penalty": "repetition_penalty",
    "penalty": "repetition_penalty",
    "chat_template_kwargs": "template_variables",
}


def sampling_name(word: str) -> str:
    """ "top-p", "temp", "num_predict" -> the field of `Sampling`. Raises Usage for any other word."""
    name = word.strip().lower().replace("-", "_")
    name = SAMPLING_ALIASES.get(name, name)
    names = [f.name for f in fields(Sampling)]
    if name not in names:
        raise Usage(
            tr("there is no sampling setting {word!r}", word=word),
            hint=tr("known names: {names}", names=", ".join(n for n in names if n != "ignore_eos")),
            code="sampling.unknown",
        )
    return name


def parse_sampling_value(name: str, text: str) -> Any:
    """The value of one setting from what a person typed. Raises Usage with the expected form."""
    try:
        match name:
            case "top_k":
                return minus_one(name, int(text))
            case "seed" | "max_tokens":
                return None if text.lower() in ("none", tr("none"), "off", "auto", "") else minus_one(name, int(text))
            case "stop":
                return tuple(text.split("|")) if text else ()
            case "template_variables":
                return parse_template_variables([text] if text.lstrip().startswith("{") else shlex.split(text))
            case "ignore_eos":
                return {"true": True, "on": True, "1": True, "false": False, "off": False, "0": False}[text.lower()]
            case _:
                return float(text)
    except (ValueError, KeyError):
        raise Usage(
            tr("{name} cannot be {text!r}", name=name, text=text),
            hint=tr("for example enable_thinking=false")
            if name == "template_variables"
            else tr("give a number, for example /set {name} 0.8", name=name),
            code="sampling.value",
        ) from None


def minus_one(name: str, value: Any) -> Any:
    """What -1 means to other programs: no limit (LM Studio, llama.cpp), a seed drawn anew, no top-k (vLLM)."""
    return {"max_tokens": None, "seed": None, "top_k": 0}.get(name, value) if value == -1 else value


def parse_template_variables(texts: Sequence[str]) -> dict[str, Any]:
    """Each "enable_thinking=false" or a JSON object -> the variables. Raises ValueError with what is neither."""
    variables: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if text.lstrip().startswith("{"):
            try:
                variables |= json.loads(text)
            except ValueError:
                raise ValueError(text) from None
        elif equals:
            variables[name.strip()] = template_value(value)
        else:
            raise ValueError(text)
    return variables


def template_value(text: str) -> Any:
    """What a person typed as a template's variable: on, off and JSON's own words, else the text itself."""
    words = {"on": True, "yes": True, "off": False, "no": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return json.loads(text.lower() if text.lower() in ("true", "false", "null") else text)
    except ValueError:
        return text


@dataclass(frozen=True, slots=True)
class Started:
    """First event of an answer. What a server does not send is None, never guessed."""

    model: str | None = None
    prompt_ids: tuple[int, ...] | None = None
    prompt_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """Whole characters of the answer, and the ids they came from."""

    text: str
    token_ids: tuple[int, ...] = ()
    # With the first piece, what our own server tells of the answer: a stopped one has no last event that could. With a
    # later one again, if the weights had not been hashed yet.
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Finished:
    """Last event of an answer. Times in seconds, speeds in tokens per second."""

    finish_reason: FinishReason | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    ttft_seconds: float | None = None
    prefill_tokens_per_second: float | None = None
    decode_tokens_per_second: float | None = None
    load_seconds: float | None = None
    seed: int | None = None
    facts: Mapping[str, Any] = field(
        default_factory=dict
    )  # the server's `glmchat` object: quant, revision, adapters, kernel…


StreamEvent = Started | Piece | Finished
