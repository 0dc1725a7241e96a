"""How alike the experts of a layer are as weights: did they part, after upcycling or from their initial values?

Shapes: E experts.
"""

import torch
from torch import Tensor

from moelm.model import Transformer
from moelm.model.experts import experts_of


@torch.no_grad()
def expert_similarity(model: Transformer) -> list[Tensor]:
    """Cosines between the experts of each sparse layer a token meets, all their weights laid end to end; `(E, E)` each."""
    found = []
    for layer in experts_of(model):
        flat = torch.cat([weight.flatten(1).double() for weight in (layer.w1, layer.w2, layer.w3)], dim=1)
        unit = flat / flat.norm(dim=1, keepdim=True)
        found.append(unit @ unit.T)
    return found * (len(model.config.sparse_layers) // max(1, len(found)))
