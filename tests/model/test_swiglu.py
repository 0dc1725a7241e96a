"""The experts' computation: every implementation against the reference loop, in values and gradients."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moelm.config import ModelConfig
from moelm.data.loader import Batch
from moelm.errors import MoelmError
from moelm.model import build_model
from moelm.model.moe.experts import Experts, check_grouped_kernel
from moelm.model.swiglu import (
    BLOCK_SIZES,
    _block_layout,
    _leaves_gradients_unset,
    grouped_swiglu_cpu,
    grouped_swiglu_cuda,
    grouped_swiglu_loop,
)
from moelm.train.objective import micro_batch_loss
from tests.tolerance import assert_close

D, H, E = 16, 24, 5
ENDS = {
    "even": [4, 8, 12, 16, 20],
    "experts without rows": [0, 7, 7, 20, 20],
    "one expert": [0, 0, 20, 20, 20],
    "no rows": [0, 0, 0, 0, 0],
}
Inputs = tuple[Tensor, Tensor, list[Tensor], Tensor | None]


def make_inputs(ends: list[int], dtype: torch.dtype, gated: bool) -> Inputs:
    torch.manual_seed(0)
    x = torch.randn(ends[-1], D, dtype=dtype, requires_grad=True)
    weights = [torch.randn(E, *shape, dtype=dtype).div(4).requires_grad_() for shape in ((H, D), (D, H), (H, D))]
    gates = torch.rand(ends[-1], dtype=dtype).requires_grad_() if gated else None
    return x, torch.tensor(ends), weights, gates


def value_and_gradients(
    implementation: Callable[..., Tensor], inputs: Inputs, activation: str, autocast: bool = False, **options: Any
) -> list[Tensor]:
    x, ends, weights, gates = inputs
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = implementation(x, ends, tuple(weights), activation, gates, **options)
    learned = [x, *weights] + ([gates] if gates is not None else [])
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, learned, upstream)]


@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS.keys())
def test_every_implementation_equals_the_loop(ends: list[int], gated: bool, activation: str) -> None:
    inputs = make_inputs(ends, torch.float32, gated)
    expected = value_and_gradients(grouped_swiglu_loop, inputs, activation)
    for results in (
        value_and_gradients(grouped_swiglu_cpu, inputs, activation),
        value_and_gradients(grouped_swiglu_cpu, inputs, activation, recompute=True),
        value_and_gradients(grouped_swiglu_cuda, inputs, activation),
    ):
        for found, wanted in zip(results, expected, strict=True):
            assert_close(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_cast_are_stacked_for_one_product(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []

    def record(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
        shapes.append(tuple(weight.shape))
        return original_grouped_mm(x, weight, offs=offs)

    monkeypatch.setattr(F, "grouped_mm", record)
    value_and_gradients(grouped_swiglu_cuda, make_inputs(ENDS["even"], dtype, gated=True), "silu", autocast=True)
    hidden = [(E, D, 2 * H)] if dtype == torch.float32 else [(E, D, H)] * 2
    assert shapes == [*hidden, (E, H, D)]


def test_gradients_of_stacked_weights_are_no_views() -> None:
    """Autograd would copy them."""
    _, dx, *dweights, _ = value_and_gradients(
        grouped_swiglu_cuda, make_inputs(ENDS["even"], torch.float32, gated=True), "silu", autocast=True
    )
    for gradient in (dx, *dweights):
        assert gradient.is_contiguous()
        assert gradient.untyped_storage().nbytes() == gradient.nbytes


class _GroupedMMOfBlackwell(torch.autograd.Function):
    """`F.grouped_mm` whose backward pass gives experts without rows arbitrary gradients: here NaN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, ends)
        return original_grouped_mm(x, weight, offs=ends)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, ends = (each.detach() for each in ctx.saved_tensors)
        with torch.enable_grad():
            y = original_grouped_mm(x.requires_grad_(), weight.requires_grad_(), offs=ends)
        dx, dweight = torch.autograd.grad(y, (x, weight), grads[0])
        empty = ends.diff(prepend=ends.new_zeros(1)) == 0
        return dx, dweight.masked_fill(empty[:, None, None], torch.nan), None


original_grouped_mm = F.grouped_mm


