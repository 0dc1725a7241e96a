"""The variation between seeds that is taken from the report of another comparison."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from moelm.compare.report import compare_runs
from moelm.compare.seed_std import read_seed_std, student_t
from moelm.compare.variants import group_runs
from moelm.errors import MoelmError
from moelm.runs.record import read_runs
from tests.compare.linear_runs import MOE, write_run

pytestmark = pytest.mark.usefixtures("no_figures")

LOSSES = [1.0, 1.2, 0.9, 1.1, 1.05, 0.95]


def write_pair(folder: Path, seed: int, gain: float, evaluations: int = 4) -> list[str]:
    """A dense run and a mixture that is better by `gain` on every document."""
    dense = write_run(folder / f"dense-{seed}", slope=0.1, seed=seed, documents=LOSSES, evaluations=evaluations)
    better = [loss - gain for loss in LOSSES]
    moe = write_run(folder / f"moe-{seed}", slope=0.1, ffn=MOE, seed=seed, documents=better, evaluations=evaluations)
    return [str(dense), str(moe)]


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """The report of three seeds."""
    gains = {1: 0.1, 2: 0.2, 3: 0.4}
    runs = [path for seed, gain in gains.items() for path in write_pair(tmp_path, seed, gain)]
    compare_runs(runs, tmp_path / "study", grouped=True)
    return tmp_path / "study/report.json"


def test_the_interval_of_one_seed_includes_the_variation_of_another_report(study: Path, tmp_path: Path) -> None:
    runs = write_pair(tmp_path, 9, 0.3)
    alone = compare_runs(runs, tmp_path / "alone").pair("moe-9", "dense-9").paired
    comparison = compare_runs(runs, tmp_path / "surely", seed_std=study)
    surely = comparison.pair("moe-9", "dense-9").paired
    assert alone is not None
    assert surely is not None
    assert not alone.overall.seeds_included
    assert "| these documents, for one seed |" in (tmp_path / "alone/report.md").read_text()
    # Two variants over three seeds: the standard deviation of the difference is that of the paired gains.
    stated = json.loads(study.read_text())["seed_std"]
    half_width = student_t(stated["degrees"]) * stated["std"] * math.sqrt(2)
    assert surely.overall.gain - surely.overall.low == pytest.approx(
        math.hypot(alone.overall.gain - alone.overall.low, half_width)
    )
    assert surely.overall.seeds_from == str(study)
    assert f"the variation between seeds in {study}" in comparison.verdict.confidence


def test_a_report_states_the_standard_deviation_of_its_final_losses(study: Path) -> None:
    report = json.loads(study.read_text())
    losses = np.array([[run["val_loss"] for run in variant["runs"]] for variant in report["variants"]])
    gains = losses[0] - losses[1]
    assert report["seed_std"]["std"] == pytest.approx(gains.std(ddof=1) / math.sqrt(2), abs=1e-12)
    assert report["seed_std"]["degrees"] == 2


def test_an_undecided_report_says_how_many_seeds_would_decide(study: Path) -> None:
    # The gains have the mean 0.233 and the standard deviation 0.153: of 4 seeds the half width would be 0.243, of 5 0.190.
    report = json.loads(study.read_text())
    assert report["pairs"][0]["paired"]["seeds_to_decide"] == 5
    assert " A difference of this size would be decided by 5 seeds of each." in study.with_name("report.md").read_text()
    assert "| 5 seeds |" in study.with_name("report.md").read_text()


def test_a_difference_that_documents_leave_open_is_not_decided_by_seeds(tmp_path: Path) -> None:
    runs = []
    for seed, shift in ((4, 0.0), (5, 0.01)):
        dense = write_run(tmp_path / f"dense-{seed}", slope=0.1, seed=seed, documents=LOSSES)
        losses = [loss + shift + (0.1 if number % 2 else -0.11) for number, loss in enumerate(LOSSES)]
        runs += [dense, write_run(tmp_path / f"moe-{seed}", slope=0.1, ffn=MOE, seed=seed, documents=losses)]
    scattered = compare_runs(list(map(str, runs)), tmp_path / "scattered", grouped=True)
    paired = scattered.pairs[0].paired
    assert paired is not None
    assert paired.overall.seeds_to_decide is None
    assert scattered.verdict.confidence.endswith("would not be decided by 1,000 seeds of each on these documents.")
    assert "| more than 1,000 seeds |" in (tmp_path / "scattered/report.md").read_text()


def test_reports_of_one_seed_other_lengths_or_no_report_are_refused(study: Path, tmp_path: Path) -> None:
    variants = group_runs(read_runs(write_pair(tmp_path, 9, 0.3)))
    assert read_seed_std(study, variants).degrees == 2
    longer = group_runs(read_runs(write_pair(tmp_path, 10, 0.3, evaluations=5)))
    with pytest.raises(MoelmError, match="no variant with the parameters, FLOPs per token and tokens of dense-10"):
        read_seed_std(study, longer)
    with pytest.raises(MoelmError, match="cannot be read: No such file"):
        read_seed_std(tmp_path / "missing.json", variants)
    compare_runs([str(variant.first.path) for variant in variants], tmp_path / "single")
    for content in (None, "[]", "{", '{"seed_std": {"std": 1}}'):
        if content is not None:
            (tmp_path / "single/report.json").write_text(content)
        with pytest.raises(MoelmError, match=r"is no report\.json of a comparison over several seeds"):
            read_seed_std(tmp_path / "single/report.json", variants)
