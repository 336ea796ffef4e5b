"""Servers that the config names: what is read, what is refused, and that no key is shown.

Covers core/servers.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from glmchat.core.errors import Usage
from glmchat.core.servers import Server, find_server
from glmchat.core.settings import load_settings

KEY = "sk-secret-of-the-box"


def config(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(text)
    return path


def key_file(tmp_path: Path, mode: int = 0o600) -> Path:
    path = tmp_path / "box.key"
    path.write_text(KEY + "\n")
    path.chmod(mode)
    return path


def test_a_server_has_an_address_a_key_file_and_a_usual_model(tmp_path: Path) -> None:
    key = key_file(tmp_path)
    box = f'[servers.box]\nurl = "gpu-box:8000"\nkey_file = "{key}"\nmodel = "llama"\n'
    servers = load_settings(config(tmp_path, box + '[servers.other]\nurl = "http://o/v1"'), {}).servers
    assert servers["box"] == Server("box", "http://gpu-box:8000/v1", str(key), "llama")
    assert servers["box"].read_key() == KEY and KEY not in repr(servers)
    assert servers["other"].read_key() is None


@pytest.mark.parametrize(
    ("text", "at_fault"),
    [
        ("servers = 3", "servers"),
        ("[servers]\nbox = 3", "servers.box"),
        ("[servers.box]", "servers.box"),
        ("[servers.box]\nurl = 3", "servers.box.url"),
        ('[servers.box]\nurl = "ftp://x"', "servers.box.url"),
        ('[servers.box]\nurl = "http://user:pw@x/v1"', "servers.box.url"),
        ('[servers.box]\nurl = "http://x"\nkey = "sk-1"', "servers.box.key"),
        ('[servers.box]\nurl = "http://x"\nmodel = ""', "servers.box.model"),
        ('[servers."a b"]\nurl = "http://x"', "servers.a b"),
    ],
)
def test_a_bad_entry_is_refused_in_one_line_that_names_it_and_a_way_out(
    tmp_path: Path, text: str, at_fault: str
) -> None:
    with pytest.raises(Usage, match=at_fault) as refused:
        load_settings(config(tmp_path, text), {})
    assert refused.value.code == "config.server" and refused.value.hint
    assert "\n" not in refused.value.message
    assert not {"sk-1", "user:pw"} & {word for word in ("sk-1", "user:pw") if word in str(refused.value)}


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666])
def test_a_key_that_others_can_read_is_not_used(tmp_path: Path, mode: int) -> None:
    server = Server("box", "http://x/v1", str(key_file(tmp_path, mode)))
    with pytest.raises(Usage, match="can be read by others") as refused:
        server.read_key()
    assert refused.value.hint.startswith("chmod 600") and KEY not in str(refused.value)


def test_a_missing_key_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(Usage, match="absent"):
        Server("box", "http://x/v1", str(tmp_path / "absent.key")).read_key()


def test_a_name_is_looked_up_and_an_address_is_left_alone() -> None:
    servers = {"box": Server("box", "http://x/v1")}
    assert find_server("box", servers) == servers["box"]
    for address in ("http://box", "localhost", "gpu-box:8000", "127.0.0.1"):
        assert find_server(address, servers) is None
    assert find_server("anything", {}) is None
    with pytest.raises(Usage, match="no server bxo") as refused:
        find_server("bxo", servers)
    assert "box" in refused.value.hint
