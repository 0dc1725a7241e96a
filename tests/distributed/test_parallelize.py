"""Wrapping of a model and meshes of processes, in one process."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from moelm.config import ModelConfig
from moelm.distributed.parallel_dims import ParallelDims
from moelm.distributed.parallelize import Groups, apply_activation_checkpointing, build_mesh
from moelm.model import build_model
from tests.tolerance import relative_error

SIZES = {"dp_replicate": 8, "dp_shard": 2, "ep": 4}


@pytest.fixture
def fake_processes() -> Iterator[Callable[[int, int], None]]:
    """A function that makes this process a rank of so many, which do not exist."""
    yield lambda rank, size: dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    dist.destroy_process_group()


def test_a_mesh_has_the_ranks_of_torch_s(fake_processes: Callable[[int, int], None]) -> None:
    fake_processes(37, 64)
    mesh = build_mesh("cpu", SIZES, {})
    expected = init_device_mesh("cpu", tuple(SIZES.values()), mesh_dim_names=tuple(SIZES))
    for names in ("dp_replicate", "dp_shard", "ep"):
        assert dist.get_process_group_ranks(mesh[names].get_group()) == dist.get_process_group_ranks(
            expected[names].get_group()
        )
    assert torch.equal(mesh.mesh, expected.mesh)
    assert mesh.get_coordinate() == expected.get_coordinate()
    assert mesh["dp_replicate", "dp_shard"].mesh.tolist() == expected["dp_replicate", "dp_shard"].mesh.tolist()


@pytest.mark.parametrize("size", [64, 1024])
@pytest.mark.parametrize("dp_shard", [1, 2])
def test_the_number_of_groups_does_not_grow_with_the_processes(
    size: int, dp_shard: int, fake_processes: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_processes(0, size)
    created: list[tuple[int, ...]] = []
    new_group = dist.new_group

    def count(ranks: tuple[int, ...], **options: Any) -> Any:
        created.append(ranks)
        return new_group(ranks, **options)

    monkeypatch.setattr(dist, "new_group", count)
    dims = ParallelDims(size // 8 // dp_shard, dp_shard, 8)
    groups: Groups = {}
    build_mesh("cpu", dims.as_settings(), groups)
    build_mesh("cpu", dict(zip("rs", dims.dense_mesh, strict=True)), groups)
    replicas = tuple(range(0, size, 8 * dp_shard))
    expected = {replicas, (0,), tuple(range(8))} if dp_shard == 1 else {replicas, (0, 8), tuple(range(8)), tuple(range(16))}
    assert sorted(created) == sorted(expected)


FFN: dict[str, dict[str, Any]] = {
    "dense": {"kind": "dense", "hidden_dim": 32},
    "moe": {"kind": "moe", "hidden_dim": 16, "num_experts": 4, "top_k": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("ffn", FFN)
def test_blocks_that_are_recomputed_are_compiled(ffn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph for all blocks, by the implementation for GPUs, with the gradients of a model that stores all."""
    monkeypatch.setattr("moelm.model.swiglu._has_grouped_kernel", lambda x: True)
    shape = {"dim": 32, "num_layers": 3, "num_heads": 4, "vocab_size": 64, "init_std": 0.2, "ffn": FFN[ffn]}
    tokens = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(0))

    def gradients(mode: str) -> tuple[list[Tensor | None], int]:
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        model = build_model(ModelConfig.model_validate(shape), 0)
        apply_activation_checkpointing(model, mode)
        for block in model.blocks:
            block.compile(fullgraph=True, backend=counter)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(tokens, targets_BT=tokens).losses.total.backward()
        return [parameter.grad for parameter in model.parameters()], counter.frame_count

    (recomputed, graphs), (stored, _) = gradients("full"), gradients("none")
    assert graphs == 1
    for found, expected in zip(recomputed, stored, strict=True):
        assert found is not None
        assert expected is not None
        assert relative_error(found, expected) < 1e-2
