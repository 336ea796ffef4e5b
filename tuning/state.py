"""Checkpoints of a run that are whole or not there: written beside, brought to the disk, renamed.

A checkpoint is a folder `step-00000120`: what was learned, as its method saves it, the optimiser's moments, torch's
generator, and state.json with the position and the hash of every other file. No pickle anywhere.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from glmchat.core.errors import Damaged, DoesNotFit, GlmchatError
from glmchat.core.files import sync
from glmchat.core.fingerprints import sha256_of
from glmchat.core.json_files import read_json
from glmchat.core.language import tr
from glmchat.core.text import human_bytes, one_line
from glmchat.tuning.pieces import cut_as

CHECKPOINTS = "checkpoints"  # their folder in that of the run
STATE, OPTIMISER, GENERATOR = "state.json", "optimiser.safetensors", "generator.safetensors"
_NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True, slots=True)
class Saved:
    """A whole checkpoint. position: as `save` was given it."""

    folder: Path
    step: int
    position: Mapping[str, Any]

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Raises Damaged."""
        try:
            return dict(load_file(self.folder / name))
        except (SafetensorError, OSError) as error:
            raise _damaged(self.folder / name, error) from None


def save(
    folder: Path,
    step: int,
    position: Mapping[str, Any],
    optimiser: Mapping[str, torch.Tensor],
    generator: torch.Tensor,
    write_learned: Callable[[Path], None],
    keep: int,
) -> Path:
    """Write a checkpoint into `folder`; older ones beyond `keep` go once it is there.

    Raises DoesNotFit where the disk is full; what was there before then stays.
    """

    def write(beside: Path) -> None:
        write_learned(beside)
        save_file(dict(optimiser), beside / OPTIMISER)
        save_file({"generator": generator}, beside / GENERATOR)
        files = {path.name: sha256_of(path) for path in sorted(beside.iterdir())}
        text = json.dumps({"step": step, "position": dict(position), "files": files}, indent=1)
        (beside / STATE).write_text(text, encoding="utf-8")

    folder.mkdir(parents=True, exist_ok=True)
    place = folder / f"step-{step:08}"
    replace_folder(place, folder / f".writing-{step:08}-{os.getpid()}", write)
    for old in _places(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return place


def replace_folder(place: Path, beside: Path, write: Callable[[Path], None]) -> None:
    """`write` fills a folder that then stands at `place`, whole. Raises DoesNotFit where it cannot be written."""
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
        write(beside)
        for path in (*beside.iterdir(), beside):
            sync(path)
        if place.exists():
            shutil.rmtree(place)
        beside.rename(place)
        sync(place.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise _unwritten(place.parent, error) from None
    except GlmchatError:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def require_room(folder: Path, checkpoints: Path, needed: int) -> None:
    """Raise DoesNotFit where a run's folder cannot come to `needed` bytes, of which its checkpoints have some: before
    the first step, not behind the last."""
    there = sum(path.stat().st_size for path in checkpoints.rglob("*") if path.is_file())
    free = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free
    if needed - there > free:
        raise DoesNotFit(
            tr(
                "the checkpoints need {needed} of disk, and {free} are free",
                needed=human_bytes(needed - there),
                free=human_bytes(free),
            ),
            hint=tr("make room in {folder}", folder=one_line(str(folder.parent))),
            code="tune.disk",
        )


def newest(folder: Path) -> Saved | None:
    """The newest checkpoint that is whole; None without one. Half ones of a run that was killed are removed."""
    for half in folder.glob(".writing-*"):
        shutil.rmtree(half, ignore_errors=True)
    for place in reversed(_places(folder)):
        saved = _whole(place)
        if saved is not None:
            return saved
    return None


def _places(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir())


def _whole(place: Path) -> Saved | None:
    try:
        state = read_json(place / STATE)
        files, step, position = state["files"], state["step"], state["position"]
        whole = {OPTIMISER, GENERATOR} <= set(files) and f"step-{step:08}" == place.name
        own = all(Path(name).name == name for name in files)
        if whole and own and all(sha256_of(place / name) == digest for name, digest in files.items()):
            return Saved(place, step, position)
    except (OSError, GlmchatError, KeyError, TypeError, ValueError, AttributeError):
        pass
    return None


def _damaged(path: Path, error: Exception) -> Damaged:
    return Damaged(
        tr("{name} cannot be read: {error}", name=one_line(path.name), error=one_line(str(error), 120)),
        hint=tr("the checkpoint is damaged: take an older one"),
        code="tune.checkpoint",
    )


def _unwritten(folder: Path, error: Exception) -> DoesNotFit:
    free = shutil.disk_usage(folder).free
    return DoesNotFit(
        tr("the checkpoint cannot be written: {error}", error=one_line(str(error), 160)),
        hint=tr("{free} are free; the checkpoint before it stays, make room and resume", free=human_bytes(free)),
        code="tune.disk",
    )


# Moments of AdamW as tensors with plain names


def moments(optimiser: torch.optim.Optimizer, names: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the optimiser remembers of each tensor: "NAME.exp_avg", "NAME.exp_avg_sq", "NAME.step"."""
    return {
        f"{name}.{kind}": value.detach().cpu().contiguous()
        for name, parameter in names.items()
        for kind, value in optimiser.state.get(parameter, {}).items()
    }


def restore_moments(
    optimiser: torch.optim.Optimizer, names: Mapping[str, torch.Tensor], saved: Mapping[str, torch.Tensor]
) -> None:
    """The other way round. Raises Damaged where a tensor is missing or misshapen."""
    for name, parameter in names.items():
        kinds = moments_of(name, parameter.shape, saved)
        own = {k: cut_as(parameter, value) if k != "step" else value.clone() for k, value in kinds.items()}
        optimiser.state[parameter] = own


def moments_of(name: str, shape: Sequence[int], saved: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a checkpoint has of one tensor, by kind: "step", "exp_avg", "exp_avg_sq". Raises Damaged."""
    found = {}
    for kind in ("step", "exp_avg", "exp_avg_sq"):
        value = saved.get(f"{name}.{kind}")
        if value is None or (kind != "step" and tuple(value.shape) != tuple(shape)):
            raise Damaged(
                tr("the checkpoint has nothing that fits for {name}", name=one_line(name, 120)),
                hint=tr("it belongs to a run with other settings"),
                code="tune.checkpoint",
            )
        found[kind] = value
    return found
