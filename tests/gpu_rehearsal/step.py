"""Training steps on the fake device.

Arguments: LIBRARY PROCESSES "CONFIG|KEY=VALUE|..."...
"""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch.distributed as dist
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes

from moelm.config import RunConfig, load_config
from moelm.data.loader import Batch
from moelm.distributed import matrix_exchange
from moelm.distributed import parallelize as parallelize_module
from moelm.distributed.parallel_dims import resolve_parallel_dims
from moelm.distributed.parallelize import parallelize
from moelm.distributed.ranks import Ranks
from moelm.distributed.watchdog import Watchdog
from moelm.hardware import should_compile
from moelm.model import Transformer
from moelm.plan import count_model
from moelm.plan.strategy import Strategy
from moelm.plan.traffic import step_collectives, total_traffic
from moelm.runs.checkpoint import fresh_progress
from moelm.runs.directory import RunDirectory
from moelm.train.optimizer import build_optimizer
from moelm.train.trainer import Execution, Trainer, TrainState
from tests.gpu_rehearsal import fake_cuda
from tests.gpu_rehearsal.recorder import Recorder


class Rows:
    """Zeros in place of a prepared split."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    def __len__(self) -> int:
        return 64 * self.config.batch_rows

    def count_tokens(self, rows: Any) -> int:
        return len(rows) * self.config.data.seq_len

    def batch(self, rows: Any) -> Batch:
        shape = len(rows), self.config.data.seq_len
        tokens = torch.zeros(shape, dtype=torch.int64)
        return Batch(tokens, tokens, torch.zeros_like(tokens))


class Data:
    """What a trainer reads of a prepared dataset."""

    def __init__(self, config: RunConfig) -> None:
        self.train = self.val = Rows(config)
        self.tokenizer = type("Tokenizer", (), {"vocab_size": config.model.vocab_size})


def keep_ranks_real() -> None:
    """Compute with ranks outside of all modes: a fake mesh would have no ranks."""

    def without_modes(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with _disable_current_modes():
                return function(*args, **kwargs)

        return call

    items = matrix_exchange._items
    matrix_exchange._items = without_modes(lambda *args: list(items(*args)))
    parallelize_module.build_mesh = without_modes(parallelize_module.build_mesh)
    for name in ("__init__", "__getitem__", "_flatten", "get_coordinate", "get_group", "get_local_rank", "size"):
        setattr(DeviceMesh, name, without_modes(getattr(DeviceMesh, name)))
    DeviceMesh.mesh = property(without_modes(DeviceMesh.mesh.fget))


def rehearse(config: RunConfig, processes: int, device: torch.device) -> dict[str, Any]:
    """Run two steps of the first process; returns what the second did, and what `moelm plan` expects of it."""
    dims = resolve_parallel_dims(config, processes)
    micro_rows = config.micro_batch_rows(processes)
    rows = micro_rows * config.data.seq_len * getattr(config.model.ffn, "top_k", 0)
    recorder, ranks = Recorder(rows), Ranks(0, processes)
    FakeTensor.tolist = torch._dynamo.disable(lambda x: recorder.tolist(x))
    counters.clear()
    torch._dynamo.reset()
    with torch.device("meta"):
        model = Transformer(config.model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        compiled = should_compile(config.parallel.compile, device)
        parallelize(model, dims, config.parallel, device, torch.bfloat16, compiled)
        model.to_empty(device=device)
        optimizer = build_optimizer(model, config.optim, torch.bfloat16)
        execution = Execution(device, torch.bfloat16, ranks, dims, Watchdog(ranks, 600.0), None)
        state = TrainState(model, optimizer, fresh_progress())
        trainer = Trainer(config, RunDirectory(Path("runs/rehearsal")), Data(config), state, execution)
        with recorder:
            for index in range(2):
                recorder.clear()
                trainer._step(index)
    strategy = Strategy(dims, config.parallel.activation_checkpointing, micro_rows, bf16=True)
    return {
        "syncs": recorder.syncs,
        "sent": recorder.sent,
        "order": recorder.order,
        "nondeterministic": recorder.nondeterministic,
        "masks": recorder.operations["aten.where.self"] + recorder.operations["aten.where.ScalarOther"],
        "masked": compiled and bool(config.data.document_mask or config.model.window or config.model.attention_logit_cap),
        "flex_attention": recorder.operations["flex_attention"],
        "planned": total_traffic(step_collectives(config, strategy))._asdict(),
        "graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": list(counters["graph_break"]),
    }


def main() -> None:
    """Print the results of all cases, as one JSON object by case."""
    library, processes, *cases = sys.argv[1:]
    device = fake_cuda.install(Path(library))
    if int(processes) > 1:
        dist.init_process_group("fake", rank=0, world_size=int(processes), store=FakeStore())
        keep_ranks_real()
    # Graphs are captured, and their operations called one after another.
    capture = partial(torch.compile, backend=lambda graph, inputs: graph.forward)
    recorded = {}
    for case in cases:
        path, *overrides = case.split("|")
        _, config = count_model(load_config(path, overrides))  # with a vocabulary size
        # With expert parallelism the host must know the rows for each process, so graphs end there.
        torch.compile = partial(capture, fullgraph=config.parallel.ep == 1)
        recorded[case] = rehearse(config, int(processes), device)
    print(json.dumps(recorded))
