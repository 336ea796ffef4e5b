"""A model that learned here comes into the store whole, under a name that nothing else has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from glmchat.core import locations
from glmchat.core.errors import UnknownModel, Usage
from glmchat.hub import lookup, references, removal, trained_models
from glmchat.hub.trained_models import keep


def model(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 64}))
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    return folder


def test_it_is_found_by_its_name_and_tells_how_it_learned(tmp_path: Path) -> None:
    row = keep(model(tmp_path / "made"), "poet", "smollm2", {"run": "poet", "steps": 3})
    assert not (tmp_path / "made").exists()
    found = lookup.find_installed(references.parse("poet"))
    assert found is not None
    assert (found.name, found.kind, found.base, found.quant) == ("poet", "model", "smollm2", "none")
    assert found.complete
    assert found.path == row.path == locations.models_dir() / "poet"
    note = json.loads((row.path / "glmchat.json").read_text())
    assert note["trained"] == {"run": "poet", "steps": 3}
    assert all(len(file["sha256"]) == 64 for file in note["files"])
    (row.path / "model.safetensors").unlink()
    with pytest.raises(UnknownModel):
        lookup.find_installed(references.parse("poet"))


def test_a_name_of_a_model_an_alias_or_the_catalogue_is_taken(tmp_path: Path) -> None:
    keep(model(tmp_path / "made"), "poet", None, {})
    assert trained_models.unused_name("poet") == "poet-2"
    assert trained_models.unused_name("Poet") == "Poet-2"
    assert trained_models.unused_name("fresh") == "fresh"
    for name in ("poet", "POET", "smollm2", "chatglm-6b"):
        with pytest.raises(Usage):
            trained_models.free_name(name)
    for name in ("../x", "a/b", ".hidden", ""):
        with pytest.raises(Usage):
            trained_models.free_name(name)


def test_a_store_on_another_disk_takes_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    folder, whole = model(tmp_path / "made"), Path.replace

    def replace(self: Path, target: Path) -> Path:
        if self == folder:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return whole(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    row = keep(folder, "poet", None, {})
    assert {path.name for path in row.path.iterdir()} == {"config.json", "model.safetensors", "glmchat.json"}
    assert not folder.exists()


def test_it_is_removed_by_its_name(tmp_path: Path) -> None:
    row = keep(model(tmp_path / "made"), "poet", None, {})
    removal.execute(removal.plan_removal([row]))
    assert not row.path.exists()
