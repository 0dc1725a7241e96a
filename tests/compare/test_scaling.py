"""The scaling fit, on runs whose losses lie on a line."""

import json
from pathlib import Path
from typing import Any

import pytest

from moelm.compare.report import compare_runs
from moelm.compare.scaling import DoublingFit
from tests.compare.linear_runs import compared, write_run


def moe(experts: int, top_k: int, width: int) -> dict[str, Any]:
    return {"kind": "moe", "hidden_dim": width, "num_experts": experts, "top_k": top_k}


def fit(folder: Path, ffns: dict[str, dict[str, Any]], finals: list[float]) -> DoublingFit | None:
    paths = [
        write_run(folder / name, slope=(5 - final) / 4, ffn=ffn)
        for (name, ffn), final in zip(ffns.items(), finals, strict=True)
    ]
    return compared(paths).scaling


def test_the_slope_is_that_of_a_doubling_of_the_experts(tmp_path: Path) -> None:
    ffns = {"dense": {"kind": "dense", "hidden_dim": 64}, "4": moe(4, 2, 32), "16": moe(16, 2, 32)}
    found = fit(tmp_path, ffns, [3.0, 2.8, 2.6])
    assert found is not None
    assert (found.setting, list(found.values.values())) == ("experts", [1, 4, 16])
    assert (found.slope, found.loss_at_1) == pytest.approx((-0.1, 3.0))
    assert found.half_width == pytest.approx(0, abs=1e-6)
    assert found.sentence == (
        "Each doubling of the number of experts changes the final loss by -0.100 nats (95%: -0.100 to -0.100, 3 runs)."
    )


def test_narrower_experts_of_equal_total_width_are_granularity(tmp_path: Path) -> None:
    found = fit(tmp_path, {"a": moe(4, 1, 64), "b": moe(8, 2, 32), "c": moe(16, 4, 16)}, [3.0, 2.9, 2.9])
    assert found is not None
    assert (found.setting, list(found.values.values())) == ("granularity", [1, 2, 4])
    assert found.slope == pytest.approx(-0.05)
    # Residuals of 1/60, -1/30 and 1/60 leave one degree of freedom, for which Student's t is 12.71.
    assert found.half_width == pytest.approx(12.71 * (1 / 600) ** 0.5 / 2**0.5)


def test_more_experts_per_token_are_top_k(tmp_path: Path) -> None:
    found = fit(tmp_path, {"a": moe(8, 1, 64), "b": moe(8, 2, 32)}, [3.0, 3.1])
    assert found is not None
    assert (found.setting, list(found.values.values()), found.half_width) == ("top_k", [1, 2], None)
    assert found.sentence == (
        "Each doubling of the experts per token (proportionally narrower) changes the final loss by +0.100 nats "
        "(2 runs, too few for an interval)."
    )


def test_a_dense_and_one_moe_variant_have_no_fit(tmp_path: Path) -> None:
    assert fit(tmp_path, {"dense": {"kind": "dense", "hidden_dim": 64}, "moe": moe(8, 2, 32)}, [3.0, 2.9]) is None


@pytest.mark.parametrize(
    "ffns",
    [
        {"a": moe(8, 2, 32), "b": moe(8, 2, 30)},  # resized to match FLOPs
        {"a": moe(4, 2, 32), "b": moe(8, 1, 32)},
        {"a": moe(4, 2, 32), "b": {**moe(8, 2, 32), "router": {"kind": "hash"}}},
        {"a": moe(4, 2, 32), "b": {**moe(8, 2, 32), "depth": 2}},
    ],
)
def test_variants_that_differ_in_more_have_no_fit(tmp_path: Path, ffns: dict[str, dict[str, Any]]) -> None:
    assert fit(tmp_path, ffns, [3.0, 2.9]) is None


def test_variants_that_differ_in_tokens_have_no_fit(tmp_path: Path) -> None:
    short = write_run(tmp_path / "short", slope=0.5, ffn=moe(4, 2, 32))
    long = write_run(tmp_path / "long", slope=0.5, ffn=moe(8, 2, 32), evaluations=8)
    assert compared([short, long]).scaling is None


def test_seeds_that_shift_all_losses_do_not_widen_the_interval(tmp_path: Path) -> None:
    paths = [
        write_run(tmp_path / f"{n}-{seed}", slope=0.5 + n / 100 + seed / 10, seed=seed, ffn=moe(n, 2, 32))
        for n in (4, 8)
        for seed in (0, 1)
    ]
    found = compared(paths, grouped=True).scaling
    assert found is not None
    assert found.half_width == pytest.approx(0, abs=1e-6)


def test_the_report_has_its_figure_and_table(tmp_path: Path) -> None:
    paths = [str(write_run(tmp_path / f"e{n}", slope=0.5 + n / 100, ffn=moe(n, 2, 32))) for n in (4, 8, 16)]
    compare_runs(paths, tmp_path / "out")
    assert (tmp_path / "out/scaling.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "out/report.json").read_text())["scaling"]["setting"] == "experts"
    text = (tmp_path / "out/report.md").read_text()
    assert "## Loss by the number of experts" in text
    assert "Each doubling of the number of experts changes the final loss by -0." in text
