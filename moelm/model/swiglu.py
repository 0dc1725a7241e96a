"""SwiGLU (or GeGLU) feed-forward blocks: one block, and a stack of experts on rows sorted by expert.

`grouped_swiglu_loop` is the reference, `grouped_swiglu_cpu` is for CPUs, `grouped_swiglu_cuda` for GPUs. On a CPU, a dense
block is computed as one expert that gets all rows.

Shapes: S rows sorted by expert, D model width, F hidden width, E experts. On CPUs: P padded rows, B weights (those of each
expert, or a copy for each block of rows), G weights of a group, R rows of each of them.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moelm.model.backend import compute_dtype, use_custom_backward

Weights = tuple[Tensor, Tensor, Tensor]
"""w1, w2 and w3, named as in Mixtral; for experts, stacks of them."""

BLOCK_SIZES = (256, 128, 64)
"""Rows of a block in low precision. oneDNN compiles a kernel for each number of rows, and an expert's number changes at
every step."""

MAX_COPIED_WEIGHT = 1 << 16
"""Elements of a weight matrix up to which each block of rows gets a copy of it."""

ACTIVATIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], dict[str, str]]] = {
    "silu": (F.silu, torch.ops.aten.silu_backward, {}),
    "gelu": (F.gelu, torch.ops.aten.gelu_backward, {"approximate": "tanh"}),
}
"""By name: the function, its backward, and keyword arguments of both. SwiGLU and GeGLU (Shazeer 2020)."""


def grouped_swiglu(
    x_SD: Tensor,
    ends_E: Tensor,
    weights: Weights,
    activation: str,
    gates_S: Tensor | None,
    recompute: bool = False,
) -> Tensor:
    """gate * w2 (act(w1 x) * w3 x) with each expert's weights on its rows, by the fastest implementation for the device.

    Args:
        x_SD: rows sorted by expert.
        ends_E: end of each expert's rows.
        weights: w1 `(E, F, D)`, w2 `(E, D, F)`, w3 `(E, F, D)`.
        activation: `silu` or `gelu`.
        gates_S: factor on each row's output; None is 1.
        recompute: whether hidden activations are recomputed in the backward pass instead of stored.
    """
    if not _has_grouped_kernel(x_SD):
        compute = torch.compiler.disable(grouped_swiglu_cpu) if torch.compiler.is_compiling() else grouped_swiglu_cpu  # type: ignore[no-untyped-call]
        return compute(x_SD, ends_E, weights, activation, gates_S, recompute)
    if recompute:
        y_SD: Tensor = checkpoint(grouped_swiglu_cuda, x_SD, ends_E, weights, activation, gates_S, use_reentrant=False)
        return y_SD
    return grouped_swiglu_cuda(x_SD, ends_E, weights, activation, gates_S)


def _has_grouped_kernel(x: Tensor) -> bool:
    """Whether `F.grouped_mm` is fast here: on GPUs in bfloat16."""
    return x.device.type != "cpu" and compute_dtype(x) == torch.bfloat16


def dense_swiglu(
    x_ND: Tensor, w1_FD: Tensor, w2_DF: Tensor, w3_FD: Tensor, activation: str, recompute: bool = False
) -> Tensor:
    """`swiglu` by the fastest implementation for the device; on a CPU, bitwise equal to one expert that gets all rows."""
    if use_custom_backward(x_ND):
        weights = (w1_FD[None], w2_DF[None], w3_FD[None])
        return grouped_swiglu_cpu(x_ND, torch.tensor([len(x_ND)]), weights, activation, None, recompute)
    if recompute:
        y_ND: Tensor = checkpoint(swiglu, x_ND, w1_FD, w2_DF, w3_FD, activation, use_reentrant=False)
        return y_ND
    return swiglu(x_ND, w1_FD, w2_DF, w3_FD, activation)


def swiglu(x_ND: Tensor, w1_FD: Tensor, w2_DF: Tensor, w3_FD: Tensor, activation: str) -> Tensor:
    """w2 (act(w1 x) * w3 x)."""
    act, _, options = ACTIVATIONS[activation]
    return F.linear(act(F.linear(x_ND, w1_FD), **options) * F.linear(x_ND, w3_FD), w2_DF)


def split_depth(x: Tensor, weights: Weights, depth: int, block: Callable[[Tensor, Weights], Tensor]) -> Tensor:
    """A block whose hidden units are divided into layers; each layer reads x plus the output of the layers before it.

    Args:
        weights: w1 `(…, F, D)`, w2 `(…, D, F)`, w3 `(…, F, D)`.
        depth: number of layers.
        block: computes one layer with its share of the weights.
    """
    if depth == 1:
        return block(x, weights)
    w1, w2, w3 = (weight.chunk(depth, dim) for weight, dim in zip(weights, (-2, -1, -2), strict=True))
    y = block(x, (w1[0], w2[0], w3[0]))
    for later in zip(w1[1:], w2[1:], w3[1:], strict=True):
        y = y + block(x + y, later)
    return y


def grouped_swiglu_loop(
    x_SD: Tensor,
    ends_E: Tensor,
    weights: Weights,
    activation: str,
    gates_S: Tensor | None = None,
) -> Tensor:
    """Reference implementation: one expert after another, differentiated by autograd."""
    parts, counts = [], ends_E.diff(prepend=ends_E.new_zeros(1)).tolist()
    # Unbound once: indexing the stacks in the loop would make the backward pass write E gradients of full size.
    for x, w1, w2, w3 in zip(torch.split(x_SD, counts), *(w.unbind() for w in weights), strict=True):
        parts.append(swiglu(x, w1, w2, w3, activation))
    y_SD = torch.cat(parts)
    return y_SD if gates_S is None else y_SD * gates_S[:, None].to(y_SD.dtype)


def grouped_swiglu_cuda(
    x_SD: Tensor,
    ends_E: Tensor,
    weights: Weights,
    activation: str,
    gates_S: Tensor | None = None,
) -> Tensor:
    """All experts in one kernel; row bounds stay on the device, so a compiler has no graph break.

    Weights that must be cast are stacked as they are cast, which a compiler does in one pass, so that w1 and w3 are one
    product of twice the width. Weights that have the dtype already, as FSDP gathers them, would be copied only for that.
    """
    dtype = compute_dtype(x_SD)
    if not len(x_SD):
        # The compiled backward pass of `grouped_mm` fails without rows; a product with any expert has zero gradients too.
        first, second, third = (w[0].to(dtype) for w in weights)
        y_SD = swiglu(x_SD.to(dtype), first, second, third, activation)
        return y_SD if gates_S is None else y_SD * gates_S[:, None].to(dtype)
    act, _, options = ACTIVATIONS[activation]
    w1, w2, w3 = weights
    # Cast before they are stacked: otherwise their gradients would be views of one tensor, which autograd copies.
    hidden = [w1, w3] if w1.dtype == dtype else [torch.cat((w1.to(dtype), w3.to(dtype)), dim=1)]
    stacks = [*hidden, w2.to(dtype)]
    if _leaves_gradients_unset(x_SD.device):
        has_rows_E = ends_E.diff(prepend=ends_E.new_zeros(1)) > 0
        stacks = [_MaskedGradient.apply(w, has_rows_E) for w in stacks]  # type: ignore[no-untyped-call]
    *hidden, w2 = (w.transpose(1, 2) for w in stacks)
    x_SD = x_SD.to(dtype)
    ends_E = ends_E.to(torch.int32)
    products = [F.grouped_mm(x_SD, w, offs=ends_E) for w in hidden]
    a_SF, b_SF = products[0].chunk(2, dim=1) if len(products) == 1 else products
    h_SF = act(a_SF, **options) * b_SF
    if gates_S is not None:
        h_SF = h_SF * gates_S[:, None].to(dtype)
    return F.grouped_mm(h_SF, w2, offs=ends_E)


def _leaves_gradients_unset(device: torch.device) -> bool:
    """Whether `F.grouped_mm` may give experts without rows arbitrary gradients instead of zeros: on GPUs of compute
    capability 10 (Blackwell) with some versions of torch (pytorch issue 172439)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 10


