"""A ladder from run directories to its report."""

import json
from pathlib import Path

import numpy as np
import pytest

from moelm.compare.ladder.comparison import LadderComparison, compare_ladder
from moelm.compare.ladder.figures import band
from moelm.compare.ladder.points import Side, make_side
from moelm.compare.ladder.report import write_ladder_report
from moelm.compare.variants import make_variant
from moelm.errors import MoelmError
from moelm.report.directory import check_report_directory
from moelm.runs.record import read_runs
from tests.compare.linear_runs import DENSE, MOE, write_run

FLOPS = [1e9, 3e9, 9e9, 27e9, 81e9]


def loss(flops: float) -> float:
    return float(1.5 + 1.5 * (flops / 1e9) ** -0.3)


def side(folder: Path, name: str, flops: list[float], multiplier: float = 1, documents: bool = True) -> Side:
    """Runs of two seeds, 400 steps each, whose losses differ by 0.004."""
    sizes = {}
    for i, cost in enumerate(flops):
        runs = []
        for seed in (0, 1):
            final = loss(multiplier * cost) + 0.004 * (seed - 0.5)
            own = [final + 0.1 * (number - 3.5) for number in range(8)] * 4 if documents else None
            path = folder / f"{name}-{i}-{seed}"
            ffn = MOE if name == "moe" else DENSE
            write_run(path, slope=(5 - final) / 4, ffn=ffn, flops=cost, seconds=cost / 1e10, seed=seed, documents=own)
            runs.append(path)
        sizes[f"s{i}"] = make_variant(f"{name}-s{i}", read_runs(runs))
    return make_side(name, sizes)


def ladder(folder: Path, dense: int = 5, moe: int = 4, documents: bool = True) -> LadderComparison:
    sides = [
        side(folder, "dense", FLOPS[:dense], documents=documents),
        side(folder, "moe", FLOPS[:moe], 2, documents),
    ]
    return compare_ladder(sides)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> LadderComparison:
    """Five sizes of a dense model, and four of a mixture with a multiplier of 2."""
    return ladder(tmp_path_factory.mktemp("ladder"))


def test_the_multiplier_of_a_planted_ladder(found: LadderComparison) -> None:
    flops = found.results[0]
    assert [each.value for each in flops.multipliers[0]] == pytest.approx([2, 2, 2, 2], rel=0.03)
    assert all(each.low is not None and each.low < 2 < (each.high or 0) for each in flops.multipliers[0])
    assert found.answer.startswith("For the losses of moe, dense needs 2.0")
    assert found.answer.endswith("(from 4.0e11 FLOPs to 1.1e13 FLOPs, mean over 4 sizes).")
    assert flops.fit is not None
    assert [each.axis for each in found.results] == ["flops", "seconds"]
    assert "There is no comparison by tokens, which do not increase with the size." in found.notes


def test_the_drawn_interval_contains_the_planted_multiplier_between_sizes_too(found: LadderComparison) -> None:
    reference, side = found.results[0].points
    costs_Q = np.linspace(side.costs_P[0], side.costs_P[-1], 50)
    low_Q, high_Q = band(reference, side, costs_Q, np.full(50, np.log(2)))
    assert (low_Q < np.log(2)).all()
    assert (high_Q > np.log(2)).all()
    at_sizes = np.exp(low_Q[[0, -1]]), np.exp(high_Q[[0, -1]])
    table = found.results[0].multipliers[0]
    for end, each in ((0, table[0]), (1, table[-1])):
        assert at_sizes[0][end] == pytest.approx(2 / (each.value or 0) * (each.low or 0), rel=1e-6)
        assert at_sizes[1][end] == pytest.approx(2 / (each.value or 0) * (each.high or 0), rel=1e-6)


def test_the_frontier_has_what_nothing_cheaper_beats(found: LadderComparison) -> None:
    assert found.results[0].frontier == (("moe", "s0"), ("moe", "s1"), ("moe", "s2"), ("moe", "s3"), ("dense", "s4"))


def test_three_sizes_are_interpolated_and_not_fitted(tmp_path: Path) -> None:
    found = ladder(tmp_path, dense=3, moe=2)
    assert found.results[0].fit is None
    assert found.details[0].startswith("There is no fit: it needs 4 sizes of each variant, and there are 3 of dense and 2")
    assert found.results[0].means[0].value == pytest.approx(2, rel=0.03)


def test_without_documents_the_note_says_so(tmp_path: Path) -> None:
    found = ladder(tmp_path, dense=3, moe=2, documents=False)
    assert "Intervals are over seeds only: not all runs have saved their losses on the same documents." in found.notes


def test_the_report_has_what_a_script_needs(found: LadderComparison, tmp_path: Path) -> None:
    out = tmp_path / "report"
    write_ladder_report(found, out, "moelm sweep x.yaml")
    names = sorted(path.name for path in out.iterdir())
    assert names == ["ladder.png", "multiplier.png", "report.html", "report.json", "report.md"]
    report = json.loads((out / "report.json").read_text())
    assert (report["schema"], report["kind"], report["reference"]) == (1, "moelm ladder", "dense")
    flops = report["axes"]["flops"]
    assert flops["multipliers"]["moe"]["sizes"]["s1"]["value"] == pytest.approx(2, rel=0.03)
    assert flops["multipliers"]["moe"]["mean"]["low"] < flops["multipliers"]["moe"]["mean"]["high"]
    assert flops["fit"]["variants"]["dense"]["exponent"] == pytest.approx(0.3, abs=0.03)
    assert len(flops["fit"]["variants"]["dense"]["residuals"]) == 5
    assert [each["size"] for each in report["variants"][1]["sizes"]] == ["s0", "s1", "s2", "s3"]
    markdown = (out / "report.md").read_text()
    assert markdown.index(found.answer) < markdown.index("ladder.png")
    check_report_directory(out)
    write_ladder_report(found, out)  # an earlier report is replaced


def test_sizes_of_equal_cost_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        MoelmError, match="The sizes s0 and s1 of dense cost the same FLOPs within 1%; different ones are expected"
    ):
        side(tmp_path, "dense", [1e9, 1.005e9])


def test_one_size_is_no_ladder(tmp_path: Path) -> None:
    with pytest.raises(MoelmError, match="dense has only the size s0; a ladder needs at least two sizes"):
        side(tmp_path, "dense", [1e9])


def test_a_ladder_needs_two_variants(tmp_path: Path) -> None:
    with pytest.raises(MoelmError, match="A ladder needs at least two variants"):
        compare_ladder([side(tmp_path, "dense", FLOPS[:2])])
