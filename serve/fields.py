"""What becomes of each field of a request beside the conversation: it is heard, harmless, or refused by name.

A client that believes it was heard is worse off than one that is told. So a field that would change the answer and is
not done is refused, unless its value asks for nothing; one that nobody knows is refused too, since it may be a wanted
field that was misspelt, as api.openai.com does. Fields that gateways and libraries send and that change no answer
(who asks, what is cached, which replica answers) are passed over: `HARMLESS`.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from glmchat.core.decoding import Decoding, Grammar, GrammarKind
from glmchat.core.errors import FieldError, Usage
from glmchat.core.kv_files import is_name
from glmchat.core.language import tr
from glmchat.core.messages import Sampling, check_template_variables
from glmchat.core.text import number_text, one_line
from glmchat.engine.decoding import form

COMPLETION_TOKENS = 16  # of a /v1/completions without max_tokens, as OpenAI's and vLLM's
MOST_CHOICES = 16
MOST_LOGPROBS = 20
_LARGEST_ID = 1 << 31

# Other names of our settings, the one that counts first: OpenAI's newer name of a limit beats its older one.
_SPELLINGS: Mapping[str, tuple[str, ...]] = {
    "max_tokens": (
        *("max_completion_tokens", "max_tokens", "max_new_tokens", "max_output_tokens"),
        *("n_predict", "num_predict"),
    ),
    "repetition_penalty": ("repetition_penalty", "repeat_penalty"),
    "stop": ("stop", "stop_strings"),
    "min_tokens": ("min_tokens", "min_new_tokens"),
}
_SAMPLING = tuple(item.name for item in fields(Sampling) if item.name != "template_variables")
_HEARD = frozenset(
    {
        *("model", "messages", "prompt", "stream", "stream_options", "return_token_ids", "adapters", "n", "best_of"),
        *("continue_final", "continue_final_message", "continue_token_ids", "add_generation_prompt"),
        *("logprobs", "top_logprobs", "logit_bias", "presence_penalty", "frequency_penalty", "stop_token_ids"),
        *("response_format", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs"),
        *("grammar", "json_schema", "regex", "ebnf"),
        "keep_as",
        *("chat_template_kwargs", "enable_thinking", "think", "thinking", "reasoning", "reasoning_effort"),
        *("thinking_budget", "thinking_token_budget", "reasoning_budget"),
        *_SAMPLING,
        *(name for names in _SPELLINGS.values() for name in names),
    }
)
HARMLESS = frozenset(
    {
        # who asks, and what is kept of it
        *("user", "user_id", "metadata", "store", "safety_identifier", "request_id", "session_id", "trace", "tags"),
        *("client_metadata", "extra_headers", "conversation_id", "chat_id", "id", "title"),
        # where and when it is computed
        *("service_tier", "priority", "provider", "route", "usage", "cache_prompt", "id_slot", "slot_id", "keep_alive"),
        *("cache_salt", "prompt_cache_key", "prompt_cache_retention", "prompt_cache_options", "data_parallel_rank"),
        *("routed_experts", "bootstrap_host", "bootstrap_port", "bootstrap_room", "rid", "n_keep", "num_ctx"),
        *("truncation_length", "num_thread", "num_gpu", "num_batch", "use_cache", "stream_interval", "timeout"),
        # what is told beside the answer, which is told anyway or has a field of its own
        *("timings_per_token", "return_progress", "return_tokens", "stream_include_usage", "response_fields"),
        *("return_tokens_as_token_ids", "logprob_start_len", "verbose", "return_as_token_ids"),
        *("spaces_between_special_tokens", "parallel_tool_calls", "stream_tool_calls", "tool_stream"),
        # halves of settings that are off: the other half switches them on, and is refused
        *("mirostat_tau", "mirostat_eta", "dry_base", "dry_allowed_length", "dry_penalty_last_n", "xtc_threshold"),
        *("dry_sequence_breakers", "dynatemp_exponent", "smoothing_curve", "length_penalty_decay", "temperature_last"),
        *("guided_decoding_backend", "min_keep", "watermark_enabled", "typical_min_keep"),
    }
)
# What is not done, and the values with which it asks for nothing.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "echo": (False,), "suffix": ("",), "raw": (False,), "images": ([],), "context": ([],),
    "tools": ([],), "functions": ([],), "tool_choice": ("none", "auto"), "function_call": ("none", "auto"),
    "modalities": (["text"], []), "audio": (), "prediction": (), "web_search": (False,), "web_search_options": (),
    "plugins": ([],), "transforms": ([],), "models": ([],), "documents": ([],), "data_sources": ([],),
    "verbosity": ("medium",), "options": ({},), "format": ("", "text"), "template": ("",), "system": ("",),
    "chat_template": (), "moderation": (), "truncate_prompt_tokens": (), "truncation": ("disabled", "auto"),
    "prompt_logprobs": (0, False), "n_probs": (0,), "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,), "add_special_tokens": (False,), "detokenize": (True,),
    "include_reasoning": (True,), "separate_reasoning": (False,), "reasoning_format": ("none", "auto"),
    "use_beam_search": (False,), "num_beams": (1,), "length_penalty": (1,), "early_stopping": (False,),
    "do_sample": (True,), "diversity_penalty": (0,), "num_beam_groups": (1,), "penalty_alpha": (0,),
    "mirostat": (0,), "mirostat_mode": (0,), "dry_multiplier": (0,), "xtc_probability": (0,),
    "typical_p": (1, 0), "typical": (1, 0), "typ_p": (1, 0), "tfs_z": (1, 0), "tfs": (1, 0), "top_a": (0,),
    "top_n_sigma": (-1, 0), "nsigma": (-1, 0), "eta_cutoff": (0,), "epsilon_cutoff": (0,), "smoothing_factor": (0,),
    "dynatemp_range": (0,), "dynamic_temperature": (False,), "repeat_last_n": (-1,), "penalty_range": (),
    "no_repeat_ngram_size": (0,), "encoder_repetition_penalty": (1,), "guidance_scale": (1,), "negative_prompt": ("",),
    "penalize_nl": (False,), "samplers": (), "sampler_seq": (), "sampler_priority": (), "bad_words": ([],),
    "banned_tokens": ([],), "custom_token_bans": ("",), "ban_eos_token": (False,), "allowed_token_ids": (),
    "logits_processors": ([],), "logits_bias": ({},), "lora": ([],), "speculative": (), "t_max_predict_ms": (0, -1),
    "n_indent": (0,), "prefix": (False, ""), "guided_whitespace_pattern": (), "structural_tag": (),
    "mm_processor_kwargs": ({},), "vllm_xargs": ({},), "custom_params": ({},), "kv_transfer_params": ({},),
    "extra_body": ({},), "repetition_detection": (),
}  # fmt: skip


_SEE = "see the OpenAI API reference for the form of a request"


def invalid(message: str, hint: str = _SEE, param: str | None = None) -> FieldError:
    return FieldError(message, hint=hint, code="request.invalid", param=param)


def unsupported(name: str, hint: str | None = None) -> FieldError:
    return FieldError(
        tr("{name} is not supported by glmchat", name=name),
        hint=hint or tr("leave the field out"),
        code="request.unsupported",
        param=name,
    )


def keep_as(data: Mapping[str, Any]) -> str | None:
    """The name under which a cache may be kept on the disk. It becomes part of a file's."""
    name = data.get("keep_as")
    if name is None or (isinstance(name, str) and is_name(name)):
        return name
    raise invalid("keep_as must be 32 hexadecimal digits", "leave the field out", "keep_as")


