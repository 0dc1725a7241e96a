"""SwiGLU (or GeGLU) feed-forward blocks: one block, and a stack of experts on rows sorted by expert.

`grouped_swiglu_loop` is the reference, `grouped_swiglu_cpu` is for CPUs, `grouped_swiglu_cuda` for GPUs. On a CPU, a dense
block is computed as one expert that gets all rows.

Shapes: S rows sorted by expert, D model width, F hidden width, E experts.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moelm.model.backend import compute_dtype, use_custom_backward

Weights = tuple[Tensor, Tensor, Tensor]
"""w1, w2 and w3, named as in Mixtral; for experts, stacks of them."""

ALIGN = 64
"""Multiple that the row counts of low-precision CPU products are rounded up to: oneDNN compiles a kernel for each row
count, and an expert's row count changes at every step."""

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


def _spans(ends_E: Tensor) -> list[tuple[int, int]]:
    """First row of each expert, and the row after its last."""
    ends = ends_E.tolist()
    return list(zip([0, *ends], ends, strict=False))


def grouped_swiglu_loop(
    x_SD: Tensor,
    ends_E: Tensor,
    weights: Weights,
    activation: str,
    gates_S: Tensor | None = None,
) -> Tensor:
    """Reference implementation: one expert after another, differentiated by autograd."""
    parts = []
    # Unbound once: indexing the stacks in the loop would make the backward pass write E gradients of full size.
    for (start, end), w1, w2, w3 in zip(_spans(ends_E), *(w.unbind() for w in weights), strict=True):
        parts.append(swiglu(x_SD[start:end], w1, w2, w3, activation))
    y_SD = torch.cat(parts)
    return y_SD if gates_S is None else y_SD * gates_S[:, None].to(y_SD.dtype)


def grouped_swiglu_cuda(
    x_SD: Tensor,
    ends_E: Tensor,
    weights: Weights,
    activation: str,
    gates_S: Tensor | None = None,
) -> Tensor:
    """All experts in one kernel; row bounds stay on the device, so a compiler has no graph break."""
    dtype = compute_dtype(x_SD)
    act, _, options = ACTIVATIONS[activation]
    w1, w2, w3 = (w.to(dtype).transpose(1, 2) for w in weights)
    x_SD = x_SD.to(dtype)
    ends_E = ends_E.to(torch.int32)
    h_SF = act(F.grouped_mm(x_SD, w1, offs=ends_E), **options) * F.grouped_mm(x_SD, w3, offs=ends_E)
    if gates_S is not None:
        h_SF = h_SF * gates_S[:, None].to(dtype)
    return F.grouped_mm(h_SF, w2, offs=ends_E)


def grouped_swiglu_cpu(
    x_SD: Tensor,
    ends_E: Tensor,
    weights: Weights,
    activation: str,
    gates_S: Tensor | None = None,
    recompute: bool = False,
) -> Tensor:
    """One expert after another, with a custom backward that stores two of five hidden activations and works in place."""
    dtype = compute_dtype(x_SD)
    gates_S1 = None if gates_S is None else gates_S[:, None].to(dtype)
    slices = _slices(ends_E, dtype)
    if not torch.is_grad_enabled():
        cast = (weights[0].to(dtype), weights[1].to(dtype), weights[2].to(dtype))
        padded_SD, padded_S1 = _cast(x_SD, dtype, slices), _cast(gates_S1, None, slices)
        return _forward_slices(padded_SD, padded_S1, cast, slices, activation)[: len(x_SD)]
    y_SD: Tensor = _GroupedSwiGLU.apply(x_SD, gates_S1, *weights, slices, dtype, activation, recompute)  # type: ignore[no-untyped-call]
    return y_SD


class _Slice(NamedTuple):
    """One expert's rows, `start` to `end`; products include the rows up to `stop`, whose results are discarded."""

    start: int
    end: int
    stop: int


