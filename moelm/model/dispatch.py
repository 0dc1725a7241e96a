"""Moving tokens to their experts and the results back: sort by expert, gather, sum.

Both directions are gathers along a permutation, each the other's gradient: autograd's own scatter-add is slow on CPUs and,
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
    row_NK: Tensor
    """The sorted row of each choice; S for those that reach no expert."""
    ends_E: Tensor
    """Where each expert's rows end."""

    @property
    def token_S(self) -> Tensor:
        """The token of each sorted row."""
        return self.order_S // self.row_NK.shape[1]


def plan_dispatch(routing: Routing) -> Dispatch:
    """Sort the assignments by expert, in token order within each.

    Unless some are dropped, nothing here depends on the host knowing a value.
    """
    experts_M = routing.experts_NK.flatten()
    away_NK = routing.dropped_NK
    if routing.chosen_NK is not None:
        away_NK = ~routing.chosen_NK if away_NK is None else away_NK | ~routing.chosen_NK
    if away_NK is not None:
        experts_M = experts_M.masked_fill(away_NK.flatten(), routing.num_experts)
    sorted_M, order_M = experts_M.sort(stable=True)
    row_M = torch.empty_like(order_M)
    row_M[order_M] = torch.arange(len(order_M), device=order_M.device)
    ends_E = torch.searchsorted(sorted_M, torch.arange(routing.num_experts, device=order_M.device), right=True)
    if away_NK is not None:
        reached = int(ends_E[-1])
        order_M, row_M = order_M[:reached], row_M.clamp_max(reached)
    return Dispatch(order_M, row_M.view_as(routing.experts_NK), ends_E)


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


def send(x_ND: Tensor, plan: Dispatch) -> Tensor:
    """Tokens to experts: `(S, D)`, sorted by expert."""
    sent: Tensor = _Send.apply(x_ND, plan.token_S, plan.row_NK)  # type: ignore[no-untyped-call]
    return sent


def combine(y_SD: Tensor, plan: Dispatch) -> Tensor:
    """Results back to tokens: the sum of each one's, `(N, D)`."""
    combined: Tensor = _Combine.apply(y_SD, plan.token_S, plan.row_NK)  # type: ignore[no-untyped-call]
    return combined


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, token_S: Tensor, row_NK: Tensor) -> Tensor:
        ctx.save_for_backward(row_NK)
        return x_ND.index_select(0, token_S)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (row_NK,) = ctx.saved_tensors
        return _sum_of_rows(grads[0], row_NK), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_SD: Tensor, token_S: Tensor, row_NK: Tensor) -> Tensor:
        ctx.save_for_backward(token_S)
        return _sum_of_rows(y_SD, row_NK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (token_S,) = ctx.saved_tensors
        return grads[0].index_select(0, token_S), None, None


def _sum_of_rows(y_SD: Tensor, row_NK: Tensor) -> Tensor:
    """`sum_k y[row[n, k]]`, added up in the order of k; row S is zero."""
    if len(y_SD) < row_NK.numel():
        y_SD = torch.cat((y_SD, y_SD.new_zeros(1, y_SD.shape[1])))
    total_ND = y_SD.index_select(0, row_NK[:, 0])
    for k in range(1, row_NK.shape[1]):
        total_ND += y_SD.index_select(0, row_NK[:, k])
    return total_ND
