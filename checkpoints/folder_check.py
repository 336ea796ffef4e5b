"""Folders that cannot be run are refused before the engine is started, without torch: in a blink, not in seconds.

The engine would refuse them too, by the same functions, and also what only torch can tell (shapes, a pickle
that holds more than tensors).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from glmchat.checkpoints.config import absurd, refuse_absurd
from glmchat.checkpoints.families import spec_of
from glmchat.checkpoints.lfs_pointer import refuse_pointer
from glmchat.checkpoints.vocabularies import check_vocabulary
from glmchat.checkpoints.weight_files import folder_config, refuse_adapter_folder, weight_files
from glmchat.core.language import tr
from glmchat.core.text import human_bytes

_LEAST = 0.5  # bytes of a weight in the tightest format there is


def check_folder(folder: Path) -> None:
    """Raise Damaged, Hostile or Usage for a folder or GGUF file that is no whole model, or a mixture of two."""
    if folder.is_file():
        refuse_pointer(folder)
    if not folder.is_dir():
        return
    config = folder_config(folder)
    refuse_absurd(config)
    refuse_adapter_folder(folder, config)
    files = weight_files(folder)
    check_vocabulary(folder, config)
    _compare_sizes(config, files)


def _compare_sizes(config: Mapping[str, Any], files: Sequence[Path]) -> None:
    """A network that could not be in these files even at four bits is not the one they hold."""
    network = spec_of(config)
    if network is None:
        return
    # Families whose parameters are not counted have at least one square matrix in each layer.
    least = _LEAST * (network.parameters() or network.layers * network.hidden_size**2)
    held = sum(file.stat().st_size for file in files)
    if least > held:
        raise absurd(
            tr(
                "config.json describes {layers} layers of width {width}, at least {least}; the weights "
                "have only {held}",
                layers=network.layers,
                width=network.hidden_size,
                least=human_bytes(int(least)),
                held=human_bytes(held),
            ),
            tr("config.json is damaged or belongs to another model: fetch it again"),
        )
