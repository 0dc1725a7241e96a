"""Filling in a layout, and refusing those that cannot be."""

import pytest

from moelm.config import RunConfig
from moelm.distributed.layout import Layout, resolve_layout
from moelm.errors import MoelmError
from tests.conftest import tiny_config


def config(kind: str = "moe", **parallel: object) -> RunConfig:
    return RunConfig.model_validate({**tiny_config(kind=kind), "parallel": parallel})


@pytest.mark.parametrize(
    ("processes", "parallel", "layout"),
    [
        (1, {}, Layout(1, 1, 1)),
        (4, {}, Layout(4, 1, 1)),
        (4, {"dp_shard": 2}, Layout(2, 2, 1)),
        (4, {"dp_shard": "auto"}, Layout(1, 4, 1)),
        (8, {"dp_shard": "auto", "ep": 4}, Layout(1, 2, 4)),
        (8, {"dp_shard": "auto", "dp_replicate": 2, "ep": 2}, Layout(2, 2, 2)),
        (2, {"ep": 2}, Layout(1, 1, 2)),
    ],
)
def test_auto_is_what_is_left(processes: int, parallel: dict[str, object], layout: Layout) -> None:
    assert resolve_layout(config(**parallel), processes) == layout
    assert layout.size == processes
    assert layout.trunk[0] * layout.trunk[1] == processes


def test_the_trunk_is_whole_everywhere_unless_weights_are_shared() -> None:
    assert Layout(2, 1, 4).trunk == (8, 1)
    assert Layout(2, 2, 4).trunk == (2, 8)


@pytest.mark.parametrize(
    ("kind", "processes", "parallel", "told"),
    [
        ("moe", 4, {"dp_shard": 3}, "dp_shard=3 ep=1, whose product cannot be the number of processes, 4"),
        ("moe", 1, {"ep": 2}, "cannot be the number of processes, 1"),
        ("moe", 2, {"dp_replicate": 4}, "dp_replicate=4"),
        ("moe", 3, {}, "8 rows of data.seq_len = 32; 3 processes cannot have equal parts"),
        ("moe", 8, {"ep": 8}, "parallel.ep is 8, which does not divide model.ffn.num_experts = 4"),
        ("dense", 2, {"ep": 2}, "model.ffn is dense"),
    ],
)
def test_what_does_not_fit_is_a_sentence(kind: str, processes: int, parallel: dict[str, object], told: str) -> None:
    with pytest.raises(MoelmError) as caught:
        resolve_layout(config(kind, **parallel), processes)
    assert told in str(caught.value)


def test_experts_are_cut_evenly() -> None:
    # 16 wide, 3 shares: only a dimension that 3 divides could be cut.
    wanted = RunConfig.model_validate(
        {
            **tiny_config(),
            "train": {"steps": 1, "batch_tokens": 192},
            "parallel": {"dp_shard": 3, "ep": 2},
        }
    )
    with pytest.raises(MoelmError, match=r"dp_shard is 3, which does not divide model\.dim = 16"):
        resolve_layout(wanted, 6)
