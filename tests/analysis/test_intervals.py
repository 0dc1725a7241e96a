"""How sure a difference is: against formulas, and by how often an interval holds the truth."""

import json
from pathlib import Path

import numpy as np
import pytest

from moelm.analysis.intervals import draw, scatter_of
from moelm.analysis.report import compare_runs
from moelm.analysis.runs import Array
from moelm.document_losses import DocumentLosses, load_document_losses
from moelm.errors import MoelmError
from tests.analysis.made_runs import MOE, compared, write_run


def interval(gains: Array, tokens: Array, resamples: int = 10_000) -> tuple[float, float]:
    """Of a run that gains so many nats on each document on another one, documents alone."""
    tokens_R, nats_RN = draw(tokens, gains[None], resamples)
    low, high = np.quantile(nats_RN[:, 0] / tokens_R, [0.025, 0.975])
    return float(low), float(high)


def test_over_documents_it_is_the_normal_interval() -> None:
    gains = np.random.default_rng(1).normal(0.1, 0.5, 400)
    error = 1.96 * gains.std() / 20
    assert interval(gains, np.ones(400)) == pytest.approx((gains.mean() - error, gains.mean() + error), abs=0.005)


def test_over_documents_it_holds_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    held = 0
    for _ in range(200):
        tokens = rng.integers(5, 50, 150).astype(np.float64)
        low, high = interval(tokens * rng.normal(0.02, 0.2, 150), tokens, resamples=1000)
        held += low <= 0.02 <= high
    assert 180 <= held <= 198


@pytest.mark.parametrize("seeds", [(2, 2), (3, 3), (5, 5), (3, 2), (4, 1)])
def test_over_seeds_it_holds_the_truth_as_often_as_it_says(seeds: tuple[int, int]) -> None:
    rng = np.random.default_rng(3)
    held = 0
    for _ in range(1000):
        shared = rng.normal(0, 0.05, max(seeds))  # what a seed does to both alike
        a, b = (3 + shared[:count] + rng.normal(0, 0.02, count) for count in seeds)
        scatter = scatter_of([a, b], [tuple(range(count)) for count in seeds])
        assert scatter is not None
        held += abs(a.mean() - b.mean()) <= scatter.doubt(*seeds)
    assert held >= 930
    if seeds[0] == seeds[1]:
        assert held <= 970  # no wider than it must be


def test_two_contestants_of_the_same_seeds_are_the_paired_t_test() -> None:
    a, b = np.array([3.0, 3.2, 3.1]), np.array([3.1, 3.25, 3.3])
    scatter = scatter_of([a, b], [(0, 1, 2)] * 2)
    assert scatter is not None
    assert scatter.doubt(3, 3) == pytest.approx(4.303 * float((a - b).std(ddof=1)) / 3**0.5)


def test_one_seed_each_has_no_scatter() -> None:
    assert scatter_of([np.array([3.0]), np.array([3.1])], [(0,), (0,)]) is None


def test_drawing_in_parts_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    gains = np.random.default_rng(1).normal(0.1, 0.5, 40)
    whole = draw(np.ones(40), gains[None])
    monkeypatch.setattr("moelm.analysis.intervals.CHUNK", 1000)
    for mine, its in zip(whole, draw(np.ones(40), gains[None]), strict=True):
        assert np.allclose(mine, its)


def test_both_sides_of_a_pair_tell_the_same(tmp_path: Path) -> None:
    losses = np.random.default_rng(0).normal(3, 0.5, (2, 30))
    paths = [
        write_run(tmp_path / name, slope=0.5, documents=each.tolist()) for name, each in zip("ab", losses, strict=True)
    ]
    comparison = compared(paths)
    forth, back = comparison.pair("a", "b").paired, comparison.pair("b", "a").paired
    assert forth is not None
    assert back is not None
    assert (forth.whole.gain, forth.whole.low, forth.whole.high) == (-back.whole.gain, -back.whole.high, -back.whole.low)
    assert forth.whole.better == pytest.approx(1 - back.whole.better)


def test_a_document_that_outweighs_the_others_is_told(tmp_path: Path) -> None:
    a, b = (write_run(tmp_path / name, slope=0.5, documents=[3.0] * 20) for name in "ab")
    for path, nats in ((a, 3.0), (b, 2.9)):
        tokens = np.array([10] * 19 + [10_000])
        told = DocumentLosses(np.arange(20), np.zeros(20, int), tokens, nats * tokens, ("code",))
        told.save(path / "documents.npz", step=400)
    sureness = compared([a, b]).verdict.sureness
    assert "over 20 evaluation documents (which weigh as much as 1 of equal length); another seed" in sureness


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


def test_an_unsure_difference_decides_nothing(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    losses = rng.normal(3, 0.5, 40)
    dense = write_run(tmp_path / "dense", slope=0.5, documents=losses.tolist())
    moe = write_run(tmp_path / "moe", slope=0.505, ffn=MOE, documents=(losses + rng.normal(-0.02, 0.3, 40)).tolist())
    comparison = compared([dense, moe])
    assert comparison.verdict.sentence.startswith(
        "Undecided: against dense, moe's validation loss is not surely different at"
    )
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
    assert pair["paired"].keys() == {
        *("gain", "low", "high", "documents", "documents_effective", "documents_better", "seeds", "seeds_scatter")
    }
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