class _MaskedGradient(torch.autograd.Function):
    """Stacked weights `(E, ...)`, whose gradient is zero where a mask `(E)` is False, whatever is there."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask_E: Tensor) -> Tensor:
        ctx.save_for_backward(mask_E)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (mask_E,) = ctx.saved_tensors
        return torch.where(mask_E[:, None, None], grads[0], 0), None


def grouped_swiglu_cpu(
    x_SD: Tensor,
    ends_E: Tensor,
    weights: Weights,
    activation: str,
    gates_S: Tensor | None = None,
    recompute: bool = False,
) -> Tensor:
    """Batched products of equal groups of rows, with a custom backward that stores few activations and works in place.

    In low precision, each expert's rows are padded to blocks. Of small experts (up to `MAX_COPIED_WEIGHT`), whose products
    take less time than their calls, all blocks are computed by one batched product, each with a copy of its expert's
    weights. Otherwise each expert is computed by itself; in float32 without padding.
    """
    dtype = compute_dtype(x_SD)
    gates_S1 = None if gates_S is None else gates_S[:, None].to(dtype)
    layout = _plain_layout(ends_E) if dtype.itemsize >= 4 else _block_layout(ends_E, weights[0][0].numel())
    if not torch.is_grad_enabled():
        copies = _copy_for_blocks(_cast(weights, dtype), layout)
        y_PD = _forward(_pad(x_SD.to(dtype), layout), copies, layout, activation)
        return _unpad(y_PD, layout, gates_S1)
    y_SD: Tensor = _GroupedSwiGLU.apply(x_SD, gates_S1, *weights, layout, dtype, activation, recompute)  # type: ignore[no-untyped-call]
    return y_SD


class _Group(NamedTuple):
    """Weights and rows of one batched product."""

    weights: slice
    """In the order of the layout."""
    rows: slice
    """Padded rows, an equal number for each weight."""

    def take(self, x_PC: Tensor) -> Tensor:
        """The group's rows, `(G, R, C)`."""
        x_GRC: Tensor = x_PC[self.rows].view(self.weights.stop - self.weights.start, -1, x_PC.shape[1])
        return x_GRC


