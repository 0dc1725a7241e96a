"""Variants of several lengths, read at the ends of their schedules; the expected numbers are computed by hand.

A dense run of 40 s; a mixture in runs of 30 s and 60 s. At 40 s the mixture is read at log(40/30) / log(60/30) = 0.41504 of
the way between its ends.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from moelm.compare.bootstrap import resample_sums
from moelm.compare.figures import draw_comparison
from moelm.compare.report import compare_runs
from moelm.compare.variants import group_runs
from moelm.errors import MoelmError
from moelm.runs.record import read_runs
from tests.compare.linear_runs import MOE, compared, write_run

PART = 0.4150375
"""Of the way from 30 s to 60 s, in the logarithm."""


def write_to_loss(
    path: Path,
    final: float,
    hundreds: int,
    *,
    seconds: float = 0.15,
    documents: Sequence[float] | None = None,
    **options: object,
) -> Path:
    """A run of so many hundred steps whose loss ends at `final`; two documents at half a nat around it by default."""
    documents = [final - 0.5, final + 0.5] if documents is None else documents
    slope = (5 - final) / hundreds
    return write_run(path, slope=slope, evaluations=hundreds, seconds=seconds, documents=documents, **options)  # type: ignore[arg-type]


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """Two seeds: dense runs of 400 steps, and mixtures of 200 and 400 steps with other losses at the same step."""
    finals = {0: (3.0, 3.2, 2.2), 1: (3.1, 3.3, 2.4)}
    return [
        write_to_loss(tmp_path / f"{name}-{seed}", final, hundreds, seconds=seconds, ffn=ffn, seed=seed, schedule="wsd")
        for seed, losses in finals.items()
        for name, final, hundreds, seconds, ffn in (
            ("dense", losses[0], 4, 0.1, {"kind": "dense", "hidden_dim": 64}),
            ("short-moe", losses[1], 2, 0.15, MOE),
            ("moe", losses[2], 4, 0.15, MOE),
        )
    ]


def test_runs_that_differ_in_their_length_are_one_variant(paths: list[Path]) -> None:
    dense, moe = group_runs(read_runs(paths), grouped=True)
    assert (dense.name, len(dense.lengths)) == ("dense", 1)
    assert (moe.name, moe.seeds, moe.val.steps[-1]) == ("moe", (0, 1), 400)
    assert [length.first.config.train.steps for length in moe.lengths] == [200, 400]
    assert [length.seeds for length in moe.lengths] == [(0, 1)] * 2
    assert len(group_runs(read_runs(paths), grouped=False)) == 6


def test_losses_are_read_at_the_ends_of_completed_runs(paths: list[Path]) -> None:
    comparison = compared(paths, grouped=True)
    forth, back = comparison.pair("moe", "dense"), comparison.pair("dense", "moe")
    seconds, tokens = forth.equal_cost["seconds"], forth.equal_cost["tokens"]
    assert seconds is not None
    assert tokens is not None
    assert seconds.at == pytest.approx(40)
    assert (seconds.read_a, seconds.read_b) == ("between completed runs", "end of schedule")
    assert (seconds.loss_a, seconds.loss_b) == pytest.approx((3.25 - PART * 0.95, 3.05))
    assert (tokens.read_a, tokens.read_b) == ("end of schedule", "end of schedule")
    assert (tokens.loss_a, tokens.gain) == pytest.approx((2.3, 0.75))
    reverse = back.equal_cost["seconds"]
    assert reverse is not None
    assert reverse.read_a == "end of schedule"
    assert reverse.gain == pytest.approx(-seconds.gain)


def test_each_axis_has_its_paired_interval(paths: list[Path]) -> None:
    """All documents have the same gain, so the interval is that of a paired t-test over two seeds."""
    pair = compared(paths, grouped=True).pair("moe", "dense")
    seconds = pair.equal_cost["seconds"]
    assert seconds is not None
    assert seconds.interval is not None
    gains = [3.0 - (3.2 - PART * 1.0), 3.1 - (3.3 - PART * 0.9)]  # 0.215 and 0.174
    half_width = 12.71 * abs(gains[0] - gains[1]) / 2
    assert seconds.interval.gain == pytest.approx(sum(gains) / 2)
    assert seconds.interval.low == pytest.approx(sum(gains) / 2 - half_width)
    assert seconds.interval.high == pytest.approx(sum(gains) / 2 + half_width)
    assert seconds.margin == pytest.approx(half_width)
    assert (seconds.seeds_ahead, seconds.seeds_shared) == (2, 2)
    tokens = pair.equal_cost["tokens"]
    assert tokens is not None
    assert pair.paired is not None
    assert tokens.interval == pair.paired.overall


def test_documents_are_interpolated_with_the_same_weights(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    dense, short, long = rng.normal([[3.0], [2.9], [2.5]], 0.3, (3, 40))
    paths = [
        write_to_loss(tmp_path / "dense", float(dense.mean()), 4, seconds=0.1, documents=dense.tolist()),
        write_to_loss(tmp_path / "short", float(short.mean()), 2, documents=short.tolist(), ffn=MOE),
        write_to_loss(tmp_path / "long", float(long.mean()), 4, documents=long.tolist(), ffn=MOE),
    ]
    equal = compared(paths, grouped=True).pair("long", "dense").equal_cost["seconds"]
    assert equal is not None
    assert equal.interval is not None
    gains = dense - ((1 - PART) * short + PART * long)
    assert equal.interval.gain == pytest.approx(gains.mean(), abs=1e-6)
    assert equal.interval.better_documents == (gains > 0).mean()
    tokens_R, nats_RN = resample_sums(np.full(40, 10.0), 10 * gains[None])
    low, high = np.quantile(nats_RN[:, 0] / tokens_R, [0.025, 0.975])
    assert (equal.interval.low, equal.interval.high) == pytest.approx((low, high), abs=1e-6)


def test_cost_to_reach_between_completed_runs(paths: list[Path]) -> None:
    """From 3.25 at the first end to 2.3 at the second, 3.05 is 0.2 / 0.95 of the way; by seed 0.2 / 1 and 0.2 / 0.9."""
    reached = compared(paths, grouped=True).pair("moe", "dense").cost_to_reach
    part = 0.2 / 0.95
    assert reached["tokens"].cost == pytest.approx(200_000 * 2**part)
    assert reached["seconds"].ratio == pytest.approx(40 / (30 * 2**part))
    assert (reached["tokens"].read, reached["tokens"].at_most) == ("between completed runs", False)
    exponents = np.array([1 - 0.2, 1 - 0.2 / 0.9])  # of the ratio in tokens, 400,000 / (200,000 * 2**part)
    half_width = 12.71 * (exponents[0] - exponents[1]) / 2
    assert reached["tokens"].ratio_low == pytest.approx(2 ** (exponents.mean() - half_width))
    assert reached["tokens"].ratio_high == pytest.approx(2 ** (exponents.mean() + half_width))


def test_a_loss_above_the_shortest_end_gives_a_bound(tmp_path: Path) -> None:
    paths = [
        write_to_loss(tmp_path / "dense", 3.0, 4),
        write_to_loss(tmp_path / "short", 2.8, 2, ffn=MOE),
        write_to_loss(tmp_path / "long", 2.5, 4, ffn=MOE),
    ]
    comparison = compared(paths, grouped=True)
    reached = comparison.pair("long", "dense").cost_to_reach["tokens"]
    assert (reached.cost, reached.ratio, reached.at_most) == (200_000, 2.0, True)
    assert "with at least 2.00× fewer tokens (200K against 400K)" in comparison.verdict.efficiency
    assert any(
        note.startswith("The shortest completed runs of long end below dense's final loss") for note in comparison.notes
    )
    assert comparison.pair("dense", "long").cost_to_reach["tokens"].cost is None


@pytest.mark.parametrize(
    ("seconds", "read", "loss"),
    [
        (0.0752, "end of schedule", 3.2),  # 30.08 s, within 1% of 30 s
        (0.1495, "end of schedule", 2.2),  # 59.8 s, within 1% of 60 s
        (0.2, "end of schedule", 2.2),  # the other is slower: the last end
        (0.05, "in mid-schedule", 5 - 0.7 * 20 / 15),  # 20 s, before the first end: on the curve of 400 steps
    ],
)
def test_how_a_loss_is_read(tmp_path: Path, seconds: float, read: str, loss: float) -> None:
    paths = [
        write_to_loss(tmp_path / "dense", 3.0, 4, seconds=seconds),
        write_to_loss(tmp_path / "short", 3.2, 2, ffn=MOE, schedule="wsd"),
        write_to_loss(tmp_path / "long", 2.2, 4, ffn=MOE, schedule="wsd"),
    ]
    comparison = compared(paths, grouped=True)
    equal = comparison.pair("long", "dense").equal_cost["seconds"]
    assert equal is not None
    assert equal.read_a == read
    assert equal.loss_a == pytest.approx(loss)
    assert (equal.interval is None) == ("in mid-schedule" in (equal.read_a, equal.read_b))
    notes = [note for note in comparison.notes if note.startswith("At equal wall-clock, long is compared at 33%")]
    assert len(notes) == (read == "in mid-schedule")


def test_lengths_with_other_seeds_or_incomplete_runs_are_refused(paths: list[Path]) -> None:
    with pytest.raises(
        MoelmError, match="moe has runs of 200 steps with the seeds 0, and runs of 400 steps with the seeds 0, 1"
    ):
        compared([path for path in paths if path.name != "short-moe-1"], grouped=True)
    lines = (paths[1] / "metrics.jsonl").read_text().splitlines()
    (paths[1] / "metrics.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(MoelmError, match=r"short-moe-0 was last evaluated at step 100 of 200; .* must be complete"):
        compared(paths, grouped=True)


def test_times_that_do_not_grow_with_the_length_are_not_interpolated(tmp_path: Path) -> None:
    paths = [
        write_to_loss(tmp_path / "dense", 3.0, 4, seconds=0.1),
        write_to_loss(tmp_path / "short", 3.2, 2, ffn=MOE, seconds=0.4),
        write_to_loss(tmp_path / "long", 2.2, 4, ffn=MOE, seconds=0.15),
    ]
    comparison = compared(paths, grouped=True)
    equal = comparison.pair("long", "dense").equal_cost["seconds"]
    assert equal is not None
    assert equal.read_a == "in mid-schedule"
    assert any(note.startswith("Longer runs of long did not take more time than shorter ones") for note in comparison.notes)


@pytest.mark.usefixtures("no_figures")
def test_the_report_says_how_losses_were_read(paths: list[Path], tmp_path: Path) -> None:
    comparison = compare_runs([str(path) for path in paths], tmp_path / "out", grouped=True)
    assert (
        "0.750 nats lower at equal tokens (2.300 against 3.050; 95%: 0.115 to 1.385; ahead in 2 of 2 seeds)"
        in comparison.verdict.sentence
    )
    assert "95% of the ratio over seeds: 1.57 to 1.91" in comparison.verdict.efficiency
    note = "At equal wall-clock, moe is read between the ends of its completed runs, of 200 and 400 steps."
    assert note in comparison.notes
    text = (tmp_path / "out/report.md").read_text()
    assert (
        "2.856 | 3.050 | +0.194 uncertain | -0.069 to +0.458 | 2 of 2 | between completed runs / end of schedule |" in text
    )
    assert "| moe | dense at 3.050 | 231K (1.73×, 1.57 to 1.91) |" in text
    assert "| short-moe-0 | moe | 0 | 200 | 3.200 | 30.0 s |" in text
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert [length["steps"] for length in report["variants"][1]["lengths"]] == [200, 400]
    pair = next(pair for pair in report["pairs"] if pair["a"] == "moe")
    assert pair["equal_cost"]["seconds"]["read_a"] == "between completed runs"
    assert pair["equal_cost"]["seconds"]["interval"]["gain"] == pytest.approx(0.19429, abs=1e-5)


def test_the_figure_joins_the_ends_of_the_lengths(paths: list[Path]) -> None:
    panels = draw_comparison(compared(paths, grouped=True)).axes
    seconds = panels[2]
    lines = {line.get_label(): line for line in seconds.get_lines()}
    x, y = (np.asarray(data, dtype=float) for data in lines["moe"].get_data())
    assert (x[0], x[-1], y[0], y[-1]) == pytest.approx((30, 60, 3.25, 2.3))
    assert np.interp(40, x, y) == pytest.approx(3.25 - PART * 0.95, abs=1e-3)
    assert len(np.asarray(lines["dense"].get_xdata())) == 5  # a single length is drawn as its curve
    assert seconds.get_xlabel() == "training time (seconds)"
