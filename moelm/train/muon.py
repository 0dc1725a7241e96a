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

_GREEDY = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
_MARGIN = 1.01
"""Singular values may exceed 1 by this factor, because of rounding."""
COEFFICIENTS = [(a / _MARGIN, b / _MARGIN**3, c / _MARGIN**5) for a, b, c in _GREEDY[:-1]] + [_GREEDY[-1]] * 3
"""a, b, c of p(x) = a x + b x^3 + c x^5 for each iteration: Polar Express (Amsel et al. 2025, algorithm 1). For any number
of iterations their composition is the best approximation of 1 on singular values between 0.001 and 1."""


def orthogonalize(x_KNM: Tensor, steps: int) -> Tensor:
    """The polar factors U V^T of matrices U S V^T, approximately; singular values far below the largest stay small.

    Products are in the dtype of the matrices. A zero matrix remains zero.
    """
    if x_KNM.shape[1] > x_KNM.shape[2]:
        return orthogonalize(x_KNM.mT, steps).mT
    norm_K11 = torch.linalg.matrix_norm(x_KNM, keepdim=True, dtype=torch.float32)
    x_KNM = x_KNM * (1 / (_MARGIN * norm_K11).clamp_min(1e-30)).to(x_KNM.dtype)
    for a, b, c in COEFFICIENTS[:steps]:
        gram_KNN = x_KNM @ x_KNM.mT
        factor_KNN = torch.baddbmm(gram_KNN, gram_KNN, gram_KNN, beta=b, alpha=c)
        x_KNM = torch.baddbmm(x_KNM, factor_KNN, x_KNM, beta=a)
    return x_KNM


def update_scale(rows: int, columns: int) -> float:
    """The factor that gives an orthogonal matrix the root mean square of AdamW's updates (Liu et al. 2025, eq. 4)."""
    return 0.2 * math.sqrt(max(rows, columns))


class Muon:
    """Muon's update of the matrices of a model, each orthogonalized by one of the processes that hold it.

    Args:
        parameters: matrices `(N, M)`, and stacks `(K, N, M)`, whose matrices are independent.
        momentum: of Nesterov's form.
        steps: iterations of the orthogonalization.
        dtype: dtype of the orthogonalization and of the messages.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], momentum: float, steps: int, dtype: torch.dtype) -> None:
        self.momentum, self.steps, self.dtype = momentum, steps, dtype
        self.exchange = MatrixExchange(parameters)

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
            scale: factor on all gradients.
            zero: for each of a parameter's local matrices, whether its whole gradient is zero. Such a matrix, of an expert
                that no token has selected, and its momentum remain unchanged: the update does not depend on the scale of
                the momentum, so that an old one would move it as far as a new one.
        """
        parameters = [(group, parameter) for group in groups for parameter in group["params"]]
        updates = []
        for _, parameter in parameters:
            momentum, active_K11 = _stack(local(state[parameter]["momentum"])), _active(parameter, zero[parameter])
            gradient = torch.zeros_like(momentum) if parameter.grad is None else _stack(local(parameter.grad))
            share = scale * (1 - self.momentum)
            kept = self.momentum if active_K11 is None else 1 - (1 - self.momentum) * active_K11
            momentum.mul_(kept).add_(gradient, alpha=share)
            updates.append((gradient * share).add_(momentum, alpha=self.momentum).to(self.dtype))
        results = self._orthogonalize(self.exchange.gather(updates))
        for (group, parameter), update in zip(parameters, self.exchange.scatter(results, updates), strict=True):
            lr, weight, active_K11 = group["lr"], _stack(local(parameter)), _active(parameter, zero[parameter])
            decay: float | Tensor = lr * group["weight_decay"]
            step = lr * update_scale(*parameter.shape[-2:])
            if active_K11 is None:
                weight.mul_(1 - decay).add_(update, alpha=-step)
            else:
                weight.mul_(1 - decay * active_K11).sub_(update * (step * active_K11))

    def _orthogonalize(self, matrices: Sequence[Tensor]) -> list[Tensor]:
        """Orthogonalize stacks, those of the same shape, up to transposition, in one batch."""
        batches: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, x_KNM in enumerate(matrices):
            batches[tuple(sorted(x_KNM.shape[1:]))].append(index)
        results: list[Tensor] = list(matrices)
        for (short, _), indices in batches.items():
            batch = torch.cat([_wide(matrices[index], short) for index in indices])
            sizes = [len(matrices[index]) for index in indices]
            for index, result in zip(indices, torch.split(orthogonalize(batch, self.steps), sizes), strict=True):
                results[index] = result if matrices[index].shape[1] == short else result.mT
        return results


def _wide(x_KNM: Tensor, short: int) -> Tensor:
    return x_KNM if x_KNM.shape[1] == short else x_KNM.mT


def _stack(matrix: Tensor) -> Tensor:
    return matrix if matrix.dim() == 3 else matrix[None]


def _active(parameter: Tensor, zero: Sequence[bool]) -> Tensor | None:
    """1 for matrices with a gradient and 0 for others, `(K, 1, 1)`; None if all have one."""
    if not any(zero):
        return None
    return torch.tensor([float(not each) for each in zero], device=parameter.device)[:, None, None]
