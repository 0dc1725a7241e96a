"""What one step of a real run holds, by kind, summed over its processes: run under a launcher, prints one JSON object.

torchrun --nproc-per-node N -m tests.plan.measured CONFIG [KEY=VALUE]...
"""

import json
import sys
from collections import Counter
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moelm.bench.models import random_batch, shape_of
from moelm.config import load_config
from moelm.distributed.layout import resolve_layout
from moelm.distributed.world import joined
from moelm.hardware import dtype_of
from moelm.model.experts import Experts
from moelm.train.launch import build
from moelm.train.objective import part_loss
from moelm.train.optim import build_optimizer


def held(tensors: list[Tensor]) -> int:
    """Bytes of what this process holds of some tensors."""
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum(tensor.numel() * tensor.element_size() for tensor in local)


class Kept:
    """Storage that the forward pass keeps for the backward pass, the weights themselves left out."""

    def __init__(self, model: nn.Module) -> None:
        self.storages: dict[int, Tensor] = {}
        self.weights: Counter[int] = Counter()
        for module in model.modules():
            inside: list[int] = []
            module.register_forward_pre_hook(partial(self._enter, inside))
            module.register_forward_hook(partial(self._leave, inside))

    def _enter(self, inside: list[int], module: nn.Module, *_: Any) -> None:
        inside[:] = self._of(module)
        self.weights.update(inside)

    def _leave(self, inside: list[int], *_: Any) -> None:
        self.weights.subtract(inside)

    @staticmethod
    def _of(module: nn.Module) -> list[int]:
        """Where the weights are that a module has in its forward pass; gathered ones are gone after it."""
        local = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in module.parameters()]
        return [weight.untyped_storage().data_ptr() for weight in local]

    def pack(self, tensor: Tensor) -> Tensor:
        """Remember a tensor that is being kept."""
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        at = local.untyped_storage().data_ptr()
        if self.weights[at] <= 0:
            self.storages[at] = local
        return tensor

    @property
    def bytes(self) -> int:
        """Of all, each storage once."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.storages.values())


def watch_exchange(model: nn.Module) -> list[int]:
    """Bytes of the rows that go to experts elsewhere and come back, layer by layer as they do."""
    seen: list[int] = []
    for experts in (module for module in model.modules() if isinstance(module, Experts)):
        exchange = experts.exchange
        if exchange is None:
            continue

        def counted(x: Tensor, gates: Tensor, ends: Tensor, compute: Any, exchange: Any = exchange) -> Tensor:
            def inside(x_here: Tensor, gates_here: Tensor, ends_here: Tensor) -> Tensor:
                y_here: Tensor = compute(x_here, gates_here, ends_here)
                seen.append(held([x_here, y_here]) + 2 * x.numel() * x_here.element_size())
                return y_here

            result: Tensor = exchange(x, gates, ends, inside)
            return result

        experts.exchange = counted
    return seen


def main() -> None:
    """One step, measured."""
    config = load_config(sys.argv[1], sys.argv[2:])
    config = config.model_copy(update={"model": shape_of(config)})
    device = torch.device("cpu")
    dtype = dtype_of(config.train.precision, device)
    with joined() as world:
        layout = resolve_layout(config, world.size)
        model = build(config, device, dtype, layout)
        optimizer = build_optimizer(model, config.optim)
        share = config.batch_rows // world.size
        whole = random_batch(config)
        batch = type(whole)(*(part[world.rank * share : (world.rank + 1) * share] for part in whole))
        kept, exchanged = Kept(model), watch_exchange(model)
        low = torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor), low:
            output = model(batch.tokens_BT, valid_BT=batch.valid_BT, targets_BT=batch.targets_BT)
            tokens = batch.valid_N.sum().double() * world.size
            balance = getattr(config.model.ffn, "balance", None)
            loss = part_loss(output, batch, None, tokens, balance)
        found = {"activations": kept.bytes, "exchange": exchanged[0] if exchanged else 0}
        loss.total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        weights = list(model.parameters())
        found["weights"] = held(weights)
        found["gradients"] = held([weight.grad for weight in weights if weight.grad is not None])
        moments = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
        found["optimizer"] = held(moments)
        total = {kind: sum(other[kind] for other in world.gather(found)) for kind in found}
        if world.first:
            print(json.dumps({kind: amount / world.size for kind, amount in total.items()}))


if __name__ == "__main__":
    main()
