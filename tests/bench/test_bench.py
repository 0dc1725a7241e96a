"""The benchmark: its variants, alternating rounds, and peers."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from moelm.bench import BenchVariant, Timing, list_variants
from moelm.bench.models import build_own, random_batch
from moelm.bench.timing import _start_workers
from moelm.bench.workloads import Workload
from moelm.config import load_config
from moelm.errors import MoelmError
from moelm.model.forward import forward_batch
from tests.conftest import Moelm


def test_a_ratio_compares_rounds_with_each_other(workplace: Path) -> None:
    """A machine that becomes slower for both changes nothing."""
    variant = BenchVariant("a", load_config(workplace / "moe.yaml"))
    ours = Timing(variant, [{"step": 1.0}, {"step": 10.0}, {"step": 60.0, "rest": 40.0}], 8, 8, 0, 1.0)
    theirs = Timing(variant, [{"step": 2.0}, {"step": 20.0}, {"step": 200.0}], 8, 8, 0, 1.0)
    assert theirs.ratio_to(ours) == 2.0
    assert ours.as_dict()["tokens_per_s"] == 0.8


def test_one_setting_is_varied(workplace: Path) -> None:
    variants = list_variants([workplace / "moe.yaml"], ["seed=3"], "model.ffn.num_experts=2,8", peers=False)
    assert [(each.name, each.config.seed, each.config.model.ffn.num_experts) for each in variants] == [
        ("tiny-moe num_experts=2", 3, 2),
        ("tiny-moe num_experts=8", 3, 8),
    ]
    with pytest.raises(MoelmError, match="a setting and its values are expected"):
        list_variants([workplace / "moe.yaml"], [], "num_experts", peers=False)


@pytest.mark.skipif(find_spec("transformers") is None, reason="the extra `bench` is not installed")
@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("model.sandwich_norm=true", "model.sandwich_norm is True"),
        ("model.ffn.every=2", "no ffn.shared_experts, for which Qwen2MoeForCausalLM"),
        ("model.ffn.router.kind=noisy_topk", "ffn.router.kind = noisy_topk"),
        ("model.ffn.capacity_factor=1.0", "ffn.capacity_factor"),
        ("model.ffn.balance.bias=0.01", "model.ffn.balance.bias is 0.01"),
    ],
)
def test_a_model_without_a_peer_is_refused(workplace: Path, override: str, difference: str) -> None:
    with pytest.raises(MoelmError, match=f"^--peers: tiny-moe.*{difference}"):
        list_variants([workplace / "moe.yaml"], [override], None, peers=True)


@pytest.mark.skipif(find_spec("transformers") is None, reason="the extra `bench` is not installed")
def test_peers_are_updated_with_adamw(workplace: Path) -> None:
    for override in ("optim.kind=muon", "optim.groups.experts.lr=0"):
        with pytest.raises(
            MoelmError, match=r"^--peers: tiny-moe has .*; optim.kind=adamw without frozen roles is expected"
        ):
            list_variants([workplace / "moe.yaml"], [override], None, peers=True)
        assert len(list_variants([workplace / "moe.yaml"], [override], None, peers=True, training=False)) > 1


def test_generation_is_timed_by_phase(moelm: Moelm, workplace: Path) -> None:
    done = moelm("bench", "moe.yaml", "model.vocab_size=260", "--generate", "2", "--rounds", "1", "--json")
    assert done.returncode == 0, done.stderr
    (result,) = json.loads(done.stdout)["variants"]
    assert set(result["phases_s"]) == {"prefill", "decode"}
    assert result["tokens_per_s"] == pytest.approx(2 * 64 / result["phases_s"]["decode"])


def test_training_steps_are_timed(moelm: Moelm, workplace: Path) -> None:
    done = moelm("bench", "dense.yaml", "moe.yaml", "train.batch_tokens=128", "--rounds", "2", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["schema"], report["rounds"]) == (2, 2)
    dense, sparse = report["variants"]
    assert (dense["name"], sparse["name"]) == ("tiny-dense", "tiny-moe")
    for result in (dense, sparse):
        assert len(result["steps_s"]) == 2
        assert result["tokens_per_s"] == pytest.approx(128 / result["step_s"])
        assert 0 < result["mfu"] < 1
        assert result["memory_peak_bytes"] > 10_000_000
    assert sorted(path.name for path in workplace.iterdir()) == ["dense.yaml", "moe.yaml", "text.txt"]


def test_the_update_is_a_phase(moelm: Moelm) -> None:
    done = moelm("bench", "moe.yaml", "train.batch_tokens=128", "optim.kind=muon", "--rounds", "1", "--json")
    assert done.returncode == 0, done.stderr
    (result,) = json.loads(done.stdout)["variants"]
    assert set(result["phases_s"]) == {"forward", "backward", "update"}
    assert result["step_s"] > result["phases_s"]["update"] > 0


def test_experts_can_have_equal_loads(moelm: Moelm, workplace: Path) -> None:
    done = moelm("bench", "dense.yaml", "moe.yaml", "train.batch_tokens=128", "--balanced", "--rounds", "1", "--json")
    assert done.returncode == 0, done.stderr
    dense, sparse, balanced = json.loads(done.stdout)["variants"]
    assert (balanced["name"], balanced["balanced"], balanced["load_max_over_mean"]) == ("tiny-moe balanced", True, 1.0)
    assert sparse["load_max_over_mean"] > 1.0
    assert dense["load_max_over_mean"] is None
    refused = moelm("bench", "moe.yaml", "--balanced", "--generate", "1")
    assert refused.returncode == 2
    assert refused.stderr.startswith("moelm: --balanced is for training steps")
    with pytest.raises(MoelmError, match=r"at least one with model\.ffn\.kind=moe is expected"):
        list_variants([workplace / "dense.yaml"], [], None, peers=False, balanced=True)


@pytest.mark.parametrize("router", ["topk", "noisy_topk", "hierarchical", "expert_choice"])
def test_equal_loads_keep_everything_else_of_the_routing(workplace: Path, router: str) -> None:
    """All experts have as many tokens, with the gates that the router gave to its own choices."""
    groups = ["model.ffn.router.groups=2", "model.ffn.router.group_k=1"] if router == "hierarchical" else []
    config = load_config(workplace / "moe.yaml", [f"model.ffn.router.kind={router}", "model.vocab_size=260", *groups])
    batch = random_batch(config)
    own, balanced = build_own(config), build_own(config, balanced=True)
    first = forward_batch(own, batch, torch.float32, losses=True).routings[0]
    turned = forward_batch(balanced, batch, torch.float32, losses=True).routings[0]
    assert turned.experts_NK.flatten().bincount().unique().numel() == 1
    assert all(len(set(experts)) == len(experts) for experts in turned.experts_NK.tolist())
    assert torch.equal(turned.gates_NK, first.gates_NK)
    assert torch.equal(turned.probs_NE, first.probs_NE)


def test_a_failed_process_is_an_error(moelm: Moelm) -> None:
    done = moelm("bench", "moe.yaml", "model.ffn.router.kind=expert_choice", "--rounds", "1", "--generate", "1")
    assert done.returncode == 2
    assert done.stderr.strip().endswith("so it cannot generate token by token; another router can.")
    assert "Traceback" not in done.stderr


def test_a_config_is_needed() -> None:
    with pytest.raises(MoelmError, match="no config among 'seed=1'"):
        list_variants([], ["seed=1"], None, peers=False)


def test_missing_peers_are_an_error(workplace: Path) -> None:
    """Where transformers is installed, the program hides it."""
    program = (
        "import sys, moelm.bench.variants as bench\n"
        "bench.find_spec = lambda name: None\n"
        "from moelm.cli.app import main\n"
        "sys.argv = ['moelm', 'bench', 'moe.yaml', '--peers']\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=workplace, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.strip().endswith("moelm's extra `bench` installs it.")


@pytest.mark.skipif(find_spec("transformers") is None, reason="the extra `bench` is not installed")
@pytest.mark.parametrize(
    ("kind", "override"),
    [
        ("dense", "seed=1"),
        ("dense", "model.window=4"),
        ("dense", "model.qk_norm=true"),
        ("moe", "seed=1"),
        ("moe", "model.qk_norm=true"),
        ("moe", "model.ffn.shared_experts=1"),
    ],
)
def test_peers_have_equal_parameter_counts(workplace: Path, kind: str, override: str) -> None:
    from moelm.bench.models import build_peer, peer_loss, random_batch
    from moelm.model import count_parameters

    config = load_config(workplace / f"{kind}.yaml", ["model.vocab_size=260", override])
    model = build_peer(config, 32, train=True)
    peer_loss(model, random_batch(config), torch.float32)().backward()
    gates = sum(p.numel() for name, p in model.named_parameters() if "shared_expert_gate" in name)
    assert sum(p.numel() for p in model.parameters()) - gates == count_parameters(config.model).total


def write_gpu_table(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    script = Path(__file__).parents[2] / "scripts/bench_gpu.py"
    command = [sys.executable, str(script), "dense.yaml", "moe.yaml", "--no-peers", "--out", "table", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_gpu_table_is_written_on_any_machine(workplace: Path) -> None:
    done = write_gpu_table(workplace, "--rounds", "1")
    assert done.returncode == 0, done.stderr
    sparse = next(line for line in done.stdout.splitlines() if "tiny-moe" in line)
    assert sparse.rstrip().endswith("% |")
    assert done.stdout.strip() in (workplace / "table/bench-gpu.md").read_text()
    results = json.loads((workplace / "table/bench-gpu.json").read_text())
    assert [row["name"] for row in results["variants"]] == ["tiny-dense", "tiny-moe", "tiny-moe balanced"]
    assert results["left_out"] == []


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_gpu_table_lists_what_there_was_no_time_for(workplace: Path) -> None:
    done = write_gpu_table(workplace, "--minutes", "0")
    assert done.returncode == 0, done.stderr
    assert "Left out, for lack of time: tiny-moe, tiny-moe balanced." in done.stderr
    results = json.loads((workplace / "table/bench-gpu.json").read_text())
    assert (results["variants"], results["left_out"]) == ([], ["tiny-moe", "tiny-moe balanced"])
    again = write_gpu_table(workplace, "--minutes", "0")
    assert (again.returncode, again.stderr.startswith("bench_gpu.py: table exists already")) == (2, True)


def test_a_killed_process_is_an_error() -> None:
    with pytest.raises(MoelmError, match="The process of a variant was killed"), _start_workers([], Workload()):
        raise EOFError
