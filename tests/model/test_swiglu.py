"""The experts' computation: the fast ways against the loop that says what is meant, in values and gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moelm.config import ModelConfig
from moelm.data.loader import Batch
from moelm.model import build_model
from moelm.model.swiglu import grouped_swiglu_cpu, grouped_swiglu_cuda, grouped_swiglu_loop
from moelm.train.objective import micro_batch_loss

D, H, E = 16, 24, 5
ENDS = {
    "even": [4, 8, 12, 16, 20],
    "none for some": [0, 7, 7, 20, 20],
    "all to one": [0, 0, 20, 20, 20],
    "no rows at all": [0, 0, 0, 0, 0],
}


def inputs(ends: list[int], dtype: torch.dtype, gated: bool) -> tuple[Tensor, Tensor, list[Tensor], Tensor | None]:
    torch.manual_seed(0)
    x = torch.randn(ends[-1], D, dtype=dtype, requires_grad=True)
    weights = [torch.randn(E, *shape, dtype=dtype).div(4).requires_grad_() for shape in ((H, D), (D, H), (H, D))]
    gates = torch.rand(ends[-1], dtype=dtype).requires_grad_() if gated else None
    return x, torch.tensor(ends), weights, gates


def values_and_gradients(way: Callable[..., Tensor], given: Any, activation: str, **options: Any) -> list[Tensor]:
    x, ends, weights, gates = given
    y = way(x, ends, tuple(weights), activation, gates, **options)
    learned = [x, *weights] + ([gates] if gates is not None else [])
    pull = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, learned, pull)]


@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS.keys())
def test_the_fast_ways_are_the_loop(ends: list[int], gated: bool, activation: str) -> None:
    given = inputs(ends, torch.float32, gated)
    meant = values_and_gradients(grouped_swiglu_loop, given, activation)
    for found in (
        values_and_gradients(grouped_swiglu_cpu, given, activation),
        values_and_gradients(grouped_swiglu_cpu, given, activation, recompute=True),
        values_and_gradients(grouped_swiglu_cuda, given, activation),
    ):
        for mine, its in zip(found, meant, strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-6)


def test_written_out_gradients_are_those_of_differences() -> None:
    x, ends, weights, gates = inputs([0, 2, 2, 5, 6], torch.float64, gated=True)

    def loss(x: Tensor, gates: Tensor, *weights: Tensor) -> Tensor:
        return grouped_swiglu_cpu(x, ends, weights, "gelu", gates)

    assert torch.autograd.gradcheck(loss, (x, gates, *weights))


def test_recomputation_is_bitwise_equal() -> None:
    given = inputs(ENDS["even"], torch.float32, gated=True)
    stored, recomputed = (values_and_gradients(grouped_swiglu_cpu, given, "silu", recompute=on) for on in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(stored, recomputed, strict=True))


@pytest.mark.parametrize("way", [grouped_swiglu_cpu, grouped_swiglu_cuda])
@pytest.mark.parametrize("ends", [ENDS["none for some"], [64, 150, 151, 151, 300]], ids=["few", "past one slice"])
def test_in_bfloat16_the_fast_ways_stay_near_the_loop_in_float32(ends: list[int], way: Callable[..., Tensor]) -> None:
    given = inputs(ends, torch.float32, gated=True)
    meant = values_and_gradients(grouped_swiglu_loop, given, "silu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x, ends, weights, gates = given
        y = way(x, ends, tuple(weights), "silu", gates)
    pull = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    found = [y.detach(), *torch.autograd.grad(y, [x, *weights, gates], pull)]
    assert y.dtype == torch.bfloat16
    for mine, its in zip(found, meant, strict=True):
        assert (mine.float() - its).norm() < 0.02 * its.norm()


def test_a_compiler_takes_a_whole_sparse_step_without_a_break(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of GPUs, here by tracing alone: no value is needed on the host, forward or backward."""
    monkeypatch.setattr("moelm.model.swiglu._has_grouped_kernel", lambda x: True)
    ffn = {"kind": "moe", "hidden_dim": 16, "num_experts": 4, "top_k": 2}
    shape = ModelConfig.model_validate({"dim": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 64, "ffn": ffn})
    model = build_model(shape, seed=0)
    tokens = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(0))
    batch = Batch(tokens, tokens, torch.zeros_like(tokens))

    def step() -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(tokens, valid_BT=batch.valid_BT, targets_BT=tokens)
        loss = micro_batch_loss(output, batch, None, batch.valid_N.sum().double(), shape.ffn.balance)
        return loss.total, loss.sums[0]["counts"]

    total, counts = torch.compile(step, fullgraph=True, backend="aot_eager")()
    total.backward()
    plain, plain_counts = step()
    torch.testing.assert_close(total, plain, rtol=0.01, atol=0)
    assert counts.sum() == plain_counts.sum() == 32
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_compiled_model_on_a_cpu_has_the_same_losses() -> None:
    """There the experts are left out of the graph."""
    ffn = {"kind": "moe", "hidden_dim": 16, "num_experts": 4, "top_k": 2}
    shape = ModelConfig.model_validate({"dim": 32, "num_layers": 1, "num_heads": 4, "vocab_size": 64, "ffn": ffn})
    model = build_model(shape, seed=0)
    tokens = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(0))
    plain = model(tokens, targets_BT=tokens).losses.total
    compiled = torch.compile(model, backend="aot_eager")(tokens, targets_BT=tokens).losses.total
    torch.testing.assert_close(compiled, plain)
    for a, b in zip(*(torch.autograd.grad(loss, list(model.parameters())) for loss in (compiled, plain)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