class _Layout(NamedTuple):
    """How the rows are computed. Without `source_P`, they are not padded; without `expert_B`, weights are not copied."""

    groups: list[_Group]
    source_P: Tensor | None = None
    """Row at each padded row; padding has any."""
    padding: Tensor | None = None
    """Padded rows without a row."""
    target_S: Tensor | None = None
    """Padded row of each row."""
    expert_B: Tensor | None = None
    """Expert of each block."""
    order_B: Tensor | None = None
    """The blocks sorted by expert."""
    first_E: Tensor | None = None
    """Number of blocks of earlier experts."""


def _plain_layout(ends_E: Tensor) -> _Layout:
    return _Layout(_expert_groups(ends_E.tolist()))


def _expert_groups(ends: list[int]) -> list[_Group]:
    return [_Group(slice(e, e + 1), slice(*span)) for e, span in enumerate(zip([0, *ends], ends, strict=False))]


def _block_layout(ends_E: Tensor, weight_size: int) -> _Layout:
    """Each expert's rows in blocks; small experts are a group for each size of blocks, others a group each.

    An expert has as many blocks of the largest size as it fills, and at most one of each other size: few copies of its
    weights, and little padding.
    """
    counts_E, num_rows = ends_E.diff(prepend=ends_E.new_zeros(1)), int(ends_E[-1])
    blocked = len(counts_E) > 1 and weight_size <= MAX_COPIED_WEIGHT
    sizes = BLOCK_SIZES if blocked else BLOCK_SIZES[-1:]
    padded_E = -(-counts_E // sizes[-1]) * sizes[-1]
    if num_rows == 0 or (len(counts_E) == 1 and num_rows == int(padded_E)):
        return _plain_layout(ends_E)
    blocks_ZE = torch.stack([padded_E // sizes[0], *(padded_E % a // b for a, b in pairwise(sizes))])
    rows_ZE = blocks_ZE * torch.tensor(sizes)[:, None]
    # The layout has all blocks of one size before those of the next.
    first_ZE = (rows_ZE.flatten().cumsum(0) - rows_ZE.flatten()).view_as(rows_ZE)
    used_EZ = (counts_E - rows_ZE.cumsum(0) + rows_ZE).clamp_min(0).minimum(rows_ZE).t().flatten()
    target_S = torch.arange(num_rows) + (first_ZE.t().flatten() - used_EZ.cumsum(0) + used_EZ).repeat_interleave(used_EZ)
    # Rounded up, so that buffers of earlier steps are found again.
    unit = max(num_rows // 16, 1)
    source_P = torch.full((-(-int(rows_ZE.sum()) // unit) * unit,), -1).scatter_(0, target_S, torch.arange(num_rows))
    rows = source_P.clamp_min(0), (source_P < 0).nonzero()[:, 0], target_S
    if not blocked:
        return _Layout(_expert_groups(padded_E.cumsum(0).tolist()), *rows)
    expert_B = torch.arange(len(counts_E)).repeat(len(sizes)).repeat_interleave(blocks_ZE.flatten())
    blocks_E = blocks_ZE.sum(0)
    groups, start, row = [], 0, 0
    for size, count in zip(sizes, blocks_ZE.sum(1).tolist(), strict=True):
        if count:
            groups.append(_Group(slice(start, start + count), slice(row, row + count * size)))
        start, row = start + count, row + count * size
    return _Layout(groups, *rows, expert_B, expert_B.argsort(stable=True), blocks_E.cumsum(0) - blocks_E)


def _pad(x_SC: Tensor, layout: _Layout, gates_S1: Tensor | None = None) -> Tensor:
    """The rows times their gates at their places in the layout; padding is zero."""
    if layout.source_P is None or layout.padding is None:
        return x_SC if gates_S1 is None else x_SC * gates_S1
    if gates_S1 is not None:
        return _gather(x_SC, layout.source_P, _pad(gates_S1, layout))
    return x_SC.index_select(0, layout.source_P).index_fill_(0, layout.padding, 0)


def _unpad(x_PC: Tensor, layout: _Layout, gates_S1: Tensor | None = None) -> Tensor:
    """The rows without padding, times their gates."""
    if layout.target_S is None:
        return x_PC if gates_S1 is None else x_PC * gates_S1
    return x_PC.index_select(0, layout.target_S) if gates_S1 is None else _gather(x_PC, layout.target_S, gates_S1)


def _gather(x_NC: Tensor, index_R: Tensor, factor_R1: Tensor) -> Tensor:
    """`x[index] * factor` in one pass, in less than a third of the time of two."""
    return F.embedding_bag(index_R[:, None], x_NC, mode="sum", per_sample_weights=factor_R1)


def _cast(weights: Weights, dtype: torch.dtype) -> Weights:
    w1, w2, w3 = (w.to(dtype) for w in weights)
    return w1, w2, w3


def _copy_for_blocks(weights: Weights, layout: _Layout) -> Weights:
    """The weights of each block, or of each expert."""
    if layout.expert_B is None:
        return weights
    w1, w2, w3 = (w.index_select(0, layout.expert_B) for w in weights)
    return w1, w2, w3


def _sum_over_blocks(dw_BFD: Tensor, layout: _Layout) -> Tensor:
    """The gradient of each expert's weights, added in float32."""
    if layout.expert_B is None:
        return dw_BFD
    assert layout.order_B is not None
    return F.embedding_bag(layout.order_B, dw_BFD.flatten(1), layout.first_E, mode="sum").view(-1, *dw_BFD.shape[1:])


def _forward(x_PD: Tensor, weights: Weights, layout: _Layout, activation: str, saved: tuple[Tensor, ...] = ()) -> Tensor:
    """The outputs without gates; the hidden activations w1 x and w3 x are written to `saved`, `(P, F)` each, if given."""
    act, _, options = ACTIVATIONS[activation]
    w1_BFD, w2_BDF, w3_BFD = weights
    y_PD = torch.empty_like(x_PD)
    for group in layout.groups:
        w1, w2, w3 = w1_BFD[group.weights], w2_BDF[group.weights], w3_BFD[group.weights]
        x, (out_a, out_b) = group.take(x_PD), map(group.take, saved) if saved else (None, None)
        a, b = torch.bmm(x, w1.mT, out=out_a), torch.bmm(x, w3.mT, out=out_b)
        torch.bmm(act(a, **options).mul_(b), w2.mT, out=group.take(y_PD))
    return y_PD


class _GroupedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_SD: Tensor,
        gates_S1: Tensor | None,
        w1_EFD: Tensor,
        w2_EDF: Tensor,
        w3_EFD: Tensor,
        layout: _Layout,
        dtype: torch.dtype,
        activation: str,
        recompute: bool,
    ) -> Tensor:
        ctx.activation, ctx.layout, ctx.input_dtype, ctx.weight_dtype = activation, layout, x_SD.dtype, w1_EFD.dtype
        x_PD = _pad(x_SD.to(dtype), layout)
        weights = _cast((w1_EFD, w2_EDF, w3_EFD), dtype)
        copies = _copy_for_blocks(weights, layout)
        saved = () if recompute else tuple(x_PD.new_empty(len(x_PD), w1_EFD.shape[1]) for _ in range(2))
        y_PD = _forward(x_PD, copies, layout, activation, saved)
        kept = weights if recompute else copies
        ctx.save_for_backward(x_PD, gates_S1, None if gates_S1 is None else y_PD, *kept, *saved)
        return _unpad(y_PD, layout, gates_S1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_PD, gates_S1, y_PD, w1, w2, w3, *saved = ctx.saved_tensors
        layout = ctx.layout
        w1_BFD, w2_BDF, w3_BFD = (w1, w2, w3) if saved else _copy_for_blocks((w1, w2, w3), layout)
        act, act_backward, options = ACTIVATIONS[ctx.activation]
        dgates_S1 = None if y_PD is None else (grads[0] * _unpad(y_PD, layout)).sum(dim=-1, keepdim=True)
        dy_PD, dx_PD = _pad(grads[0], layout, gates_S1), torch.empty_like(x_PD)
        dw1_BFD, dw2_BDF, dw3_BFD = (torch.empty_like(w) for w in (w1_BFD, w2_BDF, w3_BFD))
        for group in layout.groups:
            own = group.weights
            x, dy, w1, w2, w3 = group.take(x_PD), group.take(dy_PD), w1_BFD[own], w2_BDF[own], w3_BFD[own]
            a, b = map(group.take, saved) if saved else (torch.bmm(x, w1.mT), torch.bmm(x, w3.mT))
            s = act(a, **options)
            h = s * b
            torch.bmm(dy.mT, h, out=dw2_BDF[own])
            dh = torch.bmm(dy, w2)
            db = s.mul_(dh)
            torch.bmm(db.mT, x, out=dw3_BFD[own])
            da = act_backward(torch.mul(dh, b, out=h), a, **options)
            torch.bmm(da.mT, x, out=dw1_BFD[own])
            torch.bmm(da, w1, out=group.take(dx_PD)).baddbmm_(db, w3)
        dweights = [_sum_over_blocks(dw, layout).to(ctx.weight_dtype) for dw in (dw1_BFD, dw2_BDF, dw3_BFD)]
        return _unpad(dx_PD, layout).to(ctx.input_dtype), dgates_S1, *dweights, None, None, None, None