def refuse_unheard(data: Mapping[str, Any]) -> None:
    """Raises FieldError for the first field that would change the answer and is not done, or that nobody knows."""
    for name, value in data.items():
        if value is None or name in _HEARD or name in HARMLESS:
            continue
        if name not in _NEUTRAL:
            near = difflib.get_close_matches(name, (*_HEARD, *_NEUTRAL), 1, 0.8)
            raise FieldError(
                tr("glmchat does not know the field {name}", name=one_line(repr(name), 60)),
                hint=tr("did you mean {near}?", near=near[0]) if near else tr("leave the field out"),
                code="request.unknown_field",
                param=one_line(name, 60),
            )
        # True == 1 in Python, and a field that is off is off by its own kind of value
        if not any(value == off and isinstance(value, bool) is isinstance(off, bool) for off in _NEUTRAL[name]):
            raise unsupported(name)


def flag(data: Mapping[str, Any], name: str, where: str | None = None) -> bool:
    """where: the field's path, if it stands in another one."""
    value = data.get(name)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise invalid(f"{where or name} must be true or false", param=where or name)
    return value


def ids(data: Mapping[str, Any], name: str) -> tuple[int, ...]:
    value = data.get(name)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(type(i) is int and 0 <= i < _LARGEST_ID for i in value):
        raise invalid(f"{name} must be a list of token ids", param=name)
    return tuple(value)


