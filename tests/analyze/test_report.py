"""`moelm analyze`: its files, its keys, its errors, and equal numbers on any number of processes."""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from moelm.analyze.ablation.run import measure_ablations
from moelm.analyze.report import analyze_run
from moelm.cli.app import main
from moelm.errors import MoelmError
from moelm.runs.load import open_run
from tests.conftest import Moelm
from tests.processes import run_ranks

LAYER_KEYS = {
    "layer", "load", "load_max_over_mean", "load_cv", "dead_experts", "shares", "association", "repetition", "entropy",
    "entropy_max", "margin", "coactivation", "vocabulary_specialization", "weight_similarity", "saturation",
}  # fmt: skip


def analyze(folder: Path, run: str, out: Path, **changes: Any) -> dict[str, Any]:
    settings = {"split": "val", "checkpoint": "last", "tokens": 10_000, "permutations": 19, "seed": 0, **changes}
    with contextlib.chdir(folder):
        report = analyze_run(run, out, **settings)
    assert report is not None
    return report


def test_the_directory_has_numbers_page_and_figures(trained: Path, tmp_path: Path) -> None:
    report = analyze(trained, "tiny-moe", tmp_path / "out")
    assert json.loads((tmp_path / "out/routing.json").read_text()) == report
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "routing.json", "routing.html", "shares.png", "repetition.png", "experts.png", "saturation.png",
    }  # fmt: skip
    assert [layer["layer"] for layer in report["layers"]] == [0, 1]
    for layer in report["layers"]:
        assert layer.keys() == LAYER_KEYS
        assert sum(layer["load"]) == pytest.approx(1)
        assert all(sum(shares) == pytest.approx(1) for shares in layer["shares"].values())
        assert layer["association"] == {}  # there is one domain only
        assert 0 < layer["entropy"]["all"] <= layer["entropy_max"]
        for vocabulary in layer["vocabulary_specialization"].values():
            assert len(vocabulary) == 4
            shares = [token["share"] for token in vocabulary[0]]
            assert shares == sorted(shares, reverse=True)
            assert all(0 < share <= 1 for share in shares)
        saturation = layer["saturation"]
        assert saturation["uniform"] == {"experts": 0.5, "first": 0.25}
        assert [same["step"] for same in saturation["checkpoints"]] == [6]
        assert all(0.5 < same["experts"] <= 1 for same in saturation["checkpoints"])
    assert (report["schema"], report["step"]) == (2, 8)
    assert analyze(trained, "tiny-moe", tmp_path / "again") == report


@pytest.mark.usefixtures("no_figures")
def test_a_run_with_one_checkpoint_has_no_saturation(trained: Path, tmp_path: Path) -> None:
    only = tmp_path / "runs/only"
    shutil.copytree(trained / "runs/tiny-moe", only, ignore=shutil.ignore_patterns("step-00000006"))
    report = analyze(trained, str(only), tmp_path / "out")
    assert [layer["saturation"]["checkpoints"] for layer in report["layers"]] == [[], []]
    assert not (tmp_path / "out/saturation.png").exists()
    assert report["ablation"] is None


def test_errors_are_sentences(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").touch()
    for run, out, message in (("tiny-moe", "out", "exists already"), ("tiny-dense", "new", "The model is dense")):
        with pytest.raises(MoelmError, match=message):
            analyze(trained, run, tmp_path / out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_ablations_have_their_keys_figures_and_sentences(
    trained: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    report = analyze(trained, "tiny-moe", tmp_path / "out", ablate="all", ablate_tokens=600)
    ablation = report["ablation"]
    assert ablation.keys() == {
        "extent", "tokens", "documents", "held_out_tokens", "draws", "sampled_routes", "top_k", "removal", "layers",
        "effects",
    }  # fmt: skip
    assert 300 < ablation["tokens"] < 800
    assert [point["top_k"] for point in ablation["top_k"]] == [1, 2, 3, 4]
    assert ablation["top_k"][1]["mean"] == 0
    assert ablation["removal"].keys() == {"load", "ablation", "random"}
    for curve in ablation["removal"].values():
        assert [point["experts"] for point in curve] == [2, 3, 4]
    assert ablation["effects"]["cells"] == 2 * 4
    for layer in ablation["layers"]:
        assert layer["experts"].keys() == {"mask", "zero", "serves", "agreement"}
        assert layer["routes"].keys() == {"replaced", "better_than_random", "regret", "shares"}
        assert 0 < layer["routes"]["better_than_random"]["mean"] < 1
    assert {path.name for path in (tmp_path / "out").glob("*.png")} > {"ablation.png", "routes.png", "capacity.png"}
    page = (tmp_path / "out/routing.html").read_text()
    assert "Without one expert" in page
    assert "Domains that experts serve" in page
    request.getfixturevalue("no_figures")
    few = analyze(trained, "tiny-moe", tmp_path / "few", tokens=33, ablate="all", ablate_tokens=600)
    assert few["ablation"] == ablation
    with contextlib.chdir(trained):
        run = open_run("tiny-moe", "last", "val")
        assert measure_ablations(run, "all", 600, 0) == ablation
        layers_only = measure_ablations(run, "layers", 600, 0)
    assert {"effects", "draws"}.isdisjoint(layers_only)
    assert layers_only["removal"].keys() == {"load", "random"}
    assert layers_only["layers"] == [{k: v for k, v in layer.items() if k != "experts"} for layer in ablation["layers"]]


@pytest.mark.slow
def test_two_processes_count_what_one_counts(moelm: Moelm, trained: Path, tmp_path: Path) -> None:
    argv = ["analyze", "tiny-moe", "--split", "train", "--json", "--permutations", "9"]
    argv += ["--ablate", "all", "--ablate-tokens", "1000"]
    alone = moelm(*argv, "--out", str(tmp_path / "one"), cwd=trained)
    assert alone.returncode == 0, alone.stderr
    both = run_ranks(main, ["moelm", *argv, "--out", str(tmp_path / "two")], trained, 2)
    assert both.returncode == 0, both.stderr
    assert json.loads(both.stdout) == json.loads(alone.stdout)
