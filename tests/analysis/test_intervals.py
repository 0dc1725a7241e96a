"""How sure a difference is: against formulas, and by how often an interval holds the truth."""

import json
from pathlib import Path

import numpy as np
import pytest

from moelm.analysis.intervals import bounds, draw
from moelm.analysis.report import compare_runs
from moelm.analysis.runs import Array
from moelm.document_losses import DocumentLosses, load_document_losses
from moelm.errors import MoelmError
from tests.analysis.made_runs import MOE, compared, write_run


def interval(gains: Array, tokens: Array, resamples: int = 10_000) -> tuple[float, float]:
    """Of a run that gains so many nats on each document on another one."""
    draws = draw(tokens, np.stack([np.zeros(len(gains)), gains]), resamples)
    return bounds(draws, slice(0, 1), slice(1, 2), same_seeds=True)


def test_over_documents_it_is_the_normal_interval() -> None:
    gains = np.random.default_rng(1).normal(0.1, 0.5, 400)
    error = 1.96 * gains.std() / 20
    assert interval(gains, np.ones(400)) == pytest.approx((gains.mean() - error, gains.mean() + error), abs=0.005)


@pytest.mark.parametrize("same_seeds", [True, False])
def test_over_seeds_its_width_is_that_of_their_mean(same_seeds: bool) -> None:
    # Documents all alike: what is left is the spread between seeds.
    a, b = np.random.default_rng(3).normal(0, 1, (2, 12))
    draws = draw(np.ones(50), np.outer(np.concatenate([a, b]), np.ones(50)), resamples=100_000)
    low, high = bounds(draws, slice(0, 12), slice(12, 24), same_seeds)
    variance = (b - a).var(ddof=1) / 12 if same_seeds else (a.var(ddof=1) + b.var(ddof=1)) / 12
    assert (low + high) / 2 == pytest.approx(float(b.mean() - a.mean()), abs=0.05)
    assert (high - low) / (2 * 1.96) == pytest.approx(variance**0.5, rel=0.05)


def test_it_holds_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    held = 0
    for _ in range(200):
        tokens = rng.integers(5, 50, 150).astype(np.float64)
        low, high = interval(tokens * rng.normal(0.02, 0.2, 150), tokens, resamples=1000)
        held += low <= 0.02 <= high
    assert 180 <= held <= 198


def test_drawing_in_parts_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    gains = np.random.default_rng(1).normal(0.1, 0.5, 40)
    whole = draw(np.ones(40), gains[None])
    monkeypatch.setattr("moelm.analysis.intervals.CHUNK", 1000)
    parts = draw(np.ones(40), gains[None])
    assert np.array_equal(whole.tokens_R, parts.tokens_R)
    assert np.allclose(whole.nats_RN, parts.nats_RN)


def test_pairing_sees_what_the_spread_of_documents_hides(tmp_path: Path) -> None:
    losses = np.linspace(1, 5, 60)
    dense = write_run(tmp_path / "dense", slope=0.5, documents=losses.tolist())
    moe = write_run(tmp_path / "moe", slope=0.5, ffn=MOE, documents=(losses - 0.01 - 0.001 * np.sin(losses)).tolist())
    both = compared([dense, moe]).pair("moe", "dense").paired
    assert both is not None
    assert both.whole.low > 0.009
    assert both.whole.high < 0.011
    assert both.whole.better == 1
    assert both.domains.keys() == {"code", "synthetic-sums"}


def test_an_unsure_difference_is_a_tie(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    losses = rng.normal(3, 0.5, 40)
    dense = write_run(tmp_path / "dense", slope=0.5, documents=losses.tolist())
    moe = write_run(tmp_path / "moe", slope=0.505, ffn=MOE, documents=(losses + rng.normal(-0.02, 0.3, 40)).tolist())
    comparison = compared([dense, moe])
    assert comparison.verdict.sentence.startswith("Tie: against dense")
    assert (
        "with 95% confidence over 40 evaluation documents; another seed may say otherwise." in comparison.verdict.sureness
    )


def test_other_documents_or_another_step_are_not_paired(tmp_path: Path) -> None:
    dense = write_run(tmp_path / "dense", slope=0.5, documents=[1, 2, 3])
    fewer = write_run(tmp_path / "fewer", slope=0.6, documents=[1, 2])
    assert compared([dense, fewer]).pair("fewer", "dense").paired is None
    older = write_run(tmp_path / "older", slope=0.7, documents=[1, 2, 3])
    losses, _ = load_document_losses(older / "documents.npz") or pytest.fail("no file")
    losses.save(older / "documents.npz", step=300)
    comparison = compared([dense, older])
    assert comparison.pair("older", "dense").paired is None
    assert comparison.verdict.sureness.startswith("How sure that is, is not known")


def test_they_are_told_in_the_report(tmp_path: Path) -> None:
    dense = write_run(tmp_path / "dense", slope=0.5, documents=[3, 3.5, 4, 2, 3, 3.2])
    moe = write_run(tmp_path / "moe", slope=0.8, ffn=MOE, documents=[2.9, 3.3, 3.9, 1.8, 2.9, 3.0])
    compare_runs([str(dense), str(moe)], tmp_path / "out")
    told = json.loads((tmp_path / "out/report.json").read_text())
    pair = next(pair for pair in told["pairs"] if pair["a"] == "moe")
    assert pair["paired"].keys() == {"gain", "low", "high", "documents", "documents_better", "seeds"}
    assert pair["paired"]["gain"] == pytest.approx(0.15)
    assert pair["domains"].keys() == {"code", "synthetic-sums"}
    text = (tmp_path / "out/report.md").read_text()
    assert "## At the end, against dense on the same documents" in text
    assert "| domain | dense | moe | gain of moe | 95% interval |" in text


def test_a_file_of_document_losses_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "documents.npz"
    assert load_document_losses(path) is None
    DocumentLosses(np.arange(2), np.zeros(2, int), np.array([3, 4]), np.array([0.5, 1.5]), ("web",)).save(path, step=7)
    losses, step = load_document_losses(path) or pytest.fail("no file")
    assert (step, losses.names, losses.nats.tolist()) == (7, ("web",), [0.5, 1.5])
    assert [each.name for each in tmp_path.iterdir()] == ["documents.npz"]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(MoelmError, match=r"documents\.npz is damaged"):
        load_document_losses(path)
