"""A device that is not there is refused by name, before anything loads."""

from __future__ import annotations

import pytest
import torch

from glmchat.core.errors import Usage
from glmchat.engine.placement import require_device


def test_what_is_always_there_is_accepted() -> None:
    require_device("auto")
    require_device("cpu")


@pytest.mark.parametrize("device", ["cuda:99", "cuda", "mps"])
def test_a_missing_device_is_a_usage_error_with_the_way_out(device: str) -> None:
    if (device == "cuda" and torch.cuda.is_available()) or (device == "mps" and torch.backends.mps.is_available()):
        pytest.skip(f"{device} is here")
    with pytest.raises(Usage, match=f"no device {device}") as refused:
        require_device(device)
    assert "--device auto" in refused.value.hint and refused.value.exit == 2
