"""The plan's memory against the tensors of real runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from moelm.bench.models import shape_of
from moelm.config import RunConfig, load_config
from moelm.distributed.layout import Layout, resolve_layout
from moelm.plan.memory import Setting, estimate_memory

ROOT = Path(__file__).parents[2]
SMALL = ("train.precision=float32", "train.batch_tokens=2048")
CASES = {
    "dense": ("demo-dense", 1, ()),
    "moe-bf16": ("demo-moe", 1, ("train.precision=bf16",)),
    "full": ("demo-moe", 1, ("parallel.activation_checkpointing=full",)),
    "deep": ("demo-moe", 1, ("model.ffn.depth=2",)),
    "looped": ("demo-moe", 1, ("model.unique_layers=2",)),
    "copies": ("demo-moe", 2, ()),
    "ep": ("demo-moe", 2, ("parallel.ep=2",)),
    "sharded-ep": ("demo-moe", 4, ("parallel.dp_shard=2", "parallel.ep=2")),
    "sharded-ep-bf16": ("demo-moe", 4, ("parallel.dp_shard=2", "parallel.ep=2", "train.precision=bf16")),
}


def largest_layer(config: RunConfig, layout: Layout, rows: int, low: bool) -> int:
    """What one layer keeps, from the plans of models with one layer more and less."""
    fewer, more = (
        config.model_copy(update={"model": config.model.model_copy(update={"num_layers": layers})})
        for layers in (config.model.num_layers, config.model.num_layers + 1)
    )
    setting = Setting(layout, "none", rows, low)
    return estimate_memory(more, setting).activations - estimate_memory(fewer, setting).activations


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_real_step_holds_what_was_planned(case: str) -> None:
    name, processes, settings = CASES[case]
    words = [str(ROOT / f"configs/{name}.yaml"), *SMALL, *settings]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "tests.plan.measured", *words], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    config = load_config(words[0], words[1:])
    config = config.model_copy(update={"model": shape_of(config)})
    layout = resolve_layout(config, processes)
    rows = config.micro_batch_rows(processes)
    assert rows * processes == config.batch_rows
    low = config.train.precision == "bf16"
    planned = estimate_memory(config, Setting(layout, config.parallel.activation_checkpointing, rows, low))._asdict()
    copies = planned.pop("gathered") if low and processes == 1 else 0
    planned["activations"] += copies  # autocast's copies of the weights are kept like activations
    if config.parallel.activation_checkpointing == "full":
        # After the forward pass; the layer that is made again comes on top.
        planned["activations"] -= largest_layer(config, layout, rows, low)
    told = {kind: (amount, planned[kind]) for kind, amount in measured.items()}
    print(case, {kind: f"{p / max(m, 1) - 1:+.1%}" for kind, (m, p) in told.items()})
    for amount, plan in told.values():
        assert plan == pytest.approx(amount, rel=0.10), told
