"""What a pass on the fake device does: where the host waits for the device, and what is sent to other processes."""

import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils._python_dispatch import TorchDispatchMode

import moelm

PACKAGE = Path(moelm.__file__).parent
aten = torch.ops.aten

KINDS = {
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "allreduce_": "all_reduce",
    "alltoall_base_": "all_to_all",
    "all_to_all_single": "all_to_all",
}
"""Kinds of traffic, as `moelm plan` names them, by torch's collectives; the last one is in compiled code."""


NONDETERMINISTIC = {aten.histc, aten.nll_loss_forward, aten.nll_loss2d_forward, aten.put_}
"""Operations without a deterministic CUDA kernel, by torch's list. `_is_nondeterministic` knows the cases of others that
have none; operations on images are left out."""


class Recorder(TorchDispatchMode):
    """Counts operations, those without a deterministic kernel, host syncs by kind and file, and the bytes that this process
    sends by kind. The host reads 1 or True for every value of the device.

    Args:
        rows: that the experts of each process get in a forward pass.
    """

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.syncs: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.nondeterministic: Counter[str] = Counter()
        self.operations: Counter[str] = Counter()
        self.order: list[str] = []
        """Syncs and collectives, one after another."""

    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """The compiler traces below this mode; compiled code runs in it."""
        return True

    def clear(self) -> None:
        """Forget what was recorded."""
        for counter in (self.syncs, self.sent, self.nondeterministic, self.operations):
            counter.clear()
        self.order.clear()

    def note_sync(self, kind: str) -> None:
        """Count a sync."""
        self.syncs[f"{kind} in {_file()}"] += 1
        self.order.append("sync")

    def tolist(self, x: Tensor) -> Any:
        """In place of `Tensor.tolist`, which reads one element after another of a fake tensor."""
        if x.device.type == "cuda":
            self.note_sync("tolist")
        number = 1.0 if x.is_floating_point() else 1
        if x.dtype == torch.int64 and x.dim() == 2 and len(x) == 2:
            number = self.rows // x.shape[1]  # rows for each process
        return np.full(tuple(x.shape), number).tolist()

    def numpy(self, x: Tensor) -> Any:
        """In place of `Tensor.numpy`, which fake tensors refuse."""
        assert x.device.type == "cpu"
        return np.ones(tuple(x.shape), str(x.dtype).removeprefix("torch."))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            self.operations[func.name()] += 1
            return func(*args, **kwargs)
        x = args[0] if args and isinstance(args[0], Tensor) else None
        on_gpu = x is not None and x.device.type == "cuda"
        namespace, name, _ = str(func).split(".")
        if namespace in ("c10d", "_c10d_functional") and name != "wait_tensor":
            self._note_collective(name, args)
        if on_gpu:
            self.operations[str(func)] += 1
        if on_gpu and _is_nondeterministic(func, args, kwargs):
            self.nondeterministic[str(func)] += 1
        if _is_blocking_copy(func, args, kwargs):
            self.note_sync("copy to the GPU")
        if func is aten._local_scalar_dense.default and isinstance(x, FakeTensor):
            if on_gpu:
                self.note_sync("item")
            return 1.0 if x.is_floating_point() else 1
        if func is aten.repeat_interleave.Tensor and on_gpu and kwargs.get("output_size") is None:
            self.note_sync("repeat_interleave")
            return torch.zeros(self.rows, dtype=torch.int64, device=x.device)
        if func is aten.bincount.default and on_gpu:
            self.note_sync("bincount")
            return torch.zeros(kwargs.get("minlength", args[-1]), dtype=torch.int64, device=x.device)
        if func is aten.index_put_.default and on_gpu and _has_mask(args[1]) and args[2].numel() > 1:
            self.note_sync("mask")
        if func is aten.copy_.default and not on_gpu and args[1].device.type == "cuda":
            self.note_sync("copy to the host")
        if func is aten.index.Tensor and on_gpu and _has_mask(args[1]):
            self.note_sync("mask")
            rows = [torch.zeros(each.numel(), dtype=torch.int64, device=x.device) for each in args[1]]
            return func(x, rows)
        if func is aten._to_copy.default and on_gpu and torch.device(kwargs.get("device") or "cuda").type == "cpu":
            self.note_sync("copy to the host")
            return torch.ones(x.shape, dtype=kwargs.get("dtype") or x.dtype)
        return func(*args, **kwargs)

    def _note_collective(self, name: str, args: Any) -> None:
        """Count what this process sends in a collective: of the largest tensor all but its own share, or twice that."""
        groups = [each for each in args if isinstance(each, torch.ScriptObject) and "ProcessGroup" in str(each._type())]
        group = dist.ProcessGroup.unbox(groups[0]) if groups else _resolve_process_group(args[-1])
        tensors = [tensor for each in args for tensor in (each if isinstance(each, list) else [each])]
        largest = max(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))
        kind = "optimizer" if _file() == "distributed/matrix_exchange.py" else KINDS.get(name, name)
        self.order.append(kind)
        self.sent[kind] += (1 + (kind == "all_reduce")) * largest * (group.size() - 1) // group.size()


def _has_mask(indices: Any) -> bool:
    return any(index is not None and index.dtype == torch.bool for index in indices)


def _is_nondeterministic(func: Any, args: Any, kwargs: Any) -> bool:
    operation = func.overloadpacket
    if operation in (aten.cumsum, aten.cumsum_):
        return bool(args[0].is_floating_point())
    if operation in (aten.scatter_reduce, aten.scatter_reduce_):
        return "prod" in args
    if operation is aten.bincount:
        return kwargs.get("weights") is not None or (len(args) > 1 and args[1] is not None)
    if operation is aten.median:
        return func is not aten.median.default
    return operation in NONDETERMINISTIC


def _is_blocking_copy(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether the host waits until a copy of its memory to the GPU is done, and so until everything before it is done."""
    if func is aten._to_copy.default:
        source, target = args[0].device, torch.device(kwargs.get("device") or args[0].device)
        non_blocking = kwargs.get("non_blocking", False)
    elif func is aten.copy_.default:
        source, target = args[1].device, args[0].device
        non_blocking = kwargs.get("non_blocking", len(args) > 2 and args[2])
    else:
        return False
    return source.type == "cpu" and target.type == "cuda" and not non_blocking


def _file() -> str:
    """The file of the innermost call in the package."""
    files = [Path(frame.filename) for frame in traceback.extract_stack()]
    own = [file.relative_to(PACKAGE) for file in files if file.is_relative_to(PACKAGE)]
    return str(own[-1]) if own else "torch"
