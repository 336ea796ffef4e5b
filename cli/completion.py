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


def complete_installed(incomplete: str) -> list[str]:
    """Names of models on this machine alone, for what is done to one that is there."""
    from glmchat.core.errors import GlmchatError
    from glmchat.hub import aliases
    from glmchat.hub.lookup import list_installed

    try:
        names = [*(row.name for row in list_installed() if row.kind != "adapter"), *aliases.load()]
    except GlmchatError:  # completion has no place for a message
        return []
    return [name for name in dict.fromkeys(names) if name.lower().startswith(incomplete.lower())]


def complete_adapters(incomplete: str) -> list[str]:
    """Names of adapters in the store."""
    from glmchat.hub.adapters import list_adapters

    return [row.name for row in list_adapters() if row.name.startswith(incomplete)]


def complete_runs(incomplete: str) -> list[str]:
    """Runs of tuning."""
    from glmchat.core.run_folder import runs

    return [run.id for run in runs() if run.id.startswith(incomplete)]


def complete_evaluations(incomplete: str) -> list[str]:
    from glmchat.core.eval_folder import evaluations

    return [one.id for one in evaluations() if one.id.startswith(incomplete)]


def complete_here(incomplete: str) -> list[str]:
    """Models and adapters on this machine."""
    return [*complete_installed(incomplete), *complete_adapters(incomplete)]


def complete_conversations(incomplete: str) -> list[tuple[str, str]]:
    """Numbers of the last conversations, each with its title where the shell shows such."""
    from glmchat.chat.history.history import History
    from glmchat.core.errors import GlmchatError
    from glmchat.core.text import one_line

    try:
        with History.default() as history:
            rows = history.conversations(limit=50)
    except GlmchatError:
        return []
    return [(str(row.id), one_line(row.title or "", 60)) for row in rows if str(row.id).startswith(incomplete)]


def complete_themes(incomplete: str) -> list[str]:
    from glmchat.core.settings import THEMES

    return [name for name in THEMES if name.startswith(incomplete)]


def complete_columns(incomplete: str) -> list[str]:
    """A column of a comparison: models here, `+` adapters, `,` settings."""
    from glmchat.chat.compare.columns import completions, store_names
    from glmchat.core.errors import GlmchatError

    try:
        return completions(incomplete, store_names())
    except GlmchatError:  # completion has no place for a message
        return []
