"""The chat template of a checkpoint: where it stands, whether it can be read, and which variables it listens to.

Nothing of it runs here: jinja2 reads its syntax, and only the engine's helper process renders it (docs/decisions/0005).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from glmchat.checkpoints.gguf_file import open_gguf
from glmchat.core.errors import Damaged, FieldError, Hostile, Usage
from glmchat.core.files import TooLarge, read_text, unreadable
from glmchat.core.json_files import read_json
from glmchat.core.language import tr
from glmchat.core.text import one_line

LARGEST = 2**20  # characters
_LONG = 2**17  # what is longer is left to the helper process, which has a clock
FILE = "chat_template.jinja"
# What every template is given (engine/prompts/template_process.py); nobody sets these by hand.
_GIVEN = frozenset({
    "messages", "add_generation_prompt", "tools", "bos_token", "eos_token", "unk_token", "pad_token", "sep_token",
    "cls_token", "mask_token", "raise_exception", "strftime_now", "range", "dict", "lipsum", "cycler", "joiner",
    "namespace",
})  # fmt: skip


def template_of(path: Path) -> str | None:
    """The template of a Hugging Face folder or of a GGUF file; None: it has none. Raises Damaged, Hostile.

    chat_template.jinja wins over tokenizer_config.json; of several named templates `default` is taken.
    """
    if path.is_file():
        source = open_gguf(path).metadata.get("tokenizer.chat_template")
        return source if isinstance(source, str) else None
    file, settings = path / FILE, path / "tokenizer_config.json"
    if file.is_file():
        try:
            return read_text(file, LARGEST, errors="replace")
        except TooLarge:
            raise too_large() from None
        except OSError as error:
            raise unreadable(file, error) from None
    source = read_json(settings).get("chat_template") if settings.is_file() else None
    if isinstance(source, list):
        templates = (item for item in source if isinstance(item, Mapping) and item.get("name") == "default")
        source = next(templates, {}).get("template")
    return source if isinstance(source, str) else None


def too_large() -> Hostile:
    return Hostile(
        tr("the chat template is larger than 1 MB"),
        hint=tr("it comes with the model: fetch it again, or use --complete"),
        code="template.size",
    )


def check_template(source: str) -> None:
    """Raise Damaged for a text that is no Jinja, in the words with which rendering would fail."""
    _parsed(source)


def variables_of(source: str) -> frozenset[str] | None:
    """The names that a template looks up and that a person may set; None where it is too long to tell."""
    from jinja2.meta import find_undeclared_variables

    tree = _parsed(source)
    return None if tree is None else frozenset(find_undeclared_variables(tree)) - _GIVEN


def extensions() -> list[Any]:
    """The tags that chat templates use beside jinja2's own."""
    from jinja2 import ext, nodes

    class Generation(ext.Extension):
        """`{% generation %}` marks what the assistant said, for training; here it is only its content."""

        tags = {"generation"}  # noqa: RUF012 - jinja2's own interface

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    return [Generation, "jinja2.ext.loopcontrols"]


def _parsed(source: str) -> Any:
    from jinja2 import Environment, TemplateSyntaxError

    if len(source) > _LONG:
        return None
    try:
        return Environment(trim_blocks=True, lstrip_blocks=True, extensions=extensions()).parse(source)  # noqa: S701
    except TemplateSyntaxError as error:
        raise broken_template(f"{type(error).__name__}: {error}") from None
    except RecursionError:
        return None


def broken_template(words: str) -> Damaged:
    """The error for a template that does not compile or that fails."""
    return Damaged(
        tr("the model's chat template is broken: {words}", words=one_line(words)),
        hint=tr("it comes with the model: fetch it again, or use --complete"),
        code="template.broken",
    )


def unheard(names: Collection[str], known: Collection[str]) -> FieldError:
    """The error for variables that a chat format never looks at. known: those that it does."""
    listed = ", ".join(sorted(known))
    return FieldError(
        tr("this model's chat format does not read {names}", names=one_line(", ".join(sorted(names)), 200)),
        hint=tr("it reads {names}", names=one_line(listed, 400))
        if listed
        else tr("it reads none: leave it out; in the chat, /reset template_variables"),
        code="template.variable",
        param="chat_template_kwargs",
        names=tuple(sorted(names)),
    )


def no_template() -> Usage:
    """The error for a question to a model that has no chat format."""
    return Usage(
        tr("this model has no chat template: it completes text"),
        hint=tr("use `glmchat run --complete` or /complete, or pull an instruction-tuned model"),
        code="prompt.no_template",
    )
