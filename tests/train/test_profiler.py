"""The optimizer's share of a step in the events of a profile."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType

from moelm.train.profiler import update_shares

ON_DEVICE = DeviceType.CUDA if torch.cuda.is_available() else DeviceType.CPU


def event(name: str, start: int, end: int, device: DeviceType = ON_DEVICE) -> Any:
    time_range = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
    return SimpleNamespace(name=name, device_type=device, time_range=time_range)


def test_the_share_is_the_median_over_steps() -> None:
    steps = [event(f"ProfilerStep#{number}", 100 * number, 100 * (number + 1)) for number in range(3)]
    ranges = [event("muon", 100 * number + 50, 100 * number + 50 + length) for number, length in enumerate((20, 30, 49))]
    groups = [event("adamw", 100 * number + start, 100 * number + start + 4) for number in range(3) for start in (30, 40)]
    other_device = event("muon", 10, 90, DeviceType.XLA)
    assert update_shares([*steps, *ranges, *groups, other_device]) == pytest.approx({"adamw": 0.08, "muon": 0.3})


def test_an_optimizer_that_updates_nothing_has_no_share() -> None:
    assert update_shares([event("ProfilerStep#3", 0, 100), event("adamw", 10, 20)]) == {"adamw": 0.1}
