"""However a run is spread, it learns the same."""

import shutil
from pathlib import Path

import pytest

from moelm.runs.checkpoint import list_checkpoints
from tests.conftest import train_here
from tests.distributed.launching import STEADY, metrics, torchrun
from tests.train.test_routers import SETTINGS

LAYOUTS: dict[int, dict[str, str]] = {
    1: {"cut": "train.micro_batch_tokens=128"},
    2: {
        "dp2": "",
        "fsdp2": "parallel.dp_shard=2",
        "ep2": "parallel.ep=2",
        "ep2-cut": "parallel.ep=2|train.micro_batch_tokens=128",
        "fsdp2-layers-again": "parallel.dp_shard=2|parallel.activation_checkpointing=full",
    },
    4: {
        "dp4": "",
        "fsdp4": "parallel.dp_shard=4",
        "dp2-fsdp2": "parallel.dp_shard=2",
        "ep4": "parallel.ep=4",
        "dp2-ep2": "parallel.ep=2",
        "fsdp2-ep2": "parallel.dp_shard=2|parallel.ep=2",
        "fsdp2-ep2-cut": "parallel.dp_shard=2|parallel.ep=2|train.micro_batch_tokens=64",
    },
}
"""By number of processes and name: settings."""

SAME = ("train/loss", "val/loss", "train/grad_norm", "moe/aux_loss", "moe/z_loss", "moe/load_cv", "moe/importance_cv")


def spread(folder: Path, processes: int, runs: dict[str, list[str]]) -> None:
    """Train several runs on so many processes."""
    words = ["|".join([f"name={name}", *settings]) for name, settings in runs.items()]
    done = torchrun(folder, processes, "tests.distributed.several", "moe.yaml", *words)
    assert done.returncode == 0, done.stderr


def deviation(run: Path, reference: Path) -> float:
    """Largest relative difference of any figure at any step."""
    pairs = list(zip(metrics(run), metrics(reference), strict=True))
    return max(abs(a[key] - b[key]) / max(abs(b[key]), 1e-3) for a, b in pairs for key in SAME if key in b)


@pytest.mark.slow
@pytest.mark.parametrize("processes", LAYOUTS)
def test_fifty_steps_agree_on_every_layout(workplace: Path, processes: int) -> None:
    common = [*STEADY, "train.steps=50", "train.eval_every=25", "train.checkpoint_every=50"]
    reference = train_here(workplace, "moe", *common, "name=one")
    runs = {name: [*common, *filter(None, settings.split("|"))] for name, settings in LAYOUTS[processes].items()}
    spread(workplace, processes, runs)
    found = {name: deviation(workplace / "runs" / name, reference) for name in runs}
    print({name: f"{value:.1e}" for name, value in found.items()})
    assert max(found.values()) < 1e-5, found


@pytest.mark.slow
def test_every_router_agrees_where_its_experts_are_elsewhere(workplace: Path) -> None:
    dims = ["parallel.ep=2", "parallel.dp_shard=2"]
    common = {name: [*STEADY, "train.steps=10", *words] for name, words in SETTINGS.items()}
    spread(workplace, 4, {f"{name}-spread": [*words, *dims] for name, words in common.items()})
    found = {}
    for name, words in common.items():
        reference = train_here(workplace, "moe", *words, f"name={name}")
        found[name] = deviation(workplace / f"runs/{name}-spread", reference)
    print({name: f"{value:.1e}" for name, value in found.items()})
    assert max(found.values()) < 1e-5, found


@pytest.mark.slow
def test_experts_that_cannot_be_divided_are_cut(workplace: Path) -> None:
    common = [*STEADY, "train.steps=10", "model.ffn.num_experts=6"]
    spread(workplace, 4, {"cut": [*common, "parallel.dp_shard=4"]})
    reference = train_here(workplace, "moe", *common, "name=one")
    assert deviation(workplace / "runs/cut", reference) < 1e-5


@pytest.mark.slow
def test_layers_that_repeat_and_deep_experts_agree_too(workplace: Path) -> None:
    common = [*STEADY, "train.steps=10", "model.num_layers=4", "model.unique_layers=2", "model.ffn.depth=2"]
    runs = {name: [*common, *filter(None, settings.split("|"))] for name, settings in LAYOUTS[2].items()}
    spread(workplace, 2, runs)
    reference = train_here(workplace, "moe", *common, "name=one")
    found = {name: deviation(workplace / "runs" / name, reference) for name in runs}
    print({name: f"{value:.1e}" for name, value in found.items()})
    assert max(found.values()) < 1e-5, found


@pytest.mark.slow
def test_a_checkpoint_of_any_layout_goes_on_on_any_other(workplace: Path) -> None:
    """Steps 1-20 on four processes, to 30 on one, to 40 on two, to 50 on four, each spread in another way."""
    common = [
        *STEADY,
        "train.steps=50",
        "train.eval_every=50",
        "train.checkpoint_every=10",
        "model.ffn.router.kind=sigmoid",
    ]
    reference = train_here(workplace, "moe", *common, "name=one")

    def onwards(processes: int, *settings: str) -> None:
        spread(workplace, processes, {"wanderer": [*common, *settings]})

    def back_to(step: int) -> None:
        for path in list_checkpoints(workplace / "runs/wanderer/checkpoints"):
            if path.name > f"step-{step:08}":
                shutil.rmtree(path)

    keep = "train.keep_checkpoints=9"
    onwards(4, keep, "parallel.ep=2", "parallel.dp_shard=2")
    back_to(20)
    train_here(workplace, "moe", *common, keep, "name=wanderer")
    back_to(30)
    onwards(2, keep, "parallel.ep=2")
    back_to(40)
    onwards(4, keep, "parallel.dp_shard=4")
    assert deviation(workplace / "runs/wanderer", reference) < 1e-5