def _slices(ends_E: Tensor, dtype: torch.dtype) -> list[_Slice]:
    step = 1 if dtype.itemsize >= 4 else ALIGN
    return [_Slice(start, end, start + -(-(end - start) // step) * step) for start, end in _spans(ends_E)]


def _cast(x_SC: Tensor | None, dtype: torch.dtype | None, slices: list[_Slice]) -> Any:
    """The rows in another dtype, padded with zeros where a slice exceeds them."""
    if x_SC is None:
        return None
    rows = max([len(x_SC), *(piece.stop for piece in slices)])
    if rows == len(x_SC):
        return x_SC.to(dtype or x_SC.dtype)
    y_SC = x_SC.new_zeros(rows, x_SC.shape[1], dtype=dtype)
    y_SC[: len(x_SC)] = x_SC
    return y_SC


def _forward_slices(
    x_SD: Tensor,
    gates_S1: Tensor | None,
    weights: Weights,
    slices: list[_Slice],
    activation: str,
    saved: list[Tensor] | None = None,
) -> Tensor:
    """The outputs; the hidden activations w1 x and w3 x of each expert are appended to `saved`.

    Experts are computed in order: rows past a slice's end belong to later experts, which overwrite them.
    """
    act, _, options = ACTIVATIONS[activation]
    w1_EFD, w2_EDF, w3_EFD = weights
    y_SD = torch.empty_like(x_SD)
    for e, (start, end, stop) in enumerate(slices):
        if start == end and saved is None:
            continue  # the weights of an expert without rows are not read
        x = x_SD[start:stop]
        a, b = x @ w1_EFD[e].t(), x @ w3_EFD[e].t()
        h = act(a, **options).mul_(b)
        if gates_S1 is not None:
            h *= gates_S1[start:stop]
        torch.mm(h, w2_EDF[e].t(), out=y_SD[start:stop])
        if saved is not None:
            saved += (a, b)
    return y_SD


class _GroupedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_SD: Tensor,
        gates_S1: Tensor | None,
        w1_EFD: Tensor,
        w2_EDF: Tensor,
        w3_EFD: Tensor,
        slices: list[_Slice],
        dtype: torch.dtype,
        activation: str,
        recompute: bool,
    ) -> Tensor:
        ctx.activation, ctx.slices, ctx.input_dtype, ctx.weight_dtype = activation, slices, x_SD.dtype, w1_EFD.dtype
        ctx.rows = len(x_SD)
        x_SD, gates_S1 = _cast(x_SD, dtype, slices), _cast(gates_S1, None, slices)
        w1_EFD, w2_EDF, w3_EFD = (weight.to(dtype) for weight in (w1_EFD, w2_EDF, w3_EFD))
        saved: list[Tensor] = []
        y_SD = _forward_slices(x_SD, gates_S1, (w1_EFD, w2_EDF, w3_EFD), slices, activation, None if recompute else saved)
        ctx.save_for_backward(x_SD, gates_S1, w1_EFD, w2_EDF, w3_EFD, *saved)
        return y_SD[: ctx.rows]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of a gate is computed from hidden activations, <w2^T dy, h>, so that no output is stored for it."""
        x_SD, gates_S1, w1_EFD, w2_EDF, w3_EFD, *saved = ctx.saved_tensors
        act, act_backward, options = ACTIVATIONS[ctx.activation]
        dy_SD, dx_SD = _cast(grads[0], x_SD.dtype, ctx.slices), torch.empty_like(x_SD)
        dgates_S1 = None if gates_S1 is None else torch.empty_like(gates_S1)
        dw1_EFD, dw2_EDF, dw3_EFD = (torch.empty_like(w) for w in (w1_EFD, w2_EDF, w3_EFD))
        for e, (start, end, stop) in enumerate(ctx.slices):
            x, dy = x_SD[start:stop], dy_SD[start:stop]
            a, b = saved[2 * e : 2 * e + 2] if saved else (x @ w1_EFD[e].t(), x @ w3_EFD[e].t())
            s = act(a, **options)
            h, dh = s * b, dy @ w2_EDF[e]
            if gates_S1 is not None and dgates_S1 is not None:
                gates = gates_S1[start:stop]
                torch.sum(dh * h, dim=-1, keepdim=True, dtype=gates.dtype, out=dgates_S1[start:stop])
                h *= gates
                dh *= gates
            if stop > end:  # rows of other experts do not contribute
                h[end - start :], dh[end - start :] = 0, 0
            torch.mm(dy.t(), h, out=dw2_EDF[e])
            db = s.mul_(dh)
            torch.mm(db.t(), x, out=dw3_EFD[e])
            da = act_backward(torch.mul(dh, b, out=h), a, **options)
            torch.mm(da.t(), x, out=dw1_EFD[e])
            torch.mm(da, w1_EFD[e], out=dx_SD[start:stop]).addmm_(db, w3_EFD[e])
        weights = (dw.to(ctx.weight_dtype) for dw in (dw1_EFD, dw2_EDF, dw3_EFD))
        dgates = None if dgates_S1 is None else dgates_S1[: ctx.rows]
        return dx_SD[: ctx.rows].to(ctx.input_dtype), dgates, *weights, None, None, None, None
