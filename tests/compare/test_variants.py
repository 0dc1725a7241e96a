"""Runs with several seeds as one variant."""

from pathlib import Path

import numpy as np
import pytest

from moelm.compare.variants import group_runs
from moelm.errors import MoelmError
from moelm.runs.record import read_runs
from tests.compare.linear_runs import MOE, compared, write_run


def seeds(folder: Path, stem: str, slopes: list[float], **options: object) -> list[Path]:
    return [
        write_run(folder / f"{stem}-{seed}", slope=slope, seed=seed, **options)  # type: ignore[arg-type]
        for seed, slope in enumerate(slopes)
    ]


def test_runs_that_differ_in_their_seed_are_one_variant(tmp_path: Path) -> None:
    paths = [*seeds(tmp_path, "dense", [0.5, 0.6]), *seeds(tmp_path, "moe-seed", [0.7, 0.8, 0.9], ffn=MOE)]
    dense, moe = group_runs(read_runs(paths), grouped=True)
    assert (dense.name, moe.name) == ("dense", "moe")
    assert (dense.seeds, moe.seeds) == ((0, 1), (0, 1, 2))
    assert moe.val.loss == pytest.approx([5, 4.2, 3.4, 2.6, 1.8])
    assert moe.final_losses == pytest.approx([2.2, 1.8, 1.4])
    assert moe.seed_std == pytest.approx(0.4)
    assert moe.domains["code"]["loss"] == pytest.approx(2.3)
    assert [each.name for each in group_runs(read_runs(paths), grouped=False)] == [path.name for path in paths]


def test_only_common_evaluations_are_averaged(tmp_path: Path) -> None:
    paths = seeds(tmp_path, "dense", [0.5, 0.6])
    lines = (paths[1] / "metrics.jsonl").read_text().splitlines()
    (paths[1] / "metrics.jsonl").write_text("\n".join(lines[:7]) + "\n")  # up to step 300
    (dense,) = group_runs(read_runs(paths), grouped=True)
    assert dense.val.steps.tolist() == [0, 100, 200, 300]
    assert dense.final_losses == pytest.approx([3.5, 3.2])
    assert dense.domains["code"]["loss"] == pytest.approx(3.85)
    assert dense.final_seconds == pytest.approx([30, 30])
    notes = compared([*paths, write_run(tmp_path / "moe", slope=0.7, ffn=MOE)], grouped=True).notes
    assert "dense is compared at step 300, the last at which all of its runs were evaluated." in notes


@pytest.mark.parametrize(
    ("names", "stem"),
    [
        (["bias-0", "bias-1"], "bias"),
        (["experts0", "experts1"], "experts"),
        (["dense-10", "dense-11"], "dense"),
        (["moe-seed3", "moe-seed14"], "moe"),
        (["a-s01", "a-s02"], "a"),
        (["plain", "plain-1"], "plain"),
    ],
)
def test_groups_are_named_without_their_seeds(tmp_path: Path, names: list[str], stem: str) -> None:
    seeds = [int("".join(filter(str.isdigit, name)) or 0) for name in names]
    paths = [write_run(tmp_path / name, slope=0.5, seed=seed) for name, seed in zip(names, seeds, strict=True)]
    assert [each.name for each in group_runs(read_runs(paths), grouped=True)] == [stem]


def test_the_order_of_seeds_does_not_matter(tmp_path: Path) -> None:
    dense, moe = seeds(tmp_path, "dense", [0.5, 0.6]), seeds(tmp_path, "moe", [0.7, 0.8], ffn=MOE)
    forth, back = (compared([*dense, *order], grouped=True) for order in (moe, moe[::-1]))
    assert forth.variants[1].seeds == back.variants[1].seeds == (0, 1)
    assert forth.verdict == back.verdict


def test_a_comparison_of_groups(tmp_path: Path) -> None:
    paths = [*seeds(tmp_path, "dense", [0.5, 0.6]), *seeds(tmp_path, "moe", [0.7, 0.8], ffn=MOE)]
    comparison = compared(paths, grouped=True)
    assert comparison.verdict.sentence.startswith("moe wins: against dense")
    assert comparison.config_differences["model.ffn.kind"] == {"dense": "dense", "moe": "moe"}
    assert "seed" not in comparison.config_differences
    alone = compared(paths)
    assert "dense-0 and dense-1 differ only in their seed; --group combines them into one variant." in alone.notes


def test_a_seed_given_twice_is_refused(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / name, slope=0.5) for name in "ab"]
    with pytest.raises(MoelmError, match="a and b have the same config, but not all have different seeds"):
        group_runs(read_runs(paths), grouped=True)


def test_prices_add_an_axis(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / "dense", slope=0.5), write_run(tmp_path / "moe", slope=0.8, ffn=MOE, seconds=0.2)]
    comparison = compared(paths, prices=[3.6, 1.8])
    assert comparison.axes == ("tokens", "flops", "seconds", "dollars")
    forth = comparison.pair("moe", "dense")
    # 40 s at $3.60 an hour are 4 cents; 50 s, where the MoE run reaches that loss, at half the price are 2.5.
    assert forth.cost_to_reach["dollars"].other_cost == pytest.approx(0.04)
    assert forth.cost_to_reach["dollars"].cost == pytest.approx(0.025)
    assert "less money ($0.025 against $0.04)" in comparison.verdict.efficiency
    assert compared(paths, prices=[2.0]).axes[-1] == "dollars"
    assert compared(paths).axes == ("tokens", "flops", "seconds")
    with pytest.raises(MoelmError, match="There are 3 prices for 2 variants"):
        compared(paths, prices=[1, 2, 3])
    for price in (-1, float("nan"), float("inf")):
        with pytest.raises(MoelmError, match=f"The price {price} is invalid; dollars per hour above 0"):
            compared(paths, prices=[price])


def test_the_price_is_per_process(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / "dense", slope=0.5, environment={"processes": 8}), write_run(tmp_path / "b", slope=0.5)]
    eight, one = group_runs(read_runs(paths), grouped=False, prices=[1.0])
    assert np.allclose(eight.cost("dollars"), 8 * one.cost("dollars"))
