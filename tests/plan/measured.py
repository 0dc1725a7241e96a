"""Memory of one real training step by purpose, and the FLOPs and messages of its update, printed as one JSON object.

Memory is the mean over the processes, FLOPs are by process, and messages are the sum.

Its arguments are those of a command: CONFIG [KEY=VALUE]...
"""

import json
import sys
from collections import Counter
from collections.abc import Iterable
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from moelm.bench.models import random_batch, resolve_model
from moelm.config import load_config
from moelm.distributed.expert_parallel import AllToAllDispatcher
from moelm.distributed.parallel_dims import resolve_parallel_dims
from moelm.distributed.ranks import distributed_context
from moelm.hardware import dtype_of
from moelm.model import attention, swiglu
from moelm.model.forward import forward_batch
from moelm.model.moe.dispatcher import DispatchedRows
from moelm.model.moe.layer import MoELayer
from moelm.train.objective import micro_batch_loss
from moelm.train.optimizer import Optimizer, build_optimizer
from moelm.train.setup import build_parallel_model


def to_local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_bytes(*tensors: Tensor) -> int:
    """Bytes of this process's shards."""
    return sum(to_local(tensor).numel() * tensor.element_size() for tensor in tensors)


class SavedActivations:
    """Storages that the forward pass saves for the backward pass, without the weights."""

    def __init__(self, model: nn.Module) -> None:
        self.storages: dict[int, Tensor] = {}
        self.weights: Counter[int] = Counter()
        for module in model.modules():
            current: list[int] = []
            module.register_forward_pre_hook(partial(self._before_forward, current))
            module.register_forward_hook(partial(self._after_forward, current))

    def _before_forward(self, current: list[int], module: nn.Module, *_: Any) -> None:
        # Gathered weights exist only during the forward pass.
        current[:] = [to_local(weight).untyped_storage().data_ptr() for weight in module.parameters()]
        self.weights.update(current)

    def _after_forward(self, current: list[int], *_: Any) -> None:
        self.weights.subtract(current)

    def pack(self, tensor: Tensor) -> Tensor:
        """A hook for saved tensors."""
        local = to_local(tensor)
        address = local.untyped_storage().data_ptr()
        if self.weights[address] <= 0:
            self.storages[address] = local
        return tensor

    @property
    def bytes(self) -> int:
        """Total size; each storage counts once."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.storages.values())


class MeasuredDispatcher(AllToAllDispatcher):
    """An all-to-all dispatcher that records the bytes of its send and receive buffers in each layer."""

    def __init__(self, dispatcher: AllToAllDispatcher, measured: list[int]) -> None:
        super().__init__(dispatcher.group)
        self.measured = measured

    def combine(self, y_SD: Tensor, rows: DispatchedRows) -> Tensor:
        """Combine, and record the bytes of this dispatch and combine."""
        sent = rows.combine_state.local.x_SD.numel() * rows.x_SD.element_size()
        self.measured.append(local_bytes(rows.x_SD, y_SD) + 2 * sent)
        return super().combine(y_SD, rows)


class Temporaries(TorchDispatchMode):
    """Records the peak of the bytes that operations allocate beside existing tensors."""

    def __init__(self, existing: Iterable[Tensor]) -> None:
        super().__init__()
        self.existing = {to_local(tensor).untyped_storage()._cdata for tensor in existing}
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            storage = result.untyped_storage()
            if storage._cdata not in self.existing:
                self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.live = {address: entry for address, entry in self.live.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return result


def measure_update(optimizer: Optimizer) -> tuple[int, int, int]:
    """FLOPs, bytes sent in messages, and peak bytes of temporaries of one update on this process."""
    sent = 0
    send = torch.distributed.all_to_all_single

    def all_to_all_single(output: Tensor, given: Tensor, output_sizes: list[int], sizes: list[int]) -> Any:
        nonlocal sent
        sent += given.nbytes
        assert sizes[torch.distributed.get_rank()] == 0
        return send(output, given, output_sizes, sizes)

    squares = [1e-9] * len(optimizer.gradient_squares())  # nothing is clipped, because the factor is a tensor
    existing = [tensor for weight in optimizer.parameters for tensor in (weight, weight.grad) if tensor is not None]
    existing += [value for state in optimizer.state.values() for value in state.values()]
    with (
        patch.object(torch.distributed, "all_to_all_single", all_to_all_single),
        FlopCounterMode(display=False) as flops,
        Temporaries(existing) as temporaries,
    ):
        optimizer.step(squares=squares)
    return flops.get_total_flops(), sent, temporaries.peak


def main() -> None:
    """Measure one step."""
    config = load_config(sys.argv[1], sys.argv[2:])
    config = config.model_copy(update={"model": resolve_model(config)})
    device = torch.device("cpu")
    dtype = dtype_of(config.train.precision, device)
    with distributed_context() as ranks:
        model = build_parallel_model(config, device, dtype, resolve_parallel_dims(config, ranks.size))
        optimizer = build_optimizer(model, config.optim, dtype)
        rows = config.batch_rows // ranks.size
        batch = random_batch(config)
        batch = type(batch)(*(tensor[ranks.rank * rows : (ranks.rank + 1) * rows] for tensor in batch))
        buffers: list[int] = []
        # A plan is for GPUs, whose attention stores no logits, and whose experts' rows are not padded.
        attention.SHORT = 0
        swiglu._block_layout = lambda ends_E, weight_size: swiglu._plain_layout(ends_E)
        for module in model.modules():
            if isinstance(module, MoELayer) and isinstance(module.dispatcher, AllToAllDispatcher):
                module.dispatcher = MeasuredDispatcher(module.dispatcher, buffers)
        activations = SavedActivations(model)
        with torch.autograd.graph.saved_tensors_hooks(activations.pack, lambda tensor: tensor):
            output = forward_batch(model, batch, dtype, losses=True)
            num_tokens = batch.valid_N.sum().double() * ranks.size
            loss = micro_batch_loss(output, batch, None, num_tokens, getattr(config.model.ffn, "balance", None))
        measured = {"activations": activations.bytes, "all_to_all": buffers[0] if buffers else 0}
        loss.total.backward()  # type: ignore[no-untyped-call]
        flops, sent, measured["update"] = measure_update(optimizer)
        weights = list(model.parameters())
        measured["weights"] = local_bytes(*weights)
        measured["gradients"] = local_bytes(*(weight.grad for weight in weights if weight.grad is not None))
        moments = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
        measured["optimizer"] = local_bytes(*moments)
        total = {kind: sum(other[kind] for other in ranks.gather(measured)) for kind in measured}
        updates = ranks.gather((flops, sent))
        if ranks.is_main:
            memory = {kind: amount / ranks.size for kind, amount in total.items()}
            flops_by_rank, messages = zip(*updates, strict=True)
            print(json.dumps({"memory": memory, "update_flops": flops_by_rank, "update_messages": sum(messages)}))
