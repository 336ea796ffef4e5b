"""What the shell completes: names of models and adapters, fast, without any hub. And the scripts that ask for it."""

from __future__ import annotations

from collections.abc import Sequence

_OPTIONS = ("--show-completion", "--install-completion")
_SHELLS = ("bash", "zsh", "fish", "powershell", "pwsh")


def named_shell(arguments: Sequence[str]) -> bool:
    """`--show-completion SHELL` or `--install-completion SHELL`: done here. True if it was that.

    Typer's own options take no name: they look at the process that started this one. Raises Usage for another shell.
    """
    if len(arguments) != 2 or arguments[0] not in _OPTIONS or arguments[1].startswith("-"):
        return False
    from typer._completion_shared import get_completion_script, install

    from glmchat.cli import output
    from glmchat.core.errors import Usage
    from glmchat.core.language import tr
    from glmchat.core.text import one_line

    option, shell = arguments
    if shell not in _SHELLS:
        raise Usage(
            tr("there is no completion for {name}", name=repr(one_line(shell, 40))),
            hint=", ".join(_SHELLS),
            code="usage.value",
        )
    if option == "--show-completion":
        output.data(get_completion_script(prog_name="glmchat", complete_var="_GLMCHAT_COMPLETE", shell=shell))
    else:
        _, path = install(shell, prog_name="glmchat")
        where = one_line(str(path))
        output.say(tr("completion for {name} is in {path}: open a new terminal", name=shell, path=where))
    return True


def complete_models(incomplete: str) -> list[str]:
    """Names that begin with what was typed: models here, aliases, the catalogue's."""
    from glmchat.hub.lookup import complete_names

    return complete_names(incomplete)


def complete_columns(incomplete: str) -> list[str]:
    """A column of a comparison: models here, `+` adapters, `,` settings."""
    from glmchat.chat.compare.columns import completions, store_names
    from glmchat.core.errors import GlmchatError

    try:
        return completions(incomplete, store_names())
    except GlmchatError:  # completion has no place for a message
        return []
