"""The benchmark: contestants in turns, in processes of their own."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from moelm.bench import Timing
from tests.conftest import Moelm


def test_a_ratio_is_that_of_steps_side_by_side() -> None:
    """A machine that slows down for both changes nothing."""
    ours = Timing("a", [1.0, 10.0, 100.0], 8, 8, 0, 1.0)
    theirs = Timing("b", [2.0, 20.0, 200.0], 8, 8, 0, 1.0)
    assert theirs.times(ours) == 2.0
    assert ours.as_dict()["tokens_per_s"] == 0.8


def test_contestants_take_turns(moelm: Moelm, workplace: Path) -> None:
    done = moelm("bench", "dense.yaml", "moe.yaml", "train.batch_tokens=128", "--rounds", "2", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    dense, sparse = told["contestants"]
    assert (dense["name"], sparse["name"]) == ("tiny-dense", "tiny-moe")
    for contestant in (dense, sparse):
        assert len(contestant["steps_s"]) == 2
        assert contestant["tokens_per_s"] == pytest.approx(128 / contestant["step_s"])
        assert 0 < contestant["mfu"] < 1
        assert contestant["memory_peak_bytes"] > 10_000_000
    assert sorted(path.name for path in workplace.iterdir()) == ["dense.yaml", "moe.yaml", "text.txt"]


def test_peers_that_are_not_there_are_told_of(workplace: Path) -> None:
    """Also where they are: the finder of the library is taken away."""
    program = (
        "import sys, moelm.bench as bench\n"
        "bench.find_spec = lambda name: None\n"
        "from moelm.cli import main\n"
        "sys.argv = ['moelm', 'bench', 'moe.yaml', '--peers']\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=workplace, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.strip().endswith("moelm's extra `bench` brings it.")


@pytest.mark.skipif(find_spec("transformers") is None, reason="the extra `bench` is not installed")
def test_peers_have_our_parameters(workplace: Path) -> None:
    from moelm.bench import build_peer, random_batch
    from moelm.config import load_config
    from moelm.model import count_parameters

    for kind in ("dense", "moe"):
        config = load_config(workplace / f"{kind}.yaml", ["model.vocab_size=260"])
        model, loss = build_peer(config.model, config, random_batch(config, 260))
        loss().backward()
        assert sum(p.numel() for p in model.parameters()) == count_parameters(config.model).total