@pytest.mark.parametrize("capability", [(9, 0), (10, 0)], ids=["Hopper", "Blackwell"])
def test_arbitrary_gradients_of_experts_without_rows_are_masked_on_blackwell(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make_inputs(ENDS["experts without rows"], torch.float32, gated=True)
    expected = value_and_gradients(grouped_swiglu_loop, inputs, "silu")
    monkeypatch.setattr(F, "grouped_mm", lambda x, w, offs: _GroupedMMOfBlackwell.apply(x, w, offs))
    leaves_unset = partial(_leaves_gradients_unset, torch.device("cuda"))
    monkeypatch.setattr("moelm.model.swiglu._leaves_gradients_unset", lambda device: leaves_unset())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    results = value_and_gradients(grouped_swiglu_cuda, inputs, "silu")
    if capability < (10, 0):
        assert all(result.isnan().any() for result in results[2:5])  # the three stacks of weights
        return
    for found, wanted in zip(results, expected, strict=True):
        assert_close(found, wanted)


def test_custom_gradients_equal_finite_differences() -> None:
    x, ends, weights, gates = make_inputs([0, 2, 2, 5, 6], torch.float64, gated=True)

    def compute(x: Tensor, gates: Tensor, *weights: Tensor) -> Tensor:
        return grouped_swiglu_cpu(x, ends, weights, "gelu", gates)

    assert torch.autograd.gradcheck(compute, (x, gates, *weights))


@pytest.mark.parametrize("autocast", [False, True])
def test_recomputation_and_inference_are_bitwise_equal(autocast: bool) -> None:
    inputs = make_inputs([5, 900, 930, 930, 1000], torch.float32, gated=True)
    stored, recomputed = (
        value_and_gradients(grouped_swiglu_cpu, inputs, "silu", autocast, recompute=on) for on in (False, True)
    )
    assert all(torch.equal(a, b) for a, b in zip(stored, recomputed, strict=True))
    x, ends, weights, gates = inputs
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        assert torch.equal(grouped_swiglu_cpu(x, ends, tuple(weights), "silu", gates), stored[0])


@pytest.mark.parametrize("autocast", [False, True])
def test_an_expert_is_computed_alike_beside_others(autocast: bool) -> None:
    """An expert's results do not depend on which experts it is grouped with, as under expert parallelism."""
    x, ends, weights, gates = make_inputs([200, 350, 350, 620, 800], torch.float32, gated=True)
    together = value_and_gradients(grouped_swiglu_cpu, (x, ends, weights, gates), "silu", autocast)
    for e, (start, end) in enumerate([(0, 200), (200, 350), (350, 350), (350, 620), (620, 800)]):
        alone = x[start:end], torch.tensor([end - start]), [w[e : e + 1] for w in weights], gates[start:end]
        y = value_and_gradients(grouped_swiglu_cpu, alone, "silu", autocast)[0]
        assert torch.equal(y, together[0][start:end])


@pytest.mark.parametrize(
    ("implementation", "max_copied_weight"),
    [(grouped_swiglu_cpu, 0), (grouped_swiglu_cpu, 1 << 16), (grouped_swiglu_cuda, 0)],
    ids=["by expert", "by block", "cuda"],
)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(
    "ends",
    [
        ENDS["experts without rows"],
        ENDS["no rows"],
        [64, 150, 151, 151, 300],
        [5, 1900, 1930, 1930, 2700],
        [64, 128, 256, 320, 320],
        [64] * 5,
    ],
    ids=["few", "no rows", "blocks of 64", "blocks of every size", "last without rows", "one expert"],
)
def test_bfloat16_is_close_to_the_loop_in_float32(
    ends: list[int],
    gated: bool,
    implementation: Callable[..., Tensor],
    max_copied_weight: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("moelm.model.swiglu.MAX_COPIED_WEIGHT", max_copied_weight)
    inputs = make_inputs(ends, torch.float32, gated)
    expected = value_and_gradients(grouped_swiglu_loop, inputs, "silu")
    results = value_and_gradients(implementation, inputs, "silu", autocast=True)
    assert results[0].dtype == torch.bfloat16
    for found, wanted in zip(results, expected, strict=True):
        assert found.shape == wanted.shape
        assert (found - wanted).norm() <= wanted.norm() * 2 * torch.finfo(torch.bfloat16).eps


def test_blocks_have_little_padding_and_few_different_shapes() -> None:
    """oneDNN compiles a kernel for each shape."""
    rng, shapes, padding, copies = torch.Generator().manual_seed(0), set(), 0, 0
    for _ in range(200):
        counts = torch.multinomial(torch.rand(16, generator=rng) + 0.5, 8192, replacement=True, generator=rng).bincount()
        layout = _block_layout(counts.cumsum(0), 64 * 128)
        assert layout.target_S is not None
        assert layout.expert_B is not None
        expert_P = []
        for group in layout.groups:
            experts_G = layout.expert_B[group.weights]
            rows = (group.rows.stop - group.rows.start) // len(experts_G)
            assert rows in BLOCK_SIZES
            shapes.add((len(experts_G), rows))
            expert_P.append(experts_G.repeat_interleave(rows))
        assert layout.target_S.unique().numel() == 8192
        assert torch.equal(torch.cat(expert_P)[layout.target_S], torch.arange(len(counts)).repeat_interleave(counts))
        padding += layout.groups[-1].rows.stop - 8192
        copies += len(layout.expert_B)
    assert padding / 200 <= 0.07 * 8192
    assert copies / 200 <= 3 * 16
    assert len(shapes) <= 40


def sparse_model(num_layers: int) -> tuple[ModelConfig, Tensor]:
    """A config for the compiler, and tokens."""
    ffn = {"kind": "moe", "hidden_dim": 16, "num_experts": 4, "top_k": 2}
    config = {"dim": 32, "num_layers": num_layers, "num_heads": 4, "vocab_size": 64, "ffn": ffn}
    return ModelConfig.model_validate(config), torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(0))


def test_a_whole_sparse_step_compiles_without_a_graph_break(monkeypatch: pytest.MonkeyPatch) -> None:
    """The implementation for GPUs, traced here on the CPU: neither the forward nor the backward pass needs host values."""
    monkeypatch.setattr("moelm.model.swiglu._has_grouped_kernel", lambda x: True)
    config, tokens = sparse_model(num_layers=2)
    model = build_model(config, seed=0)
    batch = Batch(tokens, tokens, torch.zeros_like(tokens))

    def step() -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(tokens, valid_BT=batch.valid_BT, targets_BT=tokens)
        loss = micro_batch_loss(output, batch, None, batch.valid_N.sum().double(), config.ffn.balance)
        return loss.total, loss.sums[0]["counts"]

    total, counts = torch.compile(step, fullgraph=True, backend="aot_eager")()
    total.backward()
    eager_total, eager_counts = step()
    assert_close(total, eager_total, dtype=torch.float32)
    assert counts.sum() == eager_counts.sum() == 32
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_compiled_model_on_a_cpu_has_equal_losses() -> None:
    """On a CPU the experts are excluded from the graph."""
    config, tokens = sparse_model(num_layers=1)
    model = build_model(config, seed=0)
    eager = model(tokens, targets_BT=tokens).losses.total
    compiled = torch.compile(model, backend="aot_eager")(tokens, targets_BT=tokens).losses.total
    assert_close(compiled, eager)
    found, expected = (torch.autograd.grad(loss, list(model.parameters())) for loss in (compiled, eager))
    for grad, expected_grad in zip(found, expected, strict=True):
        assert_close(grad, expected_grad)


@pytest.mark.parametrize(
    ("dim", "ffn", "message"),
    [
        (20, {}, "model.dim is 20; experts on GPUs in bf16 need a multiple of 8"),
        (16, {"hidden_dim": 24, "depth": 2}, "model.ffn.hidden_dim / depth is 12;"),
        (16, {"num_experts": 2048}, "num_experts is 2048, 1,024 on each process;"),
    ],
)
def test_shapes_that_the_grouped_kernel_does_not_take_are_refused(dim: int, ffn: dict[str, Any], message: str) -> None:
    tree = {"kind": "moe", "hidden_dim": 16, "num_experts": 4, "top_k": 2}
    shape = {"dim": dim, "num_layers": 1, "num_heads": 2}
    with pytest.raises(MoelmError, match=re.escape(message)):
        check_grouped_kernel(ModelConfig.model_validate({**shape, "ffn": {**tree, **ffn}}), ep=2)
    check_grouped_kernel(ModelConfig.model_validate({**shape, "dim": 16, "ffn": tree}), ep=2)


@pytest.mark.slow
@pytest.mark.usefixtures("cpp_compiler")
def test_no_rows_have_no_gradients_in_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a process whose experts no token has selected, by the implementation for GPUs."""
    monkeypatch.setattr("moelm.model.swiglu._has_grouped_kernel", lambda x: True)
    experts = Experts(num_experts=2, dim=16, hidden_dim=16, depth=1, activation="silu")
    for weight in experts.parameters():
        torch.nn.init.normal_(weight)
    compiled = torch.compile(experts, dynamic=True)
    for rows in (8, 0):
        experts.zero_grad()
        x_SD = torch.randn(rows, 16, dtype=torch.bfloat16, requires_grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            compiled(x_SD, torch.ones(rows), torch.tensor([rows // 2, rows])).sum().backward()
        norms = [float(weight.grad.norm()) for weight in experts.parameters() if weight.grad is not None]
        assert len(norms) == 3
        assert all(norm > 0 for norm in norms) == (rows > 0)
        assert x_SD.grad is not None
