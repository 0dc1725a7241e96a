"""The benchmark: contestants in turns, in processes of their own."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from moelm.bench import Contestant, Timing, enter
from moelm.config import load_config
from moelm.errors import MoelmError
from tests.conftest import Moelm


def test_a_ratio_is_that_of_turns_side_by_side(workplace: Path) -> None:
    """A machine that slows down for both changes nothing."""
    entry = Contestant("a", load_config(workplace / "moe.yaml"))
    ours = Timing(entry, [{"step": 1.0}, {"step": 10.0}, {"step": 60.0, "rest": 40.0}], 8, 8, 0, 1.0)
    theirs = Timing(entry, [{"step": 2.0}, {"step": 20.0}, {"step": 200.0}], 8, 8, 0, 1.0)
    assert theirs.times(ours) == 2.0
    assert ours.as_dict()["tokens_per_s"] == 0.8


def test_one_setting_is_varied(workplace: Path) -> None:
    entries = enter([workplace / "moe.yaml"], ["seed=3"], "model.ffn.num_experts=2,8", peers=False)
    assert [(e.name, e.config.seed, e.config.model.ffn.num_experts) for e in entries] == [
        ("tiny-moe num_experts=2", 3, 2),
        ("tiny-moe num_experts=8", 3, 8),
    ]
    with pytest.raises(MoelmError, match="a setting and its values are expected"):
        enter([workplace / "moe.yaml"], [], "num_experts", peers=False)


@pytest.mark.skipif(find_spec("transformers") is None, reason="the extra `bench` is not installed")
@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("model.sandwich_norm=true", "model.sandwich_norm is True"),
        ("model.ffn.every=2", "no ffn.shared_experts, for which Qwen2MoeForCausalLM"),
        ("model.ffn.router.kind=noisy_topk", "ffn.router.kind = noisy_topk"),
        ("model.ffn.capacity_factor=1.0", "ffn.capacity_factor"),
    ],
)
def test_what_peers_do_not_have_is_refused(workplace: Path, setting: str, told: str) -> None:
    with pytest.raises(MoelmError, match=f"^--peers: tiny-moe.*{told}"):
        enter([workplace / "moe.yaml"], [setting], None, peers=True)


def test_generation_is_timed_by_phase(moelm: Moelm, workplace: Path) -> None:
    done = moelm("bench", "moe.yaml", "model.vocab_size=260", "--generate", "2", "--rounds", "1", "--json")
    assert done.returncode == 0, done.stderr
    (told,) = json.loads(done.stdout)["contestants"]
    assert set(told["phases_s"]) == {"prefill", "decode"}
    assert told["tokens_per_s"] == pytest.approx(2 * 64 / told["phases_s"]["decode"])


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
        "import sys, moelm.bench.contestants as bench\n"
        "bench.find_spec = lambda name: None\n"
        "from moelm.cli import main\n"
        "sys.argv = ['moelm', 'bench', 'moe.yaml', '--peers']\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=workplace, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.strip().endswith("moelm's extra `bench` brings it.")


@pytest.mark.skipif(find_spec("transformers") is None, reason="the extra `bench` is not installed")
@pytest.mark.parametrize(
    ("kind", "setting"),
    [
        ("dense", "seed=1"),
        ("dense", "model.window=4"),
        ("dense", "model.qk_norm=true"),
        ("moe", "seed=1"),
        ("moe", "model.qk_norm=true"),
        ("moe", "model.ffn.shared_experts=1"),
    ],
)
def test_peers_have_our_parameters(workplace: Path, kind: str, setting: str) -> None:
    from moelm.bench.models import build_peer, peer_loss, random_batch
    from moelm.model import count_parameters

    config = load_config(workplace / f"{kind}.yaml", ["model.vocab_size=260", setting])
    model = build_peer(config, 32, train=True)
    peer_loss(model, random_batch(config))().backward()
    gates = sum(p.numel() for name, p in model.named_parameters() if "shared_expert_gate" in name)
    assert sum(p.numel() for p in model.parameters()) - gates == count_parameters(config.model).total


@pytest.mark.slow
def test_the_table_of_a_gpu_is_printed_on_any_machine(workplace: Path) -> None:
    script = Path(__file__).parents[1] / "scripts/bench_gpu.py"
    words = ["dense.yaml", "moe.yaml", "--rounds", "1", "--no-peers"]
    done = subprocess.run([sys.executable, str(script), *words], cwd=workplace, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    sparse = next(line for line in done.stdout.splitlines() if "tiny-moe" in line)
    assert sparse.rstrip().endswith("%")
