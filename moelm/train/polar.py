"""Orthogonalization of matrices by products alone: U V^T of U S V^T.

Shapes: K matrices, N rows, M columns.
"""

from functools import cache

import numpy as np
import torch
from torch import Tensor

MARGIN = 1.01
"""Rounding may increase a singular value by this factor in each iteration; above their range the polynomials diverge."""

SMALLEST_NORM = 1e-18
"""Below it, squares underflow in float32, and the norm could be too small; such matrices remain small."""

Polynomial = tuple[float, float, float]
"""a, b, c of p(x) = a x + b x^3 + c x^5."""


def orthogonalize(x_KNM: Tensor, steps: int) -> Tensor:
    """The polar factors U V^T of matrices U S V^T, approximately; in the matrices' dtype.

    An iteration applies an odd polynomial to the singular values: X <- a X + (b X X^T + c (X X^T)^2) X, or the
    same from the other side if a matrix has more rows than columns. A zero matrix remains zero.

    Args:
        steps: iterations. The best polynomials for `lower_bound(steps)` are used; smaller singular values, relative to the
            matrix's norm, remain below 1.
    """
    tall = x_KNM.shape[1] > x_KNM.shape[2]
    norm_K11 = torch.linalg.matrix_norm(x_KNM, keepdim=True, dtype=torch.float32)
    x_KNM = x_KNM * norm_K11.clamp_min(SMALLEST_NORM).reciprocal().to(x_KNM.dtype)
    for a, b, c in polynomials(steps):
        gram = x_KNM.mT @ x_KNM if tall else x_KNM @ x_KNM.mT
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x_KNM = torch.baddbmm(x_KNM, x_KNM, factor, beta=a) if tall else torch.baddbmm(x_KNM, factor, x_KNM, beta=a)
    return x_KNM


def lower_bound(steps: int) -> float:
    """The singular value down to which so many iterations reach 1 within 0.16: 0.001 with 5, four times that with 4."""
    return float(1e-3 * 4.0 ** (5 - steps))


@cache
def polynomials(steps: int) -> list[Polynomial]:
    """Polynomials whose composition is the best approximation of 1 from `lower_bound(steps)` to 1, but for `MARGIN`.

    Each is the best one on the range that the singular values have then (Polar Express, Amsel et al. 2025, theorem 3.1).
    """
    found, low, high = [], lower_bound(steps), 1.0
    for _ in range(steps):
        polynomial, error = minimax(low, high * MARGIN)
        found.append(polynomial)
        low, high = 1 - error, 1 + error
    return found


def minimax(low: float, high: float) -> tuple[Polynomial, float]:
    """The odd polynomial of degree 5 that is closest to 1 on a range, and its largest error, by Remez's algorithm.

    The error alternates between its extremes at four points: the ends of the range, and two extrema of the polynomial.
    """
    inner = np.array([0.75 * low + 0.25 * high, 0.25 * low + 0.75 * high])
    while True:
        x = np.array([low, *inner, high])
        system = np.stack([x, x**3, x**5, np.array([1.0, -1.0, 1.0, -1.0])], axis=1)
        a, b, c, error = np.linalg.solve(system, np.ones(4))
        root = np.sqrt(9 * b**2 - 20 * a * c)
        extrema = np.sqrt((np.array([-root, root]) - 3 * b) / (10 * c))
        if np.allclose(extrema, inner, rtol=1e-7, atol=0):
            return (float(a), float(b), float(c)), float(error)
        inner = extrema
