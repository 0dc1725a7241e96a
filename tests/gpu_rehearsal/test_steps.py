"""Whole training steps on a CUDA device that is not there, on one process and on layouts of many.

They fail where a CPU tensor meets a GPU tensor, where a kernel's rules about shapes, dtypes and strides are broken, and
where the host waits for the GPU in a place that is not listed here. Nothing is computed, and nothing is measured.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from moelm.model.moe.dispatcher import DispatchedRows, LocalDispatcher
from moelm.model.moe.router import Routing
from tests.distributed.launching import ROOT
from tests.gpu_rehearsal.fake_cuda import build
from tests.gpu_rehearsal.step import main as rehearse
from tests.processes import Process, Program

pytestmark = [
    pytest.mark.slow(seconds=20),
    pytest.mark.skipif(shutil.which("g++") is None, reason="the fake device needs g++, which is not installed"),
]

ALLOWED = {
    "item in train/trainer.py": "the loss of a step, which is checked before the update",
    "tolist in train/trainer.py": "squares of gradients, for the clipping of the update; stop signals",
    "copy to the host in train/routing_metrics.py": "statistics of the routing, in one copy",
    "tolist in distributed/expert_parallel.py": "rows for each process, which the all-to-all needs on the host",
}
"""Where the host waits for the GPU, and why."""
ALLOWED_WITH = {
    "expert_choice": {
        "item in model/moe/router.py": "the number of tokens that are not padding",
        "item in model/moe/dispatcher.py": "the number of rows, which is the number of choices",
    },
    "capacity_factor": {
        "item in model/moe/dispatcher.py": "the number of rows that are left",
        "bincount in model/moe/dispatcher.py": "the load of each expert before the limit",
    },
}
"""The same for cases with a setting."""

CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.yaml") if not path.stem.endswith("base"))
SMALL = "model.num_layers=2|train.micro_batch_tokens=auto|train.batch_tokens=16384"
MOE = f"{ROOT}/configs/gpu-moe8.yaml|{SMALL}"
FULL, SELECTIVE = (f"parallel.activation_checkpointing={mode}" for mode in ("full", "selective"))
ONE_PROCESS = [
    *(f"{MOE}|model.ffn.router={router}" for router in ("{kind: sigmoid}", "{kind: noisy_topk}", "{kind: expert_choice}")),
    *(f"{MOE}|model.ffn.router={router}" for router in ("{kind: hash}", "{kind: random}")),
    f"{MOE}|model.ffn.router={{kind: hierarchical, groups: 2, group_k: 1}}",
    *(f"{MOE}|{setting}" for setting in ("data.document_mask=true", "model.window=64", "model.ffn.capacity_factor=1.5")),
    *(f"{MOE}|{setting}" for setting in (FULL, SELECTIVE, "model.ffn.depth=2", "model.ffn.shared_experts=1")),
    *(f"{MOE}|{setting}" for setting in ("optim.kind=muon", "train.micro_batch_tokens=8192")),
]
MANY_PROCESSES = {
    8: [
        f"{MOE}|{FULL}",
        f"{MOE}|parallel.dp_shard=8|{SELECTIVE}",
        f"{MOE}|parallel.ep=8|{FULL}",
        f"{MOE}|parallel.ep=4|parallel.dp_shard=2|{FULL}",
        f"{MOE}|parallel.ep=2|parallel.dp_shard=2|optim.kind=muon",
    ],
    1024: [
        f"{ROOT}/configs/mixtral-8x7b.yaml|{SMALL}|train.batch_tokens=4194304|parallel.ep=8|parallel.dp_shard=auto|{FULL}",
    ],
}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("fake_cuda"))


def rehearsed(
    library: Path, processes: int, cases: list[str], folder: Path, program: Program = rehearse
) -> dict[str, dict[str, Any]]:
    """What the second step of each case did."""
    done = Process(program, ["rehearse", str(library), str(processes), *cases], folder, os.environ).finish()
    assert done.returncode == 0, done.stderr[-3000:]
    recorded: dict[str, dict[str, Any]] = json.loads(done.stdout)
    assert list(recorded) == cases
    return recorded


def unknown_syncs(recorded: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """Syncs that are not listed, of the cases that have some."""
    found = {}
    for case, each in recorded.items():
        allowed = ALLOWED.keys() | {sync for setting, syncs in ALLOWED_WITH.items() if setting in case for sync in syncs}
        if unknown := sorted(each["syncs"].keys() - allowed):
            found[case] = unknown
    return found


def test_every_shipped_config_is_trained(library: Path, tmp_path: Path) -> None:
    cases = [f"{path}|{SMALL}" for path in CONFIGS]
    recorded = rehearsed(library, 1, cases, tmp_path)
    assert unknown_syncs(recorded) == {}
    assert all(not each["collectives"] for each in recorded.values())


def test_every_router_and_setting_is_trained(library: Path, tmp_path: Path) -> None:
    assert unknown_syncs(rehearsed(library, 1, ONE_PROCESS, tmp_path)) == {}


@pytest.mark.parametrize("processes", MANY_PROCESSES)
def test_layouts_of_many_processes_are_trained(library: Path, tmp_path: Path, processes: int) -> None:
    recorded = rehearsed(library, processes, MANY_PROCESSES[processes], tmp_path)
    assert unknown_syncs(recorded) == {}
    assert all(each["collectives"] for each in recorded.values())


def rehearse_with_a_sync() -> None:
    original = LocalDispatcher.dispatch

    def dispatch(self: LocalDispatcher, x_ND: Tensor, routing: Routing) -> DispatchedRows:
        assert float(routing.gates_NK.sum()) > 0
        return original(self, x_ND, routing)

    LocalDispatcher.dispatch = dispatch  # type: ignore[method-assign]
    rehearse()


def test_another_sync_is_found(library: Path, tmp_path: Path) -> None:
    recorded = rehearsed(library, 1, ONE_PROCESS[:1], tmp_path, rehearse_with_a_sync)
    assert unknown_syncs(recorded) == {ONE_PROCESS[0]: ["item in model/moe/layer.py"]}
