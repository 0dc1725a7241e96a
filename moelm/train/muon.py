"""Muon: momentum whose matrices are orthogonalized before they are applied (Jordan et al. 2024; Liu et al. 2025).

Shapes: K matrices, N rows, M columns.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moelm.distributed.matrix_exchange import MatrixExchange
from moelm.model.dtensor import local
from moelm.train.polar import orthogonalize


def update_scale(rows: int, columns: int) -> float:
    """The factor that gives an orthogonal matrix the root mean square of AdamW's updates (Liu et al. 2025, eq. 4)."""
    return 0.2 * math.sqrt(max(rows, columns))


class Muon:
    """Muon's update of the matrices of a model, each orthogonalized by one of the processes that hold it.

    Args:
        parameters: matrices `(N, M)`, and stacks `(K, N, M)`, whose matrices are independent.
        blocks: number of equal blocks of rows of each matrix that are orthogonalized by themselves; 1 for stacks.
        momentum: of Nesterov's form.
        steps: iterations of the orthogonalization.
        dtype: dtype of the orthogonalization and of the messages.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        blocks: Sequence[int],
        momentum: float,
        steps: int,
        dtype: torch.dtype,
    ) -> None:
        self.blocks, self.momentum, self.steps, self.dtype = blocks, momentum, steps, dtype
        self.exchange = MatrixExchange(parameters, blocks)

    def step(
        self,
        groups: Sequence[dict[str, Any]],
        state: Mapping[Tensor, dict[str, Tensor]],
        scale: float,
        zero: Mapping[nn.Parameter, Sequence[bool]],
    ) -> None:
        """Update the parameters of all groups, which are those of the constructor in this order.

        Args:
            state: momentum by parameter.
            scale: factor on all gradients, which are changed.
            zero: for each of a parameter's local matrices, whether its whole gradient is zero. Such a matrix, of an expert
                that no token has selected, and its momentum remain unchanged: the update does not depend on the scale of
                the momentum, so that an old one would move it as far as a new one.
        """
        parameters = [(group, parameter) for group in groups for parameter in group["params"]]
        updates, active = [], [_active(parameter, zero[parameter]) for _, parameter in parameters]
        for (_, parameter), active_K11 in zip(parameters, active, strict=True):
            momentum = _stack(local(state[parameter]["momentum"]))
            gradient = torch.zeros_like(momentum) if parameter.grad is None else _stack(local(parameter.grad))
            if scale < 1:
                gradient.mul_(scale)
            share = 1 - self.momentum
            momentum.lerp_(gradient, share if active_K11 is None else share * active_K11)
            updates.append(gradient.lerp(momentum, self.momentum).to(self.dtype))
        results = self._orthogonalize(self.exchange.gather(updates))
        updates = self.exchange.scatter(results, updates)
        for (group, parameter), blocks, update, active_K11 in zip(parameters, self.blocks, updates, active, strict=True):
            weight, (rows, columns) = _stack(local(parameter)), parameter.shape[-2:]
            decay = group["lr"] * group["weight_decay"]
            step = group["lr"] * update_scale(rows // blocks, columns)
            if active_K11 is None:
                weight.mul_(1 - decay).add_(update, alpha=-step)
            else:
                weight.mul_(1 - decay * active_K11).sub_(update * (step * active_K11))

    def _orthogonalize(self, matrices: Sequence[Tensor]) -> list[Tensor]:
        """Orthogonalize the blocks of the stacks that this process owns, all of the same shape in one batch."""
        blocks = [
            x_KNM.reshape(-1, x_KNM.shape[1] // count, x_KNM.shape[2])
            for x_KNM, count in zip(matrices, self.exchange.owned_blocks, strict=True)
        ]
        batches: dict[torch.Size, list[int]] = defaultdict(list)
        for index, block in enumerate(blocks):
            batches[block.shape[1:]].append(index)
        results: list[Tensor] = list(matrices)
        for indices in batches.values():
            parts = [blocks[index] for index in indices]
            batch = orthogonalize(parts[0] if len(parts) == 1 else torch.cat(parts), self.steps)
            for index, result in zip(indices, torch.split(batch, [len(part) for part in parts]), strict=True):
                results[index] = result.reshape(matrices[index].shape)
        return results


def _stack(matrix: Tensor) -> Tensor:
    return matrix if matrix.dim() == 3 else matrix[None]


def _active(parameter: Tensor, zero: Sequence[bool]) -> Tensor | None:
    """1 for matrices with a gradient and 0 for others, `(K, 1, 1)`; None if all have one."""
    if not any(zero):
        return None
    return torch.tensor([float(not each) for each in zero]).to(parameter.device, non_blocking=True)[:, None, None]
