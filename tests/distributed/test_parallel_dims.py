"""Parallel dimensions: `auto`, and combinations that are refused."""

import pytest

from moelm.config import RunConfig
from moelm.distributed.parallel_dims import ParallelDims, expert_padding, resolve_parallel_dims
from moelm.errors import MoelmError
from tests.conftest import tiny_config


def config(kind: str = "moe", **parallel: object) -> RunConfig:
    return RunConfig.model_validate({**tiny_config(kind=kind), "parallel": parallel})


@pytest.mark.parametrize(
    ("processes", "parallel", "dims"),
    [
        (1, {}, ParallelDims(1, 1, 1)),
        (4, {}, ParallelDims(4, 1, 1)),
        (4, {"dp_shard": 2}, ParallelDims(2, 2, 1)),
        (4, {"dp_shard": "auto"}, ParallelDims(1, 4, 1)),
        (8, {"dp_shard": "auto", "ep": 4}, ParallelDims(1, 2, 4)),
        (8, {"dp_shard": "auto", "dp_replicate": 2, "ep": 2}, ParallelDims(2, 2, 2)),
        (2, {"ep": 2}, ParallelDims(1, 1, 2)),
        (8, {"dp_shard": 2, "ep": 2, "dense_shard": 2}, ParallelDims(2, 2, 2, 2)),
    ],
)
def test_auto_uses_the_remaining_processes(processes: int, parallel: dict[str, object], dims: ParallelDims) -> None:
    assert resolve_parallel_dims(config(**parallel), processes) == dims
    assert dims.size == processes
    assert dims.dense_mesh[0] * dims.dense_mesh[1] == processes


def test_the_dense_mesh_replicates_unless_weights_are_sharded() -> None:
    assert ParallelDims(2, 1, 4).dense_mesh == (8, 1)
    assert ParallelDims(2, 2, 4).dense_mesh == (2, 8)
    assert ParallelDims(2, 2, 4, 2).dense_mesh == (8, 2)
    assert [ParallelDims(*sizes).is_sharded for sizes in ((4, 1, 2), (4, 1, 2, 2), (1, 2, 2, 1), (2, 2))] == [
        False,
        True,
        True,
        True,
    ]


@pytest.mark.parametrize(
    ("kind", "processes", "parallel", "message"),
    [
        ("moe", 4, {"dp_shard": 3}, "dp_shard=3 ep=1, whose product cannot be the number of processes, 4"),
        ("moe", 1, {"ep": 2}, "cannot be the number of processes, 1"),
        ("moe", 2, {"dp_replicate": 4}, "dp_replicate=4"),
        ("moe", 3, {}, "8 rows of data.seq_len = 32, which 3 processes cannot divide into equal shares"),
        ("moe", 8, {"ep": 8}, "parallel.ep is 8, which does not divide model.ffn.num_experts = 4"),
        ("dense", 2, {"ep": 2}, "model.ffn is dense"),
        ("moe", 4, {"dense_shard": 2}, "parallel.dense_shard is 2, but parallel.ep is 1; auto is expected"),
        ("moe", 4, {"ep": 2, "dense_shard": 3}, "it does not divide the number of processes, 4; auto is expected"),
    ],
)
def test_impossible_dimensions_are_refused(kind: str, processes: int, parallel: dict[str, object], message: str) -> None:
    with pytest.raises(MoelmError) as caught:
        resolve_parallel_dims(config(kind, **parallel), processes)
    assert message in str(caught.value)


def test_experts_are_sharded_evenly() -> None:
    # The experts are sharded along model.dim, here 16, which 3 processes cannot divide.
    uneven = RunConfig.model_validate(
        {
            **tiny_config(),
            "train": {"steps": 1, "batch_tokens": 192},
            "parallel": {"dp_shard": 3, "ep": 2},
        }
    )
    with pytest.raises(MoelmError, match=r"dp_shard is 3, which does not divide model\.dim = 16"):
        resolve_parallel_dims(uneven, 6)


def test_experts_that_would_be_padded_to_twice_their_size_are_refused() -> None:
    """Four experts of 16 hidden units and a width of 16 on 24 shards would be padded to 24 experts."""
    tree = {**tiny_config(), "train": {"steps": 1, "batch_tokens": 32 * 24}, "parallel": {"dp_shard": 24}}
    with pytest.raises(MoelmError, match=r"dp_shard is 24, which divides neither .* padded to 6 times their size"):
        resolve_parallel_dims(RunConfig.model_validate(tree), 24)
    assert expert_padding(config(), ParallelDims(1, 8, 1)) == 1  # along the second dimension
    assert expert_padding(config(), ParallelDims(1, 3, 1)) == 6 / 4
    assert expert_padding(config("dense"), ParallelDims(1, 24, 1)) == 1