def _number(value: Any, name: str, low: float, high: float) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
        raise invalid(f"{name} must be a number between {number_text(low)} and {number_text(high)}", param=name)
    return float(value)


def _whole(value: Any, name: str) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise invalid(f"{name} must be a whole number", param=name)
    return value


def _count(data: Mapping[str, Any], name: str, low: int, high: int) -> int | None:
    if data.get(name) is None:
        return None
    value = _whole(data[name], name)
    if not low <= value <= high:
        raise invalid(f"{name} is {one_line(str(value), 40)}, but it must be between {low} and {high}", param=name)
    return value


def spelt(data: Mapping[str, Any], field: str) -> tuple[str, Any]:
    """The name under which a client gave `field`, and its value; None where it did not."""
    names = _SPELLINGS.get(field, (field,))
    return next(((name, data[name]) for name in names if data.get(name) is not None), (field, None))


def sampling(data: Mapping[str, Any], defaults: Mapping[str, Any], *, max_tokens: int | None = None) -> Sampling:
    """The settings of one answer. defaults: of this server; max_tokens: where neither names a limit."""
    values: dict[str, Any] = {"max_tokens": max_tokens, **defaults}
    values["template_variables"] = {**defaults.get("template_variables", {}), **template_variables(data)}
    for field in _SAMPLING:
        name, value = spelt(data, field)
        if value is None:
            continue
        match field:
            case "stop":
                values[field] = _stop(value, name)
                continue
            case "ignore_eos":
                value = flag(data, name)
            case "top_k" | "seed" | "max_tokens":
                value = _whole(value, name)
                if field == "top_k" and value == -1:  # vLLM's way of switching it off
                    value = 0
                if field == "seed" and value < 0:  # llama-server's way of asking for a random one
                    continue
                if field == "max_tokens" and value == -1:  # LM Studio's and llama-server's way of asking for no limit
                    values[field] = defaults.get(field)
                    continue
            case _:
                if not isinstance(value, (int, float)) or isinstance(value, bool):
                    raise invalid(f"{name} must be a number", param=name)
                value = value if isinstance(value, int) and abs(value) > _LARGEST_ID else float(value)
        try:
            Sampling(**{field: value})
        except Usage as error:
            words = error.message if name == field else f"{name}: {error.message}"
            raise FieldError(words, hint=error.hint, code=error.code, param=name) from None
        values[field] = value
    return Sampling(**values)


def _stop(value: Any, name: str) -> tuple[str, ...]:
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(s, str) and s for s in value):
        raise invalid(f"{name} must be a text or a list of texts, none of them empty", param=name)
    if len(value) > 16:
        raise invalid(f"{name} holds more than 16 texts", param=name)
    return tuple(value)


def choices(data: Mapping[str, Any]) -> int:
    """How many answers are wanted. `best_of` would make more than it gives back, and judge them."""
    count = _count(data, "n", 1, MOST_CHOICES) or 1
    best = data.get("best_of")
    if best is not None and (isinstance(best, bool) or best not in (1, count)):
        raise unsupported("best_of", tr("leave the field out, or ask for all of them with n"))
    return count


def decoding(data: Mapping[str, Any], *, chat: bool) -> Decoding:
    """What looks at the whole row of logits: biases, penalties, log probabilities, ends, the form of the answer."""
    name, shortest = spelt(data, "min_tokens")
    return Decoding(
        logit_bias=_logit_bias(data.get("logit_bias")),
        presence_penalty=_number(data.get("presence_penalty") or 0, "presence_penalty", -2, 2),
        frequency_penalty=_number(data.get("frequency_penalty") or 0, "frequency_penalty", -2, 2),
        stop_token_ids=ids(data, "stop_token_ids"),
        min_tokens=0 if shortest is None else _count({name: shortest}, name, 0, 10_000_000) or 0,
        top_logprobs=_logprobs(data, chat=chat),
        grammar=_grammar(data),
        **_thinking_budget(data),
    )


def _logit_bias(value: Any) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(key.isascii() and key.isdecimal() and len(key) < 12 for key in value):
        raise invalid("logit_bias must be an object of token ids and numbers", '{"50256": -100}', "logit_bias")
    return {int(key): _number(bias, "logit_bias", -100, 100) for key, bias in value.items()}


