"""Wrapping of a model, in one process."""

from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from moelm.config import ModelConfig
from moelm.distributed.parallelize import apply_activation_checkpointing
from moelm.model import build_model
from tests.tolerance import relative_error

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
