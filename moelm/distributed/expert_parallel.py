"""Dispatch to experts that are sharded over processes (Shazeer et al. 2017, section 3.1; GShard 2020).

Each process sends its rows to the processes that hold their experts, and gets the outputs back.

Shapes: N tokens, S rows sent, R rows received, D model width, E experts, P processes, L = E/P experts per process.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moelm.model.backend import compute_dtype
from moelm.model.moe.dispatcher import DispatchedRows, LocalDispatcher, Permutation, TokenDispatcher, permute, unpermute
from moelm.model.moe.router import Routing


class _ExchangeState(NamedTuple):
    """How expert outputs return to their tokens."""

    local: DispatchedRows
    """Rows before the exchange."""
    by_expert: Permutation
    """Sorts received rows by expert."""
    sent: list[int]
    """Rows sent to each process."""
    received: list[int]
    """Rows received from each process."""


class AllToAllDispatcher(TokenDispatcher):
    """Dispatch to experts on several processes: a local permutation, an all-to-all, and a second permutation.

    Args:
        group: the processes; rank p holds experts `p * L` to `(p + 1) * L`.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.size = group, dist.get_world_size(group)
        self.local = LocalDispatcher()

    def dispatch(self, x_ND: Tensor, routing: Routing) -> DispatchedRows:
        """Send each row to its expert's process; the result holds the rows of this process's experts."""
        local = self.local.dispatch(x_ND, routing)
        counts_PL = local.ends_E.diff(prepend=local.ends_E.new_zeros(1)).view(self.size, -1)
        received_PL = torch.empty_like(counts_PL)
        dist.all_to_all_single(received_PL, counts_PL, group=self.group)
        sent, received = torch.stack((counts_PL.sum(1), received_PL.sum(1))).tolist()
        x_SD = local.x_SD.to(compute_dtype(local.x_SD))
        x_RD, gates_R1 = _all_to_all((x_SD, local.gates_S[:, None]), sent, received, self.group)
        by_expert = _sort_received(received_PL, sum(received))
        return DispatchedRows(
            permute(x_RD, by_expert),
            permute(gates_R1, by_expert)[:, 0],
            by_expert.ends_E,
            _ExchangeState(local, by_expert, sent, received),
        )

    def combine(self, y_SD: Tensor, rows: DispatchedRows) -> Tensor:
        """Send the outputs back and sum over each token's choices."""
        state: _ExchangeState = rows.combine_state
        (y_SD,) = _all_to_all((unpermute(y_SD, state.by_expert),), state.received, state.sent, self.group)
        return self.local.combine(y_SD, state.local)


def _sort_received(received_PL: Tensor, num_rows: int) -> Permutation:
    """Rows are received by process and, within a process, by expert; this sorts them by expert."""
    local_expert_PL = torch.arange(received_PL.shape[1], device=received_PL.device).expand_as(received_PL)
    # Without the number of rows, the host would wait for it.
    expert_R = local_expert_PL.flatten().repeat_interleave(received_PL.flatten(), output_size=num_rows)
    order_R = expert_R.argsort(stable=True)
    row_R = torch.empty_like(order_R)
    row_R[order_R] = torch.arange(len(order_R), device=order_R.device)
    return Permutation(order_R, row_R[:, None], received_PL.sum(0).cumsum(0))


def _all_to_all(
    tensors: tuple[Tensor, ...], sent: list[int], received: list[int], group: dist.ProcessGroup
) -> tuple[Tensor, ...]:
    moved: tuple[Tensor, ...] = _AllToAll.apply(sent, received, group, *tensors)  # type: ignore[no-untyped-call]
    return moved


class _AllToAll(torch.autograd.Function):
    """All-to-all of rows; gradients return in the same order on every process."""

    @staticmethod
    def forward(ctx: Any, sent: list[int], received: list[int], group: dist.ProcessGroup, *tensors: Tensor) -> Any:
        ctx.exchange = sent, received, group
        return tuple(_exchange(tensor, sent, received, group) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        sent, received, group = ctx.exchange
        return None, None, None, *(_exchange(grad, received, sent, group) for grad in grads)


def _exchange(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    result = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(result, rows.contiguous(), received, sent, group=group)
    return result