def _logprobs(data: Mapping[str, Any], *, chat: bool) -> int | None:
    wanted = data.get("logprobs")
    if not chat:
        return None if wanted is None or wanted is False else _count(data, "logprobs", 0, MOST_LOGPROBS)
    top = _count(data, "top_logprobs", 0, MOST_LOGPROBS)
    if wanted is not None and not isinstance(wanted, bool) and wanted != 0:
        raise invalid("logprobs must be true or false", "top_logprobs says how many alternatives", "logprobs")
    if wanted is True:
        return top or 0
    if top:
        raise invalid("top_logprobs needs logprobs", 'send "logprobs": true as well', "top_logprobs")
    return None


_SCHEMA = '{"type": "object", "properties": {…}}'
_ANY_OBJECT = '{"type": "object"}'
_FORMS: Mapping[str, GrammarKind] = {  # vLLM's, SGLang's and llama-server's words for it
    "guided_json": "json_schema", "guided_regex": "regex", "guided_choice": "choice", "guided_grammar": "grammar",
    "json_schema": "json_schema", "regex": "regex", "ebnf": "grammar", "grammar": "grammar",
}  # fmt: skip
_STRUCTURED: Mapping[str, GrammarKind] = {
    "json": "json_schema", "regex": "regex", "choice": "choice", "grammar": "grammar",
}  # fmt: skip
_STRUCTURED_HARMLESS = ("disable_any_whitespace", "disable_additional_properties", "disable_fallback")


def _grammar(data: Mapping[str, Any]) -> Grammar | None:
    """The one form that the answer must have."""
    asked = [_form(data[name], kind, name) for name, kind in _FORMS.items() if data.get(name) not in (None, "")]
    asked += _response_format(data.get("response_format")) + _structured_outputs(data.get("structured_outputs"))
    if len(asked) > 1:
        raise invalid(
            f"{asked[0].param} and {asked[1].param} both say what the answer must look like",
            "send one of them",
            asked[1].param,
        )
    if asked and len(asked[0].text) > form.LARGEST:
        raise invalid(f"{asked[0].param} is longer than {form.LARGEST >> 10} kB", "ask for less", asked[0].param)
    return asked[0] if asked else None


def _form(value: Any, kind: GrammarKind, name: str) -> Grammar:
    if kind == "json_schema":
        schema = value if isinstance(value, str) else json.dumps(value)
        try:
            is_object = isinstance(json.loads(schema), dict)
        except (ValueError, RecursionError):
            raise invalid(f"{name} is not a JSON schema", _SCHEMA, name) from None
        if not is_object:
            raise invalid(f"{name} must be a JSON schema", _SCHEMA, name)
        return Grammar(kind, schema, name)
    if kind == "choice":
        if not isinstance(value, list) or not value or not all(isinstance(item, str) and item for item in value):
            raise invalid(f"{name} must be a list of texts", '["yes", "no"]', name)
        return Grammar(kind, json.dumps(value), name)
    if not isinstance(value, str) or not value:
        raise invalid(f"{name} must be a text", param=name)
    return Grammar(kind, value, name)


def _response_format(value: Any) -> list[Grammar]:
    """OpenAI's form. Together's and llama-server's `schema` beside the type is read too."""
    name = "response_format"
    if value is None:
        return []
    kind = value.get("type") if isinstance(value, dict) else None
    match kind:
        case "text":
            return []
        case "json_object":
            schema = value.get("schema")
            return [_form(_ANY_OBJECT if schema is None else schema, "json_schema", name)]
        case "json_schema":
            inner = value.get("json_schema", value)
            schema = inner.get("schema") if isinstance(inner, dict) else None
            if schema is None:
                raise invalid(
                    "response_format.json_schema.schema is missing",
                    '{"type": "json_schema", "json_schema": {"name": "answer", "schema": {…}}}',
                    name,
                )
            return [_form(schema, "json_schema", name)]
    raise invalid(f"response_format.type is {one_line(repr(kind), 60)}", "one of text, json_object, json_schema", name)


def _structured_outputs(value: Any) -> list[Grammar]:
    """vLLM's form: an object with one of json, regex, choice, grammar, json_object."""
    name = "structured_outputs"
    if value is None:
        return []
    if not isinstance(value, dict):
        raise invalid(f"{name} must be an object", '{"choice": ["yes", "no"]}', name)
    asked = []
    for key, item in value.items():
        if item is None or item is False or key in _STRUCTURED_HARMLESS:
            continue
        if key == "json_object":
            asked.append(_form(_ANY_OBJECT, "json_schema", name))
        elif key in _STRUCTURED:
            asked.append(_form(item, _STRUCTURED[key], name))
        else:
            raise unsupported(f"{name}.{one_line(key, 40)}")
    return asked


