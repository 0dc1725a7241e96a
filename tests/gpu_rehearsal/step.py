"""Training steps on the fake device: what makes the host wait, and which collectives there are.

Arguments: LIBRARY PROCESSES "CONFIG|KEY=VALUE|..."...
"""

import json
import sys
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import moelm
from moelm.config import RunConfig, load_config
from moelm.data.loader import Batch
from moelm.distributed import parallelize as parallelize_module
from moelm.distributed.parallel_dims import resolve_parallel_dims
from moelm.distributed.parallelize import parallelize
from moelm.distributed.ranks import Ranks
from moelm.distributed.watchdog import Watchdog
from moelm.model import Transformer
from moelm.runs.checkpoint import fresh_progress
from moelm.runs.directory import RunDirectory
from moelm.train.optimizer import build_optimizer
from moelm.train.trainer import Execution, Trainer, TrainState
from tests.gpu_rehearsal import fake_cuda

PACKAGE = Path(moelm.__file__).parent
aten = torch.ops.aten


class Recorder(TorchDispatchMode):
    """Counts host syncs by kind and file, and collectives; where a value is needed, it is invented.

    Args:
        rows: of all experts of a process in a forward pass, the same for all.
    """

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.syncs: Counter[tuple[str, str]] = Counter()
        self.collectives: Counter[str] = Counter()

    def note(self, kind: str) -> None:
        """Count a sync; its file is that of the innermost call in the package."""
        files = [Path(frame.filename) for frame in traceback.extract_stack()]
        own = [file.relative_to(PACKAGE) for file in files if file.is_relative_to(PACKAGE)]
        self.syncs[kind, str(own[-1]) if own else "torch"] += 1

    def tolist(self, x: Tensor) -> Any:
        """In place of `Tensor.tolist`, which reads one element after another of a fake tensor."""
        if x.device.type == "cuda":
            self.note("tolist")
        number = 1.0 if x.is_floating_point() else 1
        if x.dtype == torch.int64 and x.dim() == 2 and len(x) == 2:
            number = self.rows // x.shape[1]  # rows for each process
        return np.full(tuple(x.shape), number).tolist()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        x = args[0] if args and isinstance(args[0], Tensor) else None
        on_gpu = x is not None and x.device.type == "cuda"
        if str(func).startswith("c10d."):
            self.collectives[str(func).split(".")[1]] += 1
        if func is aten._local_scalar_dense.default and isinstance(x, FakeTensor):
            if on_gpu:
                self.note("item")
            return 1.0 if x.is_floating_point() else 1
        if func is aten.repeat_interleave.Tensor and on_gpu and kwargs.get("output_size") is None:
            self.note("repeat_interleave")
            return torch.zeros(self.rows, dtype=torch.int64, device=x.device)
        if func is aten.bincount.default and on_gpu:
            self.note("bincount")
            return torch.zeros(kwargs.get("minlength", args[-1]), dtype=torch.int64, device=x.device)
        if func is aten._to_copy.default and on_gpu and torch.device(kwargs.get("device") or "cuda").type == "cpu":
            self.note("copy to the host")
            return torch.ones(x.shape, dtype=kwargs.get("dtype") or x.dtype)
        return func(*args, **kwargs)


class Rows:
    """Random tokens in place of a prepared split."""

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


def keep_meshes_real() -> None:
    """Compute with ranks outside of all modes: a fake mesh would have no ranks."""

    def without_modes(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            with _disable_current_modes():
                return function(*args, **kwargs)

        return call

    parallelize_module.init_device_mesh = without_modes(parallelize_module.init_device_mesh)
    for name in ("__init__", "__getitem__", "_flatten", "get_coordinate", "get_group", "get_local_rank", "size"):
        setattr(DeviceMesh, name, without_modes(getattr(DeviceMesh, name)))
    DeviceMesh.mesh = property(without_modes(DeviceMesh.mesh.fget))


def rehearse(config: RunConfig, processes: int, device: torch.device) -> Recorder:
    """Run two steps of the first process; the second is recorded."""
    dims = resolve_parallel_dims(config, processes)
    rows = config.micro_batch_rows(processes) * config.data.seq_len * getattr(config.model.ffn, "top_k", 0)
    recorder, ranks = Recorder(rows), Ranks(0, processes)
    FakeTensor.tolist = lambda x: recorder.tolist(x)
    with torch.device("meta"):
        model = Transformer(config.model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        parallelize(model, dims, config.parallel, device, torch.bfloat16, False)
        model.to_empty(device=device)
        optimizer = build_optimizer(model, config.optim, torch.bfloat16)
        execution = Execution(device, torch.bfloat16, ranks, dims, Watchdog(ranks, 600.0), None)
        state = TrainState(model, optimizer, fresh_progress())
        trainer = Trainer(config, RunDirectory(Path("runs/rehearsal")), Data(config), state, execution)
        with recorder:
            for index in range(2):
                recorder.syncs.clear()
                recorder.collectives.clear()
                trainer._step(index)
    return recorder


def main() -> None:
    """Print what each case recorded, as one JSON object by case."""
    library, processes, *cases = sys.argv[1:]
    device = fake_cuda.install(Path(library))
    if int(processes) > 1:
        dist.init_process_group("fake", rank=0, world_size=int(processes), store=FakeStore())
        keep_meshes_real()
    recorded = {}
    for case in cases:
        path, *overrides = case.split("|")
        config = load_config(path, ["parallel.compile=false", "model.vocab_size=512", *overrides])
        recorder = rehearse(config, int(processes), device)
        syncs = {" in ".join(key): number for key, number in recorder.syncs.items()}
        recorded[case] = {"syncs": syncs, "collectives": recorder.collectives}
    print(json.dumps(recorded))
