"""What the fields of a row are called: by the authors of formats, and by a person who says it.

A format is recognised by the keys of a file's first rows; the table below is all that is known of names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from glmchat.core.errors import Usage
from glmchat.core.language import tr
from glmchat.core.text import one_line
from glmchat.tuning.raw import Raw

# What a column is for. `query` is added to the prompt behind a newline, as in Alpaca's `input`.
PARTS = ("prompt", "query", "answer", "history", "system", "tools", "messages", "chosen", "rejected", "text")


@dataclass(frozen=True, slots=True)
class Tags:
    """Names inside a list of messages."""

    role: str = "role"
    content: str = "content"
    roles: Mapping[str, str] = field(default_factory=dict)  # a file's word -> user, assistant, tool, system, call


@dataclass(frozen=True, slots=True)
class Form:
    """name: what people call the format. columns: part -> the file's key; those of `needs` stand in every row."""

    name: str
    columns: Mapping[str, str]
    needs: tuple[str, ...]
    tags: Tags = Tags()

    @property
    def is_text(self) -> bool:
        return "text" in self.columns

    @property
    def is_pairs(self) -> bool:
        return "chosen" in self.columns


UNKNOWN = Form("", {}, ())
_ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "model"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function"), "tool"),
    **dict.fromkeys(("system", "developer"), "system"),
    "function_call": "call",
}
OPENAI = Tags(roles=_ROLES)
SHAREGPT = Tags("from", "value", _ROLES)


def _form(name: str, needs: Mapping[str, str], tags: Tags, other: Mapping[str, str]) -> Form:
    """other: what may be there too."""
    return Form(name, {**needs, **other}, tuple(needs), tags)


def _asked(name: str, prompt: str, answer: str, **other: str) -> Form:
    more = {"history": "history", "system": "system", **other}
    return _form(name, {"prompt": prompt, "answer": answer}, OPENAI, more)


_PAIR = {"chosen": "chosen", "rejected": "rejected"}
_LIST = {"system": "system", "tools": "tools"}
_MORE = {"history": "history", "system": "system"}
FORMS: Mapping[str, Form] = {
    form.name: form
    for form in (
        _form("ranking", {"messages": "conversations", **_PAIR}, SHAREGPT, _LIST),
        _form("ranking-alpaca", {"prompt": "instruction", **_PAIR}, OPENAI, {"query": "input", **_MORE}),
        _form("ranking-pairs", {"prompt": "prompt", **_PAIR}, OPENAI, _MORE),
        _form("ranking-qa", {"prompt": "question", **_PAIR}, OPENAI, _MORE),
        _form("ranking-openai", {"messages": "messages", **_PAIR}, OPENAI, _LIST),
        _form(
            "preferences-openai",
            {"messages": "input", "chosen": "preferred_output", "rejected": "non_preferred_output"},
            OPENAI,
            {},
        ),
        _form("ranking-whole", _PAIR, OPENAI, _LIST),
        _form("sharegpt", {"messages": "conversations"}, SHAREGPT, _LIST),
        _form("openai", {"messages": "messages"}, OPENAI, _LIST),
        _asked("alpaca", "instruction", "output", query="input", tools="tools"),
        _asked("qa", "question", "answer"),
        _asked("adgen", "content", "summary"),
        _asked("chatglm", "prompt", "response"),
        _asked("completion", "prompt", "completion"),
        _asked("query", "query", "response"),
        _asked("问答", "问题", "答案"),
        _asked("问答2", "问题", "回答"),
        _asked("pairs", "input", "output"),
        _form("text", {"text": "text"}, OPENAI, {}),
    )
}


def with_columns(columns: Mapping[str, str]) -> Form:
    """A form by names that a person or a dataset_info.json gives: part -> key. Raises Usage for an unknown part."""
    unknown = sorted(set(columns) - set(PARTS))
    if unknown:
        raise Usage(
            tr("there is no part {part} in a row of data", part=one_line(repr(unknown[0]), 40)),
            hint=tr("the parts are {names}", names=", ".join(PARTS)),
            code="data.columns",
        )
    given = {part: key for part, key in columns.items() if key}
    optional = ("query", "history", "system", "tools")
    needs = tuple(part for part in given if part not in optional)
    is_half = len({"chosen", "rejected"} & given.keys()) == 1
    if is_half or (not {"prompt", "answer"} <= given.keys() and not {"messages", "text", "chosen"} & given.keys()):
        raise Usage(
            tr("the columns do not say what is asked and what is answered"),
            hint=tr("for example --columns prompt=question,answer=reply"),
            code="data.columns",
        )
    return Form("columns", given, needs, OPENAI)


def recognise(rows: Sequence[Raw], file: str) -> Form:
    """The form of a file by the keys of its first rows. Raises Usage that names the keys it has."""
    keyed = [row.value for row in rows if isinstance(row.value, dict)]
    for value in keyed:
        for form in FORMS.values():
            if all(form.columns[part] in value for part in form.needs):
                return with_tags(form, rows)
    for row in rows:
        if isinstance(row.value, list) and row.value and all(isinstance(item, dict) for item in row.value):
            return with_tags(Form("messages", {"messages": ""}, ("messages",), OPENAI), rows)
    keys = list(dict.fromkeys(str(key) for value in keyed[:3] for key in value))
    first, second = (*(key for key in keys if key.isidentifier()), "…", "…")[:2]
    raise Usage(
        tr(
            "{file}: no known format has the keys {keys}",
            file=one_line(file),
            keys=one_line(", ".join(keys), 120) or tr("none"),
        ),
        hint=tr(
            "say which is which: --columns prompt={first},answer={second}  (or messages=…, or text=…)",
            first=one_line(first, 40),
            second=one_line(second, 40),
        ),
        code="data.format",
    )


def with_tags(form: Form, rows: Sequence[Raw]) -> Form:
    """ShareGPT's names in a field that OpenAI's are usual in, and the other way round (ChatGLM3's demo)."""
    key = form.columns.get("messages")
    for row in rows if key is not None else ():
        listed = row.value if not key else row.value.get(key) if isinstance(row.value, dict) else None
        if isinstance(listed, list) and listed and isinstance(listed[0], dict):
            known = (form.tags, SHAREGPT, OPENAI)
            return replace(form, tags=next((tags for tags in known if tags.role in listed[0]), form.tags))
    return form
