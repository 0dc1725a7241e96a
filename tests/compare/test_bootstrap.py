"""Confidence intervals: against formulas, and by how often they contain the true value."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from moelm.compare.bootstrap import resample_sums
from moelm.compare.report import compare_runs
from moelm.compare.seed_std import SeedStd, pooled_seed_std, student_t
from moelm.errors import MoelmError
from moelm.runs.document_losses import DocumentLosses, load_document_losses
from moelm.runs.record import Array
from tests.compare.linear_runs import MOE, compared, write_run


def interval(gains: Array, tokens: Array, resamples: int = 10_000) -> tuple[float, float]:
    """The interval over documents of the gain of one run, given its gain on each document in nats."""
    tokens_R, nats_RN = resample_sums(tokens, gains[None], resamples)
    low, high = np.quantile(nats_RN[:, 0] / tokens_R, [0.025, 0.975])
    return float(low), float(high)


def test_interval_over_documents_is_the_normal_interval() -> None:
    gains = np.random.default_rng(1).normal(0.1, 0.5, 400)
    error = 1.96 * gains.std() / 20
    assert interval(gains, np.ones(400)) == pytest.approx((gains.mean() - error, gains.mean() + error), abs=0.005)


def test_coverage_over_documents() -> None:
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(200):
        tokens = rng.integers(5, 50, 150).astype(np.float64)
        low, high = interval(tokens * rng.normal(0.02, 0.2, 150), tokens, resamples=1000)
        covered += low <= 0.02 <= high
    assert 180 <= covered <= 198


@pytest.mark.parametrize("seeds", [(2, 2), (3, 3), (5, 5), (3, 2), (4, 1)])
def test_coverage_over_seeds(seeds: tuple[int, int]) -> None:
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(1000):
        shared = rng.normal(0, 0.05, max(seeds))  # the effect of a seed on both variants
        a, b = (3 + shared[:count] + rng.normal(0, 0.02, count) for count in seeds)
        seed_std = pooled_seed_std([a, b], [tuple(range(count)) for count in seeds])
        assert seed_std is not None
        covered += abs(a.mean() - b.mean()) <= seed_std.half_width(*seeds)
    assert covered >= 930
    if seeds[0] == seeds[1]:
        assert covered <= 970  # no wider than necessary


def test_two_variants_with_the_same_seeds_give_the_paired_t_test() -> None:
    a, b = np.array([3.0, 3.2, 3.1]), np.array([3.1, 3.25, 3.3])
    seed_std = pooled_seed_std([a, b], [(0, 1, 2)] * 2)
    assert seed_std is not None
    assert seed_std.half_width(3, 3) == pytest.approx(4.303 * float((a - b).std(ddof=1)) / 3**0.5)


def test_one_seed_each_has_no_seed_std() -> None:
    assert pooled_seed_std([np.array([3.0]), np.array([3.1])], [(0,), (0,)]) is None


@pytest.mark.parametrize("std", [0.02, 0.1, 0.5])
def test_the_number_of_seeds_that_decide_is_the_smallest(std: float) -> None:
    seeds = SeedStd(std, degrees=2).seeds_to_decide(0.1, document_half_width=0.06)
    assert seeds is not None
    half_widths = [math.hypot(0.06, student_t(n - 1) * std * math.sqrt(2 / n)) for n in (seeds - 1, seeds)]
    assert half_widths[1] < 0.1 <= half_widths[0]


def test_no_number_of_seeds_decides_what_documents_leave_open() -> None:
    assert SeedStd(0.02, degrees=2).seeds_to_decide(0.1, document_half_width=0.11) is None
    assert SeedStd(0.02, degrees=2).seeds_to_decide(0.0, document_half_width=0.01) is None


def test_resampling_in_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    gains = np.random.default_rng(1).normal(0.1, 0.5, 40)
    at_once = resample_sums(np.ones(40), gains[None])
    monkeypatch.setattr("moelm.compare.bootstrap.CHUNK_DRAWS", 1000)
    for a, b in zip(at_once, resample_sums(np.ones(40), gains[None]), strict=True):
        assert np.allclose(a, b)


def test_both_orders_of_a_pair_have_the_same_interval(tmp_path: Path) -> None:
    losses = np.random.default_rng(0).normal(3, 0.5, (2, 30))
    paths = [
        write_run(tmp_path / name, slope=0.5, documents=each.tolist()) for name, each in zip("ab", losses, strict=True)
    ]
    comparison = compared(paths)
    forth, back = comparison.pair("a", "b").paired, comparison.pair("b", "a").paired
    assert forth is not None
    assert back is not None
    a, b = forth.overall, back.overall
    assert (a.gain, a.low, a.high) == (-b.gain, -b.high, -b.low)
    assert a.better_documents == pytest.approx(1 - b.better_documents)


def test_a_document_that_outweighs_the_others_is_reported(tmp_path: Path) -> None:
    a, b = (write_run(tmp_path / name, slope=0.5, documents=[3.0] * 20) for name in "ab")
    for path, nats in ((a, 3.0), (b, 2.9)):
        tokens = np.array([10] * 19 + [10_000])
        losses = DocumentLosses(np.arange(20), np.zeros(20, int), tokens, nats * tokens, ("code",))
        losses.save(path / "documents.npz", step=400)
    confidence = compared([a, b]).verdict.confidence
    assert "over 20 evaluation documents (equivalent to 1 of equal length); variation between seeds" in confidence


def test_pairing_removes_the_variation_between_documents(tmp_path: Path) -> None:
    losses = np.linspace(1, 5, 60)
    dense = write_run(tmp_path / "dense", slope=0.5, documents=losses.tolist())
    moe = write_run(tmp_path / "moe", slope=0.5, ffn=MOE, documents=(losses - 0.01 - 0.001 * np.sin(losses)).tolist())
    both = compared([dense, moe]).pair("moe", "dense").paired
    assert both is not None
    assert both.overall.low > 0.009
    assert both.overall.high < 0.011
    assert both.overall.better_documents == 1
    assert both.domains.keys() == {"code", "synthetic-sums"}


def test_an_uncertain_difference_decides_nothing(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    losses = rng.normal(3, 0.5, 40)
    dense = write_run(tmp_path / "dense", slope=0.5, documents=losses.tolist())
    moe = write_run(tmp_path / "moe", slope=0.505, ffn=MOE, documents=(losses + rng.normal(-0.02, 0.3, 40)).tolist())
    comparison = compared([dense, moe])
    assert comparison.verdict.sentence.startswith(
        "Undecided: against dense, moe's validation loss is not significantly different at"
    )
    confidence = comparison.verdict.confidence
    assert "with a 95% confidence interval of " in confidence
    assert confidence.endswith(" over 40 evaluation documents; variation between seeds is not included.")


def test_other_documents_or_another_step_are_not_paired(tmp_path: Path) -> None:
    dense = write_run(tmp_path / "dense", slope=0.5, documents=[1, 2, 3])
    fewer = write_run(tmp_path / "fewer", slope=0.6, documents=[1, 2])
    assert compared([dense, fewer]).pair("fewer", "dense").paired is None
    older = write_run(tmp_path / "older", slope=0.7, documents=[1, 2, 3])
    losses, _ = load_document_losses(older / "documents.npz") or pytest.fail("no file")
    losses.save(older / "documents.npz", step=300)
    comparison = compared([dense, older])
    assert comparison.pair("older", "dense").paired is None
    assert comparison.verdict.confidence.startswith("The uncertainty of the difference is unknown")


@pytest.mark.usefixtures("no_figures")
def test_intervals_are_in_the_report(tmp_path: Path) -> None:
    dense = write_run(tmp_path / "dense", slope=0.5, documents=[3, 3.5, 4, 2, 3, 3.2])
    moe = write_run(tmp_path / "moe", slope=0.8, ffn=MOE, documents=[2.9, 3.3, 3.9, 1.8, 2.9, 3.0])
    compare_runs([str(dense), str(moe)], tmp_path / "out")
    report = json.loads((tmp_path / "out/report.json").read_text())
    pair = next(pair for pair in report["pairs"] if pair["a"] == "moe")
    assert pair["paired"].keys() == {
        *(
            "gain",
            "low",
            "high",
            "documents",
            "effective_documents",
            "better_documents",
            "seeds",
            "seeds_included",
            "seeds_from",
            "seeds_to_decide",
        )
    }
    assert pair["paired"]["gain"] == pytest.approx(0.15)
    assert pair["domains"].keys() == {"code", "synthetic-sums"}
    text = (tmp_path / "out/report.md").read_text()
    assert "## At the end, against dense on the same documents" in text
    assert "| domain | dense | moe | gain of moe | 95% interval |" in text


def test_document_losses_are_saved_and_loaded(tmp_path: Path) -> None:
    path = tmp_path / "documents.npz"
    assert load_document_losses(path) is None
    DocumentLosses(np.arange(2), np.zeros(2, int), np.array([3, 4]), np.array([0.5, 1.5]), ("web",)).save(path, step=7)
    losses, step = load_document_losses(path) or pytest.fail("no file")
    assert (step, losses.names, losses.nats.tolist()) == (7, ("web",), [0.5, 1.5])
    assert [each.name for each in tmp_path.iterdir()] == ["documents.npz"]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(MoelmError, match=r"documents\.npz is damaged"):
        load_document_losses(path)
