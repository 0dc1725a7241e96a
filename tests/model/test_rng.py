"""Stateless random numbers: what they are a function of, and that they look random."""

import torch

from moelm.model import rng


def test_a_token_draws_the_same_in_any_batch() -> None:
    rows, positions = torch.tensor([4, 9, 2]), torch.arange(6)[None]
    whole = rng.token_keys(rng.row_keys(1, 7, rows), positions)
    alone = rng.token_keys(rng.row_keys(1, 7, rows[1:2]), positions)
    assert torch.equal(whole[1], alone[0])
    drawn = rng.normal(whole.flatten(), 3, 2).view(3, 6, 3)
    assert torch.equal(drawn[1], rng.normal(alone[0], 3, 2))


def test_another_seed_step_row_position_or_stream_draws_otherwise() -> None:
    def first(seed: int = 0, step: int = 0, row: int = 0, position: int = 0, stream: int = 0) -> float:
        keys = rng.token_keys(rng.row_keys(seed, step, torch.tensor([row])), torch.tensor([[position]]))
        return rng.uniform(keys[0], 1, stream).item()

    drawn = [first(), first(seed=1), first(step=1), first(row=1), first(position=1), first(stream=1)]
    assert len(set(drawn)) == 6


def test_normals_have_the_moments_of_normals() -> None:
    keys = rng.token_keys(rng.row_keys(0, 0, torch.arange(200)), torch.arange(100)[None]).flatten()
    drawn = rng.normal(keys, 10, 3).double()
    assert abs(drawn.mean()) < 0.01
    assert abs(drawn.var() - 1) < 0.01
    assert abs((drawn**4).mean() - 3) < 0.1
    assert (torch.corrcoef(drawn.t()) - torch.eye(10)).abs().max() < 0.03
    assert drawn.unique().numel() > 0.9 * drawn.numel()
