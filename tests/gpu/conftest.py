"""The device that each test here runs on: the CPU in the default run, a card where one is and `-m gpu` asks for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: Any) -> torch.device:
    return torch.device(request.param)
