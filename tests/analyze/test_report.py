"""`moelm analyze`: its files, its keys, its errors, and equal numbers on any number of processes."""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from moelm.analyze.report import analyze_run
from moelm.cli.app import main
from moelm.errors import MoelmError
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


def test_a_run_with_one_checkpoint_has_no_saturation(trained: Path, tmp_path: Path) -> None:
    only = tmp_path / "runs/only"
    shutil.copytree(trained / "runs/tiny-moe", only, ignore=shutil.ignore_patterns("step-00000006"))
    report = analyze(trained, str(only), tmp_path / "out")
    assert [layer["saturation"]["checkpoints"] for layer in report["layers"]] == [[], []]
    assert not (tmp_path / "out/saturation.png").exists()


def test_errors_are_sentences(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").touch()
    for run, out, message in (("tiny-moe", "out", "exists already"), ("tiny-dense", "new", "The model is dense")):
        with pytest.raises(MoelmError, match=message):
            analyze(trained, run, tmp_path / out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_two_processes_count_what_one_counts(moelm: Moelm, trained: Path, tmp_path: Path) -> None:
    argv = ["analyze", "tiny-moe", "--split", "train", "--json", "--permutations", "9"]
    alone = moelm(*argv, "--out", str(tmp_path / "one"), cwd=trained)
    assert alone.returncode == 0, alone.stderr
    both = run_ranks(main, ["moelm", *argv, "--out", str(tmp_path / "two")], trained, 2)
    assert both.returncode == 0, both.stderr
    assert json.loads(both.stdout) == json.loads(alone.stdout)
