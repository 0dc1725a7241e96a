"""The matrices that each process orthogonalizes in one update, for several layouts, printed as one JSON object.

Its arguments: CONFIG "KEY=VALUE|..." "KEY=VALUE|..."
"""

import json
import sys
from collections import Counter

import torch
from torch import Tensor

from moelm.config import load_config
from moelm.distributed.parallel_dims import resolve_parallel_dims
from moelm.distributed.ranks import distributed_context
from moelm.train import muon
from moelm.train.optimizer import build_optimizer
from moelm.train.polar import orthogonalize
from moelm.train.setup import build_parallel_model


def main() -> None:
    """Count by shape, in the order of ranks, for each layout."""
    path, *layouts = sys.argv[1:]
    counts: Counter[str] = Counter()

    def counted(x_KNM: Tensor, steps: int) -> Tensor:
        counts["x".join(map(str, sorted(x_KNM.shape[1:])))] += len(x_KNM)
        return orthogonalize(x_KNM, steps)

    muon.orthogonalize = counted
    found = {}
    with distributed_context() as ranks:
        for layout in layouts:
            config = load_config(path, layout.split("|"))
            config = config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": 64})})
            dims = resolve_parallel_dims(config, ranks.size)
            model = build_parallel_model(config, torch.device("cpu"), torch.float32, dims)
            optimizer = build_optimizer(model, config.optim, torch.float32)
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.set_lr(0.01)
            optimizer.step(squares=ranks.all_reduce([optimizer.gradient_squares()])[0].tolist())
            found[layout] = ranks.gather(dict(counts))
            counts.clear()
    if ranks.is_main:
        print(json.dumps(found))
