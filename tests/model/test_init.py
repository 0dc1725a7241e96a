"""Initial weights drawn by shard."""

import pytest
import torch
from torch import Tensor

import moelm.model.init
from moelm.model.init import _draw_rows
from moelm.model.rng import named_generator


def draw(rows: slice, num_rows: int = 50, columns: int = 7) -> Tensor:
    values = torch.full((rows.stop - rows.start, columns), float("nan"))
    _draw_rows(values, rows, num_rows, 0.5, "0/wq.weight/0")
    return values


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of elements of each block that is drawn; a block has 4 rows."""
    monkeypatch.setattr(moelm.model.init, "BLOCK_ELEMENTS", 30)
    sizes: list[int] = []
    normal = Tensor.normal_

    def record(values: Tensor, *args: float, **options: torch.Generator) -> Tensor:
        sizes.append(values.numel())
        return normal(values, *args, **options)

    monkeypatch.setattr(Tensor, "normal_", record)
    return sizes


@pytest.mark.parametrize(("start", "stop"), [(0, 50), (0, 25), (25, 50), (13, 14), (39, 48), (48, 50), (50, 50)])
def test_a_shard_has_the_values_of_the_whole(start: int, stop: int, drawn: list[int]) -> None:
    whole = draw(slice(0, 50))
    assert sum(drawn) == 50 * 7
    drawn.clear()
    assert torch.equal(draw(slice(start, stop)), whole[start:stop])
    assert sum(drawn) <= (stop - start + 2 * 3) * 7  # whole blocks at both ends
    assert len(whole.unique()) == whole.numel()
    assert 0.4 < whole.std() < 0.6


def test_a_matrix_of_one_block_has_one_generator() -> None:
    generator = named_generator("0/wq.weight/0")
    assert torch.equal(draw(slice(0, 50)), torch.empty(50, 7).normal_(0.0, 0.5, generator=generator))
