"""Whole training steps on a fake CUDA device, on one process and on layouts of many.

They fail where a CPU tensor meets a GPU tensor, where torch's checks of fake tensors' shapes, dtypes and strides fail, and
where something is not listed here: a place where the host waits for the GPU, a break in a compiled graph, an operation
without a deterministic kernel, a collective that `moelm plan` does not count. Nothing is computed, and nothing is measured.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moelm.config import load_config
from moelm.model.moe.dispatcher import DispatchedRows, LocalDispatcher
from moelm.model.moe.router import Routing
from moelm.plan import count_model, make_plan
from moelm.train.trainer import Trainer
from tests.distributed.launching import ROOT
from tests.gpu_rehearsal import fake_cuda
from tests.gpu_rehearsal.step import main as rehearse
from tests.processes import Process, Program

pytestmark = pytest.mark.slow(seconds=20)

STEP_SYNC = "copy to the host in distributed/ranks.py"
ALLOWED_SYNCS = {
    STEP_SYNC: "loss, squares of gradients, stop signals and statistics of the routing, once a step",
    "tolist in distributed/expert_parallel.py": "rows for each process, which the all-to-all needs on the host",
}
"""Where the host waits for the GPU, and why."""
ALLOWED_SYNCS_WITH = {
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
ALLOWED_BREAKS = {
    "aten._local_scalar_dense": "rows for each process",
    "the function `disable`": "FSDP's hooks on experts that are sharded over two dimensions",
}
"""Where compiled graphs end under expert parallelism, by words of the explanation; elsewhere they may not."""
TOLERANCES = {
    "all_to_all": 0.01,  # gates are sent with the rows
    "optimizer": 0.2,  # the plan has the mean over processes
}
"""Relative differences of the bytes that one process sends from those of the plan, where they are not equal."""
UNPLANNED_BYTES = 1 << 16
"""Losses, statistics of the routing and signals, which the plan leaves out."""

CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.yaml") if not path.stem.endswith("base"))
SMALL = "train.micro_batch_tokens=auto|train.batch_tokens=16384|model.num_layers"
MOE = f"{ROOT}/configs/gpu-moe8.yaml|{SMALL}=1"
TWO_LAYERS = f"{ROOT}/configs/gpu-moe8.yaml|{SMALL}=2"
FULL, SELECTIVE = (f"parallel.activation_checkpointing={mode}" for mode in ("full", "selective"))
EAGER = "parallel.compile=false"
PUBLISHED = (
    "model.qkv_bias=true|model.attention_output_bias=true|model.qk_norm=all_heads|model.rotary_fraction=0.5|model.residual_multiplier=0.5|"
    "model.ffn.shared_experts=1|model.ffn.shared_gate=true"
)
"""Settings of imported models."""
ONE_PROCESS = [
    f"{MOE}|model.ffn.router={{kind: sigmoid}}|model.ffn.depth=2|model.ffn.shared_experts=1",
    f"{MOE}|model.ffn.router={{kind: noisy_topk}}",
    f"{MOE}|model.ffn.router={{kind: hierarchical, groups: 2, group_k: 1}}|{SELECTIVE}",
    f"{MOE}|model.ffn.router={{kind: hash}}|data.document_mask=true",
    f"{MOE}|model.ffn.router={{kind: random}}|model.window=64|{PUBLISHED}",
    f"{MOE}|model.ffn.router={{kind: expert_choice}}|{EAGER}",
    f"{MOE}|model.ffn.capacity_factor=1.5|{EAGER}",
    f"{MOE}|optim.kind=muon|{FULL}",
    f"{MOE}|train.micro_batch_tokens=8192",
]
GRAPHS = {
    f"parallel.ep=4|parallel.dp_shard=2|{FULL}|data.document_mask=true": 4,  # and the mask
    f"parallel.ep=4|parallel.dp_shard=2|{FULL}": 3,  # attention, experts and the loss; routing and exchange are not
    "parallel.ep=2|parallel.dp_shard=2|optim.kind=muon": 9,
}
"""Compiled graphs on eight processes, by settings, where they are not two."""
EIGHT_PROCESSES = [
    f"{TWO_LAYERS}|model.ffn.router={{kind: noisy_topk}}|{FULL}",
    f"{TWO_LAYERS}|parallel.dp_shard=8|{SELECTIVE}|{PUBLISHED}",
    f"{TWO_LAYERS}|parallel.dp_shard=8|train.batch_tokens=32768|train.micro_batch_tokens=16384",
    f"{TWO_LAYERS}|parallel.ep=8|{EAGER}",
    f"{TWO_LAYERS}|parallel.ep=4|parallel.dp_shard=2|{FULL}",
    f"{TWO_LAYERS}|parallel.ep=4|parallel.dp_shard=2|{FULL}|data.document_mask=true",
    f"{TWO_LAYERS}|parallel.ep=2|parallel.dp_shard=2|optim.kind=muon",
    f"{TWO_LAYERS}|parallel.ep=4|parallel.dense_shard=4|optim.kind=muon|train.batch_tokens=32768|{EAGER}",
]


def rehearsed(
    library: Path, processes: int, cases: list[str], folder: Path, program: Program = rehearse
) -> dict[str, dict[str, Any]]:
    """What the second step of each case did."""
    done = Process(program, ["rehearse", str(library), str(processes), *cases], folder, os.environ).finish()
    assert done.returncode == 0, done.stderr[-3000:]
    recorded: dict[str, dict[str, Any]] = json.loads(done.stdout)
    assert list(recorded) == cases
    return recorded


def unexpected(recorded: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """What is not listed above, of the cases that have something."""
    found = {case: list(unexpected_in(case, each)) for case, each in recorded.items()}
    return {case: each for case, each in found.items() if each}


def unexpected_in(case: str, recorded: dict[str, Any]) -> Iterator[str]:
    """What is not listed above."""
    allowed = set(ALLOWED_SYNCS).union(*(syncs for word, syncs in ALLOWED_SYNCS_WITH.items() if word in case))
    yield from sorted(recorded["syncs"].keys() - allowed)
    if recorded["syncs"][STEP_SYNC] != 1:
        yield f"{recorded['syncs'][STEP_SYNC]} copies of a step's results to the host"
    yield from (f"{operation} has no deterministic kernel" for operation in recorded["nondeterministic"])
    if recorded["masked"] != bool(recorded["flex_attention"]):
        yield f"{recorded['flex_attention']} calls of FlexAttention"
    for explanation in recorded["graph_breaks"]:
        if "parallel.ep" not in case or not any(words in explanation for words in ALLOWED_BREAKS):
            yield explanation.splitlines()[0]
    if recorded["graphs"] != graphs_of(case):
        yield f"{recorded['graphs']} graphs"
    sent, planned = recorded["sent"], recorded["planned"]
    for kind in sorted(sent.keys() | planned.keys()):
        difference = abs(sent.get(kind, 0) - planned.get(kind, 0))
        if difference > TOLERANCES.get(kind, 0) * planned.get(kind, 0) + UNPLANNED_BYTES:
            yield f"{sent.get(kind, 0)} bytes of {kind} instead of {planned.get(kind, 0)}"


def graphs_of(case: str) -> int:
    """The model, or any of its equal blocks, and the loss; if the batch is divided, the model without gradients too."""
    if EAGER in case:
        return 0
    listed = [graphs for settings, graphs in GRAPHS.items() if settings in case]
    return listed[0] if listed else 2 + ("micro_batch_tokens=8192" in case)


def proposed_layouts(config_path: Path, gpus: int) -> list[str]:
    """The fastest layout that `moelm plan` proposes, and the fastest of each other combination of dimensions."""
    _, config = count_model(load_config(config_path))  # with a vocabulary size
    proposed = {}
    for candidate in make_plan(config, gpus, "h100").candidates:
        strategy = candidate.strategy
        settings = [f"parallel.{name}={size}" for name, size in strategy.dims.as_settings().items()]
        settings.append(f"parallel.activation_checkpointing={strategy.checkpointing}")
        tokens = strategy.micro_batch_rows * config.data.seq_len  # one micro-batch of each process
        settings += [f"train.micro_batch_tokens={tokens}", f"train.batch_tokens={tokens * gpus}"]
        combination = tuple((size or 0) > 1 for size in strategy.dims)
        if candidate.fits:
            proposed.setdefault(combination, "|".join([str(config_path), "model.num_layers=1", EAGER, *settings]))
    return list(proposed.values())


def test_every_shipped_config_is_trained(library: Path, tmp_path: Path) -> None:
    # As few layers as have a sparse one.
    cases = [f"{path}|{SMALL}={getattr(load_config(path).model.ffn, 'every', 1)}" for path in CONFIGS]
    assert unexpected(rehearsed(library, 1, cases, tmp_path)) == {}


def test_every_router_and_settings_of_the_layer_are_trained(library: Path, tmp_path: Path) -> None:
    assert unexpected(rehearsed(library, 1, ONE_PROCESS, tmp_path)) == {}


def test_layouts_of_eight_processes_are_trained(library: Path, tmp_path: Path) -> None:
    assert unexpected(rehearsed(library, 8, EIGHT_PROCESSES, tmp_path)) == {}


def test_weights_of_the_next_block_are_gathered_before_the_host_waits(library: Path, tmp_path: Path) -> None:
    case = f"{TWO_LAYERS}|parallel.ep=4|parallel.dp_shard=2|{EAGER}"
    (recorded,) = rehearsed(library, 8, [case], tmp_path).values()
    order = recorded["order"]
    # The root, and both blocks with their experts.
    assert order[: order.index("sync")].count("all_gather") == 5
    second = order.index("sync", order.index("sync") + 1)
    assert order[:second].count("all_gather") == 5


@pytest.mark.parametrize(("config", "gpus"), [("gpu-moe8", 8), ("mixtral-8x7b", 64), ("mixtral-8x7b", 1024)])
def test_layouts_that_the_plan_proposes_are_trained(library: Path, tmp_path: Path, config: str, gpus: int) -> None:
    cases = proposed_layouts(ROOT / f"configs/{config}.yaml", gpus)
    assert len(cases) > 2
    assert unexpected(rehearsed(library, gpus, cases, tmp_path)) == {}


def rehearse_on_blackwell() -> None:
    install = fake_cuda.install

    def install_blackwell(library: Path) -> torch.device:
        device = install(library)
        torch.cuda.get_device_capability = lambda device=None: (10, 0)
        return device

    fake_cuda.install = install_blackwell
    rehearse()


def test_blackwell_masks_gradients_without_a_graph_break(library: Path, tmp_path: Path) -> None:
    (hopper,) = rehearsed(library, 1, [f"{MOE}|{EAGER}"], tmp_path).values()
    (blackwell,) = rehearsed(library, 1, [MOE], tmp_path, rehearse_on_blackwell).values()
    assert list(unexpected_in(MOE, blackwell)) == []
    assert blackwell["masks"] == hopper["masks"] + 2  # w1 and w3 of the layer in one stack, and w2


def rehearse_with_a_sync() -> None:
    original = LocalDispatcher.dispatch

    def dispatch(self: LocalDispatcher, x_ND: Tensor, routing: Routing) -> DispatchedRows:
        assert float(routing.gates_NK.sum()) > 0
        return original(self, x_ND, routing)

    LocalDispatcher.dispatch = dispatch  # type: ignore[method-assign]
    rehearse()


def rehearse_with_a_graph_break() -> None:
    original = LocalDispatcher.combine

    def combine(self: LocalDispatcher, y_SD: Tensor, rows: DispatchedRows) -> Tensor:
        torch._dynamo.graph_break()
        return original(self, y_SD, rows)

    LocalDispatcher.combine = combine  # type: ignore[method-assign]
    rehearse()


def rehearse_with_a_collective() -> None:
    original = Trainer._check_loss

    def check(self: Trainer, *args: Any) -> None:
        self.ranks.all_reduce([parameter.grad.to_local() for parameter in self.model.head.parameters()])
        original(self, *args)

    Trainer._check_loss = check  # type: ignore[method-assign]
    rehearse()


def test_another_sync_is_found(library: Path, tmp_path: Path) -> None:
    case = f"{MOE}|{EAGER}"
    recorded = rehearsed(library, 1, [case], tmp_path, rehearse_with_a_sync)
    assert unexpected(recorded) == {case: ["item in model/moe/layer.py"]}


def test_a_graph_break_is_found(library: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"Call to `torch._dynamo.graph_break\(\)`"):
        rehearsed(library, 1, [MOE], tmp_path, rehearse_with_a_graph_break)


def test_another_collective_is_found(library: Path, tmp_path: Path) -> None:
    case = f"{MOE}|model.tie_embeddings=false"
    recorded = rehearsed(library, 8, [case], tmp_path, rehearse_with_a_collective)
    assert [each.split(" instead")[0].split(" ", 1)[1] for each in unexpected(recorded)[case]] == ["bytes of all_reduce"]
