"""`analyze`: its folder, its keys, its sentences, and the same figures on any number of processes."""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from moelm.analyze.report import analyze_run
from moelm.errors import MoelmError
from tests.conftest import Moelm
from tests.distributed.launching import torchrun

LAYER_KEYS = {
    "layer", "load", "load_max_over_mean", "load_cv", "dead_experts", "shares", "association", "repetition", "entropy",
    "entropy_max", "margin", "together", "characteristic", "similarity", "saturation",
}  # fmt: skip


def analyze(place: Path, run: str, out: Path, **changes: Any) -> dict[str, Any]:
    settings = {"split": "val", "checkpoint": "last", "tokens": 10_000, "permutations": 19, "seed": 0, **changes}
    with contextlib.chdir(place):
        told = analyze_run(run, out, **settings)
    assert told is not None
    return told


def test_the_folder_holds_numbers_and_pictures(trained: Path, tmp_path: Path) -> None:
    told = analyze(trained, "tiny-moe", tmp_path / "out")
    assert json.loads((tmp_path / "out/routing.json").read_text()) == told
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "routing.json", "routing.html", "shares.png", "repetition.png", "experts.png", "saturation.png",
    }  # fmt: skip
    assert [layer["layer"] for layer in told["layers"]] == [0, 1]
    for layer in told["layers"]:
        assert layer.keys() == LAYER_KEYS
        assert sum(layer["load"]) == pytest.approx(1)
        assert all(sum(shares) == pytest.approx(1) for shares in layer["shares"].values())
        assert layer["association"] == {}  # one domain is like no other
        assert 0 < layer["entropy"]["all"] <= layer["entropy_max"]
        for found in layer["characteristic"].values():
            assert len(found) == 4
            shares = [token["share"] for token in found[0]]
            assert shares == sorted(shares, reverse=True)
            assert all(0 < share <= 1 for share in shares)
        saturation = layer["saturation"]
        assert saturation["uniform"] == {"experts": 0.5, "first": 0.25}
        assert [same["step"] for same in saturation["checkpoints"]] == [6]
        assert all(0.5 < same["experts"] <= 1 for same in saturation["checkpoints"])
    assert told["step"] == 8
    assert analyze(trained, "tiny-moe", tmp_path / "again") == told


def test_a_run_with_one_checkpoint_has_no_saturation(trained: Path, tmp_path: Path) -> None:
    only = tmp_path / "runs/only"
    shutil.copytree(trained / "runs/tiny-moe", only, ignore=shutil.ignore_patterns("step-00000006"))
    told = analyze(trained, str(only), tmp_path / "out")
    assert [layer["saturation"]["checkpoints"] for layer in told["layers"]] == [[], []]
    assert not (tmp_path / "out/saturation.png").exists()


def test_mistakes_are_sentences(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").touch()
    for run, out, told in (("tiny-moe", "out", "exists already"), ("tiny-dense", "new", "The model is dense")):
        with pytest.raises(MoelmError, match=told):
            analyze(trained, run, tmp_path / out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_two_processes_count_what_one_counts(moelm: Moelm, trained: Path, tmp_path: Path) -> None:
    words = ["analyze", "tiny-moe", "--split", "train", "--json", "--permutations", "9"]
    alone = moelm(*words, "--out", str(tmp_path / "one"), cwd=trained)
    assert alone.returncode == 0, alone.stderr
    both = torchrun(trained, 2, "moelm", *words, "--out", str(tmp_path / "two"))
    assert both.returncode == 0, both.stderr
    assert json.loads(both.stdout) == json.loads(alone.stdout)