def _thinking_budget(data: Mapping[str, Any]) -> dict[str, Any]:
    """Of a `Decoding`: the budget and the field that told it; {} for none, as a negative one means. The names are
    Qwen's, vLLM's, llama-server's, OpenRouter's and Anthropic's."""
    reasoning, thinking = data.get("reasoning"), data.get("thinking")
    nested = {"reasoning.max_tokens": reasoning.get("max_tokens")} if isinstance(reasoning, dict) else {}
    if isinstance(thinking, dict) and thinking.get("type") != "disabled":
        nested["thinking.budget_tokens"] = thinking.get("budget_tokens")
    for name, value in {**{n: data.get(n) for n in _BUDGETS}, **nested}.items():
        if value is not None:
            return {} if (count := _whole(value, name)) < 0 else {"thinking_budget": count, "budget_param": name}
    return {}


_BUDGETS = ("thinking_budget", "thinking_token_budget", "reasoning_budget")


def template_variables(data: Mapping[str, Any]) -> dict[str, Any]:
    """What the model's chat template is told beside the conversation: `chat_template_kwargs` (vLLM, SGLang), and the
    fields that other servers have for the same: `enable_thinking`, `think` (Ollama), `thinking` (GLM, DeepSeek),
    `reasoning` (OpenRouter), `reasoning_effort` (OpenAI).
    """
    variables: dict[str, Any] = {}
    for field in _TOLD_IN:
        if (value := data.get(field)) is not None:
            variables |= _told_in(field, data, value)
    return variables


def fields_of_variables(data: Mapping[str, Any]) -> dict[str, str]:
    """The field in which a client told each of the `template_variables`: what is wrong with one is said of it."""
    fields: dict[str, str] = {}
    for field in _TOLD_IN:
        if (value := data.get(field)) is not None:
            fields |= dict.fromkeys(_told_in(field, data, value), field)
    return fields


def unread_variable(error: FieldError, fields: Mapping[str, str]) -> FieldError:
    """The refusal of a template variable, said of the field that told it. Other errors come back as they are."""
    if error.code != "template.variable":
        return error
    field = next((fields[name] for name in error.names if name in fields), _KWARGS)
    words = error.message if field in (_KWARGS, *error.names) else f"{field}: {error.message}"
    return FieldError(words, hint=error.hint, code=error.code, param=field)


_KWARGS = "chat_template_kwargs"
_TOLD_IN = ("enable_thinking", "think", "thinking", "reasoning", "reasoning_effort", _KWARGS)  # a later one counts


def _told_in(field: str, data: Mapping[str, Any], value: Any) -> dict[str, Any]:
    match field:
        case "enable_thinking" | "think":
            return {"enable_thinking": flag(data, field)}
        case "thinking" | "reasoning":
            return _thinking(value, field)
        case "reasoning_effort":
            return _effort(value, field)
    if not isinstance(value, dict):
        raise invalid(f"{field} must be an object", '{"enable_thinking": false}', field)
    try:
        check_template_variables(value)
    except Usage as error:
        raise FieldError(error.message, hint=error.hint, code=error.code, param=field) from None
    return dict(value)


def _thinking(value: Any, name: str) -> dict[str, Any]:
    if isinstance(value, bool):
        return {"enable_thinking": value}
    if isinstance(value, dict):
        if value.get("type") in ("enabled", "disabled", "auto", "adaptive") and set(value) <= _KINDS_OF_THINKING:
            keeps = value.get("clear_thinking")
            told = {} if keeps is None else {"clear_thinking": flag(value, "clear_thinking", f"{name}.clear_thinking")}
            return (
                told
                if value["type"] in ("auto", "adaptive")
                else {"enable_thinking": value["type"] == "enabled", **told}
            )
        switch = {} if value.get("enabled") is None else {"enable_thinking": flag(value, "enabled", f"{name}.enabled")}
        effort = {} if value.get("effort") is None else _effort(value["effort"], name)
        if set(value) <= {"enabled", "effort", "max_tokens", "exclude", "summary", "generate_summary"}:
            return {**switch, **effort}
    raise invalid(f"{name} is of no form that glmchat knows", '{"type": "disabled"}', name)


_KINDS_OF_THINKING = {"type", "budget_tokens", "clear_thinking"}  # of Anthropic, DeepSeek and GLM


def _effort(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, str):
        raise invalid(f"{name} must be a text", '"low", "medium", "high" or "none"', name)
    return {"enable_thinking": False} if value == "none" else {"reasoning_effort": value}
