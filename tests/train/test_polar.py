"""Orthogonalization against the singular value decomposition and Chebyshev's criterion."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moelm.train.polar import MARGIN, lower_bound, minimax, orthogonalize, polynomials
from tests.tolerance import relative_error

STEPS = range(1, 9)


def composition(values: Tensor, steps: int) -> Tensor:
    """What the iterations do to singular values."""
    for a, b, c in polynomials(steps):
        values = a * values + b * values**3 + c * values**5
    return values


def exact(x: Tensor, steps: int | None) -> Tensor:
    """The orthogonalized matrix by a float64 decomposition; with None, the polar factor itself."""
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / s.norm().clamp_min(1e-300)
    return (u * (torch.ones_like(s) if steps is None else composition(s, steps))) @ vh


@pytest.mark.parametrize(("low", "high"), [(0.001, 1.0), (0.016, 1.01), (0.3, 1.7), (0.9, 1.1)])
def test_polynomials_are_the_best_by_chebyshevs_criterion(low: float, high: float) -> None:
    """The best approximation is the one whose error alternates between its extremes once more than it has coefficients."""
    (a, b, c), error = minimax(low, high)
    x = np.linspace(low, high, 1_000_001)
    difference = 1 - (a * x + b * x**3 + c * x**5)
    assert np.abs(difference).max() == pytest.approx(error, rel=1e-6)
    extremes = np.sign(difference[np.abs(difference) > error * (1 - 1e-5)])
    assert extremes[0] == 1
    assert np.count_nonzero(np.diff(extremes)) == 3


def test_a_narrow_range_has_the_newton_schulz_polynomial() -> None:
    assert minimax(0.999, 1.001)[0] == pytest.approx((1.875, -1.25, 0.375), rel=1e-4)


@pytest.mark.parametrize("steps", STEPS)
def test_singular_values_above_the_bound_become_one(steps: int) -> None:
    x = torch.logspace(float(np.log10(lower_bound(steps))), 0, 100_001, dtype=torch.float64)
    assert (composition(x, steps) - 1).abs().max() < 0.16
    below = torch.linspace(0, lower_bound(steps), 1001, dtype=torch.float64)
    assert ((composition(below, steps) >= 0) & (composition(below, steps) < 1)).all()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    rank=st.integers(0, 40),
    decay=st.floats(0, 3),
    scale=st.sampled_from([1e-12, 1.0, 1e9]),
    steps=st.sampled_from(STEPS),
)
def test_float32_equals_the_decomposition(
    rows: int, columns: int, rank: int, decay: float, scale: float, steps: int
) -> None:
    generator = torch.Generator().manual_seed(rows * columns)
    left, right = (torch.randn(size, rank, generator=generator, dtype=torch.float64) for size in (rows, columns))
    x = ((left * torch.logspace(0, -decay, rank, dtype=torch.float64)) @ right.T * scale).float()
    found = orthogonalize(x[None], steps)[0]
    if rank == 0:
        assert found.abs().max() == 0
        return
    # Each iteration multiplies the rounding of small singular values by the slope at zero.
    slope = float(np.prod([a for a, _, _ in polynomials(steps)]))
    assert (found - exact(x, steps)).abs().max() < 4e-7 * slope


@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e-25, 1e-22, 1e-19, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_size_of_a_matrix_diverges(scale: float, dtype: torch.dtype) -> None:
    x = torch.randn(2, 16, 24, generator=torch.Generator().manual_seed(0)) * scale
    assert torch.linalg.svdvals(orthogonalize(x.to(dtype), 5).float()).max() < 1.16 * MARGIN


@pytest.mark.parametrize(("steps", "bound"), [(3, 0.25), (5, 0.13), (8, 0.1)])
def test_the_result_is_near_the_polar_factor(steps: int, bound: float) -> None:
    x = torch.randn(4, 48, 96, generator=torch.Generator().manual_seed(0))
    assert relative_error(orthogonalize(x, steps), torch.stack([exact(each, None) for each in x])) < bound


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("decay", [0, 3])
def test_bfloat16_does_not_diverge(steps: int, decay: float) -> None:
    x = torch.randn(2, 96, 128, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -decay, 96)[:, None]
    assert torch.linalg.svdvals(orthogonalize(x.bfloat16(), steps).float()).max() < 1.16 * MARGIN


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_equals_a_loop_and_the_transposes(dtype: torch.dtype) -> None:
    x = torch.randn(3, 24, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[1] = 0
    found = orthogonalize(x, 5)
    tolerance = 64 * torch.finfo(dtype).eps  # the iterations amplify rounding of small singular values
    assert relative_error(found, torch.cat([orthogonalize(each[None], 5) for each in x])) < tolerance
    assert relative_error(found, orthogonalize(x.mT.contiguous(), 5).mT) < tolerance
    assert found[1].abs().max() == 0
