"""Where files are kept, for a user who has no home too."""

from __future__ import annotations

import pytest

from glmchat.core import locations
from glmchat.core.errors import Failed


def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container that runs as a bare number."""
    for name in ("HOME", "GLMCHAT_HOME", "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name in ("XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: (_ for _ in ()).throw(KeyError(uid)))


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    homeless(monkeypatch)
    for place in (locations.config_dir, locations.data_dir, locations.state_dir, locations.hf_cache):
        with pytest.raises(Failed, match="home"):
            place()


def test_two_variables_are_enough_for_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    homeless(monkeypatch)
    monkeypatch.setenv("GLMCHAT_HOME", "/srv/glmchat")
    monkeypatch.setenv("HF_HOME", "/srv/hf")
    assert str(locations.data_dir()) == "/srv/glmchat/data"
    assert str(locations.hf_cache()) == "/srv/hf/hub"
