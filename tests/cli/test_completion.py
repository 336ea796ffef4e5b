"""`--show-completion SHELL` and `--install-completion SHELL`: the shell that was named, whichever one this runs in."""

from __future__ import annotations

from pathlib import Path

import pytest

from glmchat.cli.main import run


@pytest.mark.parametrize(
    ("shell", "sign"),
    [
        ("bash", "complete -o default -F _glmchat_completion glmchat"),
        ("zsh", "#compdef glmchat"),
        ("fish", "complete --command glmchat"),
        ("pwsh", "Register-ArgumentCompleter"),
    ],
)
def test_the_script_is_for_the_shell_that_was_named(shell: str, sign: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--show-completion", shell]) == 0
    assert sign in (out := capsys.readouterr().out) and "_GLMCHAT_COMPLETE" in out


def test_only_the_files_of_the_named_shell_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run(["--install-completion", "tcsh"]) == 2 and "fish" in capsys.readouterr().err
    assert run(["--install-completion", "fish"]) == 0
    (written,) = (p for p in tmp_path.rglob("*") if p.is_file())
    assert written.name == "glmchat.fish" and str(written) in capsys.readouterr().err
