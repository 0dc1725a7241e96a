"""Comparison of tensors that may differ by rounding, on any CPU."""

import torch
from torch import Tensor


def assert_close(
    found: Tensor, expected: Tensor, epsilons: float = 32, scale: float | None = None, dtype: torch.dtype | None = None
) -> None:
    """Every element differs by at most `epsilons` machine epsilons, times the scale.

    An element can be a small difference of large summands, and CPUs with other vector widths add those in another order. So
    the tolerance is relative to the summands, of which the largest expected element is an estimate, not to each element.

    Args:
        epsilons: four times the largest difference that was measured with AVX-512, AVX2 and SSE.
        scale: magnitude of the summands; default: the largest expected magnitude.
        dtype: the coarsest of the computation; default: the coarser of the two tensors'.
    """
    epsilon = max(torch.finfo(each).eps for each in (dtype or found.dtype, expected.dtype))
    largest = float(expected.detach().abs().max()) if expected.numel() else 0.0
    tolerance = epsilons * epsilon * (largest if scale is None else scale)
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance, check_dtype=False)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference, relative to the expected norm."""
    difference = found.detach().double() - expected.detach().double()
    return float(difference.norm() / expected.detach().double().norm())
