"""Dispatch of tokens to experts, and combination of the experts' outputs.

A `TokenDispatcher` sorts rows by expert before the experts compute, and sums each token's outputs afterwards.
`LocalDispatcher` is for experts of this process; expert parallelism replaces it by an all-to-all dispatcher.

Both directions are gathers along a permutation, and each is the other's gradient: autograd's own scatter-add is slow on
CPUs and nondeterministic on GPUs.

Shapes: N tokens, D model width, E experts, K choices per token, M = N*K assignments, S assignments that reach an expert
(S = M unless some are dropped), sorted by expert.
"""

import math
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moelm.model.backend import eager_on_cpu
from moelm.model.moe.router import Routing


class Permutation(NamedTuple):
    """The assignments sorted by expert."""

    order_S: Tensor
    """Index n*K + k of the assignment in each sorted row."""
    row_NK: Tensor
    """Sorted row of each assignment; S for those that reach no expert."""
    ends_E: Tensor
    """End of each expert's rows."""

    @property
    def token_S(self) -> Tensor:
        """Token of each sorted row."""
        return self.order_S // self.row_NK.shape[1]


class DispatchedRows(NamedTuple):
    """The input of the experts."""

    x_SD: Tensor
    """Rows sorted by expert."""
    gates_S: Tensor
    """Gate of each row."""
    ends_E: Tensor
    """End of each expert's rows."""
    combine_state: Any
    """What `combine` needs; private to the dispatcher that made it."""


class TokenDispatcher(ABC):
    """Moves tokens to the experts and their outputs back."""

    @abstractmethod
    def dispatch(self, x_ND: Tensor, routing: Routing) -> DispatchedRows:
        """Gather a row for each assignment, sorted by expert."""

    @abstractmethod
    def combine(self, y_SD: Tensor, rows: DispatchedRows) -> Tensor:
        """Sum the expert outputs of each token, `(N, D)`; already multiplied by their gates."""


class LocalDispatcher(TokenDispatcher):
    """Dispatch to experts of this process: a permutation."""

    def dispatch(self, x_ND: Tensor, routing: Routing) -> DispatchedRows:
        """Sort the assignments by expert."""
        permutation = sort_by_expert(routing)
        gates_S = routing.gates_NK.flatten().index_select(0, permutation.order_S)
        return DispatchedRows(permute(x_ND, permutation), gates_S, permutation.ends_E, permutation)

    def combine(self, y_SD: Tensor, rows: DispatchedRows) -> Tensor:
        """Undo the permutation and sum over each token's choices."""
        return unpermute(y_SD, rows.combine_state)


def sort_by_expert(routing: Routing) -> Permutation:
    """Sort the assignments by expert, in token order within each expert.

    No value is copied to the host, except with dropped assignments or expert choice.
    """
    experts_M = routing.experts_NK.flatten()
    unassigned_NK = routing.dropped_NK
    if routing.chosen_NK is not None:
        unassigned_NK = ~routing.chosen_NK if unassigned_NK is None else unassigned_NK | ~routing.chosen_NK
    if unassigned_NK is not None:
        experts_M = experts_M.masked_fill(unassigned_NK.flatten(), routing.num_experts)
    order_M, ends_E = _stable_order(experts_M, routing.num_experts)
    row_M = torch.empty_like(order_M).scatter_(0, order_M, torch.arange(len(order_M), device=order_M.device))
    if unassigned_NK is not None:
        num_rows = int(ends_E[-1])
        order_M, row_M = order_M[:num_rows], row_M.clamp_max(num_rows)
    return Permutation(order_M, row_M.view_as(routing.experts_NK), ends_E)


def _stable_order(experts_M: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """The order that sorts assignments by expert, and the end of each expert's assignments in it."""
    if eager_on_cpu(experts_M) and num_experts < torch.iinfo(torch.int16).max:
        # numpy sorts 16-bit integers by radix, in a tenth of the time of torch.
        order_M = torch.from_numpy(experts_M.to(torch.int16).numpy().argsort(kind="stable"))
        return order_M, torch.bincount(experts_M, minlength=num_experts)[:num_experts].cumsum(0)
    sorted_M, order_M = experts_M.sort(stable=True)
    return order_M, torch.searchsorted(sorted_M, torch.arange(num_experts, device=experts_M.device), right=True)


def drop_over_capacity(routing: Routing, capacity_factor: float, valid_N: Tensor | None) -> Routing:
    """Mark the assignments beyond their expert's capacity as dropped (GShard, Lepikhin et al. 2020, algorithm 1).

    The capacity is `capacity_factor * N * k / E` tokens of the forward pass, rounded up. It is filled with all first
    choices in token order, then all second choices, and so on. Padding is not counted.
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
    position_M = torch.empty_like(order_M)
    position_M[order_M] = torch.arange(len(order_M), device=order_M.device) - first_E[experts_M[order_M]]
    dropped_M = (position_M >= capacity) | (experts_M == routing.num_experts)
    return routing._replace(dropped_NK=dropped_M.view(top_k, -1).t())


def permute(x_ND: Tensor, permutation: Permutation) -> Tensor:
    """Gather the token of each sorted row, `(S, D)`."""
    x_SD: Tensor = _Permute.apply(x_ND, permutation.token_S, permutation.row_NK)  # type: ignore[no-untyped-call]
    return x_SD


def unpermute(y_SD: Tensor, permutation: Permutation) -> Tensor:
    """Sum the sorted rows of each token, `(N, D)`."""
    y_ND: Tensor = _Unpermute.apply(y_SD, permutation.token_S, permutation.row_NK)  # type: ignore[no-untyped-call]
    return y_ND


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, token_S: Tensor, row_NK: Tensor) -> Tensor:
        ctx.save_for_backward(row_NK)
        return x_ND.index_select(0, token_S)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (row_NK,) = ctx.saved_tensors
        return _sum_of_rows(grads[0], row_NK), None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_SD: Tensor, token_S: Tensor, row_NK: Tensor) -> Tensor:
        ctx.save_for_backward(token_S)
        return _sum_of_rows(y_SD, row_NK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (token_S,) = ctx.saved_tensors
        return grads[0].index_select(0, token_S), None, None


def _sum_of_rows(y_SD: Tensor, row_NK: Tensor) -> Tensor:
    """`sum_k y[row[n, k]]`, added in the order of k; row index S stands for no expert and adds zero."""
    if len(y_SD) < row_NK.numel():
        y_SD = torch.cat((y_SD, y_SD.new_zeros(1, y_SD.shape[1])))
    if eager_on_cpu(y_SD):
        return F.embedding_bag(row_NK, y_SD, mode="sum")  # in one pass, added in float32 and rounded once
    total_ND = y_SD.index_select(0, row_NK[:, 0])
    for k in range(1, row_NK.shape[1]):
        total_ND += y_SD.index_select(0, row_NK[:, k])
    return total_ND
