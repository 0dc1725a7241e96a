"""What a doubling brings, on runs whose losses lie on a line."""

import json
from pathlib import Path
from typing import Any

import pytest

from moelm.analysis.report import compare_runs
from moelm.analysis.trends import Trend
from tests.analysis.made_runs import compared, write_run


def moe(experts: int, top_k: int, width: int) -> dict[str, Any]:
    return {"kind": "moe", "hidden_dim": width, "num_experts": experts, "top_k": top_k}


def trend(folder: Path, ffns: dict[str, dict[str, Any]], finals: list[float]) -> Trend | None:
    paths = [
        write_run(folder / name, slope=(5 - final) / 4, ffn=ffn)
        for (name, ffn), final in zip(ffns.items(), finals, strict=True)
    ]
    return compared(paths).trend


def test_the_slope_is_that_of_a_doubling_of_the_experts(tmp_path: Path) -> None:
    ffns = {"dense": {"kind": "dense", "hidden_dim": 64}, "4": moe(4, 2, 32), "16": moe(16, 2, 32)}
    found = trend(tmp_path, ffns, [3.0, 2.8, 2.6])
    assert found is not None
    assert (found.what, found.values) == ("experts", (1, 4, 16))
    assert (found.slope, found.at_one) == pytest.approx((-0.1, 3.0))
    assert found.doubt == pytest.approx(0, abs=1e-6)
    assert found.sentence == (
        "Each doubling of the number of experts changes the final loss by -0.100 nats (95%: -0.100 to -0.100, 3 runs)."
    )


def test_the_same_units_cut_finer_are_granularity(tmp_path: Path) -> None:
    found = trend(tmp_path, {"a": moe(4, 1, 64), "b": moe(8, 2, 32), "c": moe(16, 4, 16)}, [3.0, 2.9, 2.9])
    assert found is not None
    assert (found.what, found.values) == ("granularity", (1, 2, 4))
    assert found.slope == pytest.approx(-0.05)
    # Residuals of 1/60, -1/30 and 1/60 leave one degree of freedom, for which Student's t is 12.71.
    assert found.doubt == pytest.approx(12.71 * (1 / 600) ** 0.5 / 2**0.5)


def test_more_visits_are_told_by_top_k(tmp_path: Path) -> None:
    found = trend(tmp_path, {"a": moe(8, 1, 64), "b": moe(8, 2, 32)}, [3.0, 3.1])
    assert found is not None
    assert (found.what, found.values, found.doubt) == ("top_k", (1, 2), None)
    assert found.sentence == (
        "Each doubling of the experts that a token visits, each as much narrower, changes the final loss by +0.100 nats "
        "(2 runs, too few to say how surely)."
    )


def test_a_dense_model_and_one_mixture_have_no_trend(tmp_path: Path) -> None:
    assert trend(tmp_path, {"dense": {"kind": "dense", "hidden_dim": 64}, "moe": moe(8, 2, 32)}, [3.0, 2.9]) is None


@pytest.mark.parametrize(
    "ffns",
    [
        {"a": moe(8, 2, 32), "b": moe(8, 2, 30)},  # nudged by a match
        {"a": moe(4, 2, 32), "b": moe(8, 1, 32)},
        {"a": moe(4, 2, 32), "b": {**moe(8, 2, 32), "router": {"kind": "hash"}}},
        {"a": moe(4, 2, 32), "b": {**moe(8, 2, 32), "depth": 2}},
    ],
)
def test_what_differs_in_more_is_no_trend(tmp_path: Path, ffns: dict[str, dict[str, Any]]) -> None:
    assert trend(tmp_path, ffns, [3.0, 2.9]) is None


def test_more_tokens_are_no_trend_of_experts(tmp_path: Path) -> None:
    short = write_run(tmp_path / "short", slope=0.5, ffn=moe(4, 2, 32))
    long = write_run(tmp_path / "long", slope=0.5, ffn=moe(8, 2, 32), evaluations=8)
    assert compared([short, long]).trend is None


def test_seeds_that_shift_all_alike_are_no_doubt(tmp_path: Path) -> None:
    paths = [
        write_run(tmp_path / f"{n}-{seed}", slope=0.5 + n / 100 + seed / 10, seed=seed, ffn=moe(n, 2, 32))
        for n in (4, 8)
        for seed in (0, 1)
    ]
    found = compared(paths, grouped=True).trend
    assert found is not None
    assert found.doubt == pytest.approx(0, abs=1e-6)


def test_it_has_a_picture_and_a_table(tmp_path: Path) -> None:
    paths = [str(write_run(tmp_path / f"e{n}", slope=0.5 + n / 100, ffn=moe(n, 2, 32))) for n in (4, 8, 16)]
    compare_runs(paths, tmp_path / "out")
    assert (tmp_path / "out/trend.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "out/report.json").read_text())["trend"]["of"] == "experts"
    text = (tmp_path / "out/report.md").read_text()
    assert "## Loss by the number of experts" in text
    assert "Each doubling of the number of experts changes the final loss by -0." in text
