"""Moving tokens to their experts and the results back: sort by expert, gather, weigh, sum.

Both directions are gathers along a permutation and so are their gradients: autograd's own scatter-add is slow on CPUs and,
on GPUs, differs from run to run.

Shapes: N tokens, D model width, K choices per token, M = N*K of them, S assignments that reach an expert (S = M unless some
are dropped), sorted by expert.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moelm.model.router import Routing


class Dispatch(NamedTuple):
    """Which assignment sits where once they are sorted by expert."""

    order_S: Tensor
    """The choice n*K + k that each sorted row serves."""
    row_M: Tensor
    """The sorted row of each choice; S for those that reach no expert."""
    counts: list[int]
    """Rows of each expert."""
    top_k: int

    @property
    def complete(self) -> bool:
        """Whether every choice reaches its expert."""
        return len(self.order_S) == len(self.row_M)


def plan_dispatch(routing: Routing) -> Dispatch:
    """Sort the assignments by expert, in token order within each."""
    experts_M = routing.experts_NK.flatten()
    away_NK = routing.dropped_NK
    if routing.chosen_NK is not None:
        away_NK = ~routing.chosen_NK if away_NK is None else away_NK | ~routing.chosen_NK
    if away_NK is not None:
        experts_M = experts_M.masked_fill(away_NK.flatten(), routing.num_experts)
    order_M = experts_M.argsort(stable=True)
    row_M = torch.empty_like(order_M)
    row_M[order_M] = torch.arange(len(order_M), device=order_M.device)
    counts = torch.bincount(experts_M, minlength=routing.num_experts).tolist()[: routing.num_experts]
    reached = sum(counts)
    return Dispatch(order_M[:reached], row_M.clamp_max(reached), counts, routing.experts_NK.shape[1])


def drop_over_capacity(routing: Routing, capacity_factor: float, valid_N: Tensor | None) -> Routing:
    """Mark the assignments for which their expert has no place left (GShard, Lepikhin et al. 2020, algorithm 1).

    An expert takes `capacity_factor * N * k / E` tokens of the forward pass, rounded up: all first choices in token order,
    then all second ones. Padding takes no place.
    """
    tokens, top_k = routing.experts_NK.shape
    experts_KN = routing.experts_NK.t()
    if valid_N is not None:
        tokens = int(valid_N.sum())
        experts_KN = torch.where(valid_N, experts_KN, routing.num_experts)
    capacity = math.ceil(capacity_factor * tokens * top_k / routing.num_experts)
    experts_M = experts_KN.flatten()
    order_M = experts_M.argsort(stable=True)
    counts_E = torch.bincount(experts_M, minlength=routing.num_experts + 1)
    first_E = counts_E.cumsum(0) - counts_E
    place_M = torch.empty_like(order_M)
    place_M[order_M] = torch.arange(len(order_M), device=order_M.device) - first_E[experts_M[order_M]]
    full_M = (place_M >= capacity) | (experts_M == routing.num_experts)
    return routing._replace(dropped_NK=full_M.view(top_k, -1).t())


class _Scatter(torch.autograd.Function):
    """Copies of the tokens, sorted by expert."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, plan: Dispatch) -> Tensor:
        ctx.plan = plan
        return x_ND.index_select(0, plan.order_S // plan.top_k)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        plan: Dispatch = ctx.plan
        rows_NK = plan.row_M.view(-1, plan.top_k)
        grad_SD = _with_zero_row(grads[0], plan)
        return sum_of_rows(grad_SD, rows_NK), None


class _Combine(torch.autograd.Function):
    """Each token's results, weighed and summed, without a copy of them per choice."""

    @staticmethod
    def forward(ctx: Any, y_SD: Tensor, gates_NK: Tensor, plan: Dispatch) -> Tensor:
        ctx.plan = plan
        ctx.save_for_backward(y_SD, gates_NK)
        return sum_of_rows(_with_zero_row(y_SD, plan), plan.row_M.view(-1, plan.top_k), gates_NK.to(y_SD.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        plan: Dispatch = ctx.plan
        y_SD, gates_NK = ctx.saved_tensors
        grad_SD = grads[0].index_select(0, plan.order_S // plan.top_k)
        grad_gate_S = (grad_SD * y_SD).sum(dim=-1, dtype=gates_NK.dtype)
        grad_gate_M = _with_zero_row(grad_gate_S, plan).index_select(0, plan.row_M)
        gates_S1 = gates_NK.flatten().index_select(0, plan.order_S)[:, None]
        return grad_SD * gates_S1.to(grad_SD.dtype), grad_gate_M.view_as(gates_NK), None


def sum_of_rows(y_SD: Tensor, rows_NK: Tensor, weights_NK: Tensor | None = None) -> Tensor:
    """`sum_k weights[n, k] * y[rows[n, k]]`, added up in the order of k."""
    total_ND = y_SD.index_select(0, rows_NK[:, 0])
    if weights_NK is not None:
        total_ND *= weights_NK[:, :1]
    for k in range(1, rows_NK.shape[1]):
        y_ND = y_SD.index_select(0, rows_NK[:, k])
        if weights_NK is None:
            total_ND += y_ND
        else:
            total_ND.addcmul_(y_ND, weights_NK[:, k : k + 1])
    return total_ND


def _with_zero_row(rows: Tensor, plan: Dispatch) -> Tensor:
    """What a choice that reached no expert finds at row S."""
    return rows if plan.complete else torch.cat((rows, rows.new_zeros(1, *rows.shape[1:])))


def send(x_ND: Tensor, plan: Dispatch) -> Tensor:
    """Tokens to experts: `(S, D)`, sorted by expert."""
    sent: Tensor = _Scatter.apply(x_ND, plan)  # type: ignore[no-untyped-call]
    return sent


def combine(y_SD: Tensor, gates_NK: Tensor, plan: Dispatch) -> Tensor:
    """Results back to tokens: each one's, weighed by the gates and summed, `(N, D)`."""
    combined: Tensor = _Combine.apply(y_SD, gates_NK, plan)  # type: ignore[no-untyped-call]
    return combined
