"""What one pass over text adds up: whole numbers in memory that does not grow with the text, but for a row a document.

Sums of fractions are kept as whole numbers of `UNIT`, so that any number of processes and any order give the same.

Shapes: N documents, G domains, L sparse layers, E experts, K choices, V vocabulary, M positions.
"""

from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]
UNIT = 1e-9


@dataclass
class RoutingCounts:
    """Counts over a sample of text."""

    documents: Ints
    """`(N, L, E)`: assignments of each document."""
    tokens: Ints
    """`(G,)`: positions."""
    first: Ints
    """`(G, L, E)`: positions by their first expert."""
    neighbours: Ints
    """`(G,)`: positions whose predecessor is of the same fragment."""
    repeated: Ints
    """`(G, L, 2)`: neighbours that share their first expert, and any expert."""
    shuffled: Ints
    """`(G, L, 2)`: the same of as many pairs of positions of the same domain and batch, drawn by lot."""
    shuffled_pairs: Ints
    """`(G,)`: how many were drawn."""
    together: Ints
    """`(L, E, E)`: positions by each two of their experts."""
    entropy: Ints
    """`(G, L)`: of the router's distribution, nats, in `UNIT`s."""
    margin: Ints
    """`(G, L)`: between the lowest probability that was chosen and the highest that was not, in `UNIT`s."""
    by_input: Ints
    """`(L, E, V)`: assignments by the token that is read."""
    by_prediction: Ints
    """`(L, E, V)`: assignments by the token that the model finds likeliest to come."""

    @classmethod
    def empty(cls, documents: int, domains: int, layers: int, experts: int, vocabulary: int) -> "RoutingCounts":
        """Nothing counted yet."""
        shapes: dict[str, tuple[int, ...]] = {
            "documents": (documents, layers, experts),
            "tokens": (domains,),
            "first": (domains, layers, experts),
            "neighbours": (domains,),
            "repeated": (domains, layers, 2),
            "shuffled": (domains, layers, 2),
            "shuffled_pairs": (domains,),
            "together": (layers, experts, experts),
            "entropy": (domains, layers),
            "margin": (domains, layers),
            "by_input": (layers, experts, vocabulary),
            "by_prediction": (layers, experts, vocabulary),
        }
        return cls(**{name: np.zeros(shape, dtype=np.int64) for name, shape in shapes.items()})

    def over_processes(self, device: torch.device) -> None:
        """Add up what the processes of a launch have counted."""
        if dist.is_initialized():
            for field in fields(self):
                shared = torch.from_numpy(getattr(self, field.name)).to(device)
                dist.all_reduce(shared)
                setattr(self, field.name, shared.cpu().numpy())

    @property
    def load(self) -> Ints:
        """Assignments by layer and expert, `(L, E)`."""
        total: Ints = self.documents.sum(axis=0)
        return total


def tally(into: Ints, *places: Tensor) -> None:
    """Add 1 at each of the places, given as one index tensor for each axis."""
    flat = places[0]
    for axis, place in enumerate(places[1:], 1):
        flat = flat * into.shape[axis] + place
    into += torch.bincount(flat.flatten(), minlength=into.size).cpu().numpy().reshape(into.shape)
