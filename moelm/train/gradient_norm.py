"""The gradient norm, from the squared norms of the gradients of all matrices."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moelm.model.dtensor import local, local_slices, num_replicas


@torch.no_grad()
def gradient_squares(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Squared norm of each matrix's gradient, float64, of this process's shards, to be summed over processes.

    A stack of experts has one entry for each expert of the whole model; every other parameter has one. Replicated
    gradients are divided by the number of replicas, so that every element counts once.
    """
    on_cpu = parameters[0].device.type == "cpu"
    return _squares_by_rows(parameters) if on_cpu else _squares_by_few_kernels(parameters)


def _squares_by_rows(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Rows are summed in the gradient's dtype, and their sums in float64: in float32, half a million squares would be off
    by 5e-6, and by another amount for every sharding."""
    squares = []
    for parameter in parameters:
        stacked = parameter.dim() == 3
        total = torch.zeros(len(parameter) if stacked else 1, dtype=torch.float64, device=parameter.device)
        if parameter.grad is not None:
            rows = torch.linalg.vector_norm(local(parameter.grad), dim=-1).double().square()
            own = total[local_slices(parameter)[0]] if stacked else total
            own.copy_((rows.sum(dim=-1) if stacked else rows.sum()) / num_replicas(parameter))
        squares.append(total)
    return torch.cat(squares)


def _squares_by_few_kernels(parameters: Sequence[nn.Parameter]) -> Tensor:
    """One kernel for each stack of experts, or a few where they are divided among processes, and a few for all other
    parameters. GPUs sum in float32 as a tree, with errors of 1e-7."""
    norms: dict[nn.Parameter, Tensor] = {}
    gradients = {parameter: local(parameter.grad) for parameter in parameters if parameter.grad is not None}
    if others := [parameter for parameter in gradients if parameter.dim() < 3]:
        found = torch._foreach_norm([gradients[parameter] for parameter in others])
        norms |= {parameter: norm.view(1) for parameter, norm in zip(others, found, strict=True)}
    for parameter, gradient in gradients.items():
        if parameter.dim() == 3:
            own, (experts, *_) = torch.linalg.vector_norm(gradient, dim=(1, 2)), local_slices(parameter)
            others_E = experts.start, len(parameter) - experts.stop
            norms[parameter] = F.pad(own, others_E) if any(others_E) else own
    if norms:
        torch._foreach_div_(list(norms.values()), [math.sqrt(num_replicas(parameter)) for parameter in norms])
    for parameter in parameters:
        if parameter not in norms:
            norms[parameter] = torch.zeros(len(parameter) if parameter.dim() == 3 else 1, device=parameter.device)
    return torch.cat([norms[parameter] for parameter in parameters]).double().square()


def gradient_norm(squares: Sequence[float]) -> float:
    """The norm of the whole gradient.

    The sum is rounded once, so that neither its order nor a parameter with a zero gradient changes a bit of it; on CPUs
    this keeps a mixture of one expert bitwise equal to the dense model.
    """
    return math.sqrt(math.fsum(squares))
