"""Counter-based random numbers: what they depend on, and their distribution."""

import torch

from moelm.model import rng


def test_a_token_gets_the_same_numbers_in_any_batch() -> None:
    rows, positions = torch.tensor([4, 9, 2]), torch.arange(6)[None]
    batch = rng.token_keys(rng.row_keys(1, 7, rows), positions)
    single = rng.token_keys(rng.row_keys(1, 7, rows[1:2]), positions)
    assert torch.equal(batch[1], single[0])
    numbers = rng.normal(batch.flatten(), 3, torch.tensor(2)).view(3, 6, 3)
    assert torch.equal(numbers[1], rng.normal(single[0], 3, torch.tensor(2)))


def test_numbers_depend_on_seed_step_row_position_and_stream() -> None:
    def first(seed: int = 0, step: int = 0, row: int = 0, position: int = 0, stream: int = 0) -> float:
        keys = rng.token_keys(rng.row_keys(seed, step, torch.tensor([row])), torch.tensor([[position]]))
        return rng.uniform(keys[0], 1, torch.tensor(stream)).item()

    numbers = [first(), first(seed=1), first(step=1), first(row=1), first(position=1), first(stream=1)]
    assert len(set(numbers)) == 6


def test_normal_numbers_have_the_moments_of_a_normal_distribution() -> None:
    keys = rng.token_keys(rng.row_keys(0, 0, torch.arange(200)), torch.arange(100)[None]).flatten()
    numbers = rng.normal(keys, 10, torch.tensor(3)).double()
    standard_error = numbers.numel() ** -0.5  # of the mean; of the variance and fourth moment, times sqrt(2) and sqrt(96)
    assert abs(numbers.mean()) < 4 * standard_error
    assert abs(numbers.var() - 1) < 4 * 2**0.5 * standard_error
    assert abs((numbers**4).mean() - 3) < 4 * 96**0.5 * standard_error
    assert (torch.corrcoef(numbers.t()) - torch.eye(10)).abs().max() < 4 * len(numbers) ** -0.5
    assert numbers.unique().numel() > 0.9 * numbers.numel()
