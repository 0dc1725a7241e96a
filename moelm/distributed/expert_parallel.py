"""Experts dealt out over processes: tokens travel to them and back (Shazeer et al. 2017, section 3.1; GShard 2020).

Each process sends its rows to the processes of their experts, which so see the rows of all, and gets the results back.

Shapes: S rows sent, R rows received, D model width, E experts, P processes, L = E/P experts of one process.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moelm.model.dispatch import Dispatch, combine, send
from moelm.model.experts import Compute
from moelm.model.passes import compute_dtype


class ExpertExchange:
    """The way of tokens to experts on other processes, and back.

    Args:
        group: the processes; the one of rank p has experts `p * L` up to `(p + 1) * L`.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.size = group, dist.get_world_size(group)

    def __call__(self, x_SD: Tensor, gates_S: Tensor, ends_E: Tensor, compute: Compute) -> Tensor:
        """Results of this process's rows.

        Args:
            x_SD: rows sorted by expert, of any number, none included.
            gates_S: weight of each row's result.
            ends_E: where each expert's rows end, of all experts.
            compute: what the experts here do with rows sorted by expert.
        """
        counts_PL = ends_E.diff(prepend=ends_E.new_zeros(1)).view(self.size, -1)
        arriving_PL = torch.empty_like(counts_PL)
        dist.all_to_all_single(arriving_PL, counts_PL, group=self.group)
        sent, arriving = torch.stack((counts_PL.sum(1), arriving_PL.sum(1))).tolist()
        dtype = compute_dtype(x_SD)
        x_RD, gates_R1 = _travel((x_SD.to(dtype), gates_S[:, None]), sent, arriving, self.group)
        plan = _by_expert(arriving_PL)
        y_RD = compute(send(x_RD, plan), send(gates_R1, plan)[:, 0], plan.ends_E)
        (y_SD,) = _travel((combine(y_RD, plan),), arriving, sent, self.group)
        return y_SD


def _by_expert(arriving_PL: Tensor) -> Dispatch:
    """Rows arrive by process and, of each, by expert; experts want theirs together."""
    experts_R = torch.arange(arriving_PL.shape[1], device=arriving_PL.device).repeat(len(arriving_PL))
    order_R = experts_R.repeat_interleave(arriving_PL.flatten()).argsort(stable=True)
    row_R = torch.empty_like(order_R)
    row_R[order_R] = torch.arange(len(order_R), device=order_R.device)
    return Dispatch(order_R, row_R[:, None], arriving_PL.sum(0).cumsum(0))


def _travel(
    tensors: tuple[Tensor, ...], sent: list[int], arriving: list[int], group: dist.ProcessGroup
) -> tuple[Tensor, ...]:
    moved: tuple[Tensor, ...] = _Travel.apply(sent, arriving, group, *tensors)  # type: ignore[no-untyped-call]
    return moved


class _Travel(torch.autograd.Function):
    """All-to-all of rows; gradients go the same way back, in the same order on every process."""

    @staticmethod
    def forward(ctx: Any, sent: list[int], arriving: list[int], group: dist.ProcessGroup, *tensors: Tensor) -> Any:
        ctx.way = sent, arriving, group
        return tuple(_all_to_all(tensor, sent, arriving, group) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        sent, arriving, group = ctx.way
        return None, None, None, *(_all_to_all(grad, arriving, sent, group) for grad in grads)


def _all_to_all(rows: Tensor, sent: list[int], arriving: list[int], group: dist.ProcessGroup) -> Tensor:
    moved = rows.new_empty(sum(arriving), *rows.shape[1:])
    dist.all_to_all_single(moved, rows.contiguous(), arriving, sent, group=group)
    return moved
