"""Routing counts over a sample of text, as integers; only the counts by document grow with the text.

Sums of fractions are stored as integer multiples of `UNIT`, so that they do not depend on the order of summation or on the
number of processes.

Shapes: N documents, G domains, L sparse layers, E experts, V vocabulary.
"""

from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moelm.distributed.ranks import Ranks

Ints = NDArray[np.int64]
UNIT = 1e-9


@dataclass
class RoutingCounts:
    """Counts over a sample of text. An assignment is one pair of a token and one of its experts."""

    document_load: Ints
    """`(N, L, E)`: assignments by document."""
    tokens: Ints
    """`(G,)`: tokens by domain."""
    first_experts: Ints
    """`(G, L, E)`: tokens by their first expert."""
    adjacent_pairs: Ints
    """`(G,)`: pairs of adjacent tokens of one fragment."""
    adjacent_matches: Ints
    """`(G, L, 2)`: such pairs that share their first expert, and any expert."""
    shuffled_pairs: Ints
    """`(G,)`: random pairs of tokens of one domain and batch."""
    shuffled_matches: Ints
    """`(G, L, 2)`: such pairs that share their first expert, and any expert."""
    coactivation: Ints
    """`(L, E, E)`: tokens by each ordered pair of their experts."""
    entropy: Ints
    """`(G, L)`: sum of the entropies of the router's distribution, in nats times `1 / UNIT`."""
    margin: Ints
    """`(G, L)`: sum of the lowest selected probability minus the highest one not selected, times `1 / UNIT`."""
    by_input: Ints
    """`(L, E, V)`: assignments by input token."""
    by_prediction: Ints
    """`(L, E, V)`: assignments by the next token that the model finds most likely."""

    @classmethod
    def zeros(cls, documents: int, domains: int, layers: int, experts: int, vocab_size: int) -> "RoutingCounts":
        """Counts of no text."""
        shapes: dict[str, tuple[int, ...]] = {
            "document_load": (documents, layers, experts),
            "tokens": (domains,),
            "first_experts": (domains, layers, experts),
            "adjacent_pairs": (domains,),
            "adjacent_matches": (domains, layers, 2),
            "shuffled_pairs": (domains,),
            "shuffled_matches": (domains, layers, 2),
            "coactivation": (layers, experts, experts),
            "entropy": (domains, layers),
            "margin": (domains, layers),
            "by_input": (layers, experts, vocab_size),
            "by_prediction": (layers, experts, vocab_size),
        }
        return cls(**{name: np.zeros(shape, dtype=np.int64) for name, shape in shapes.items()})

    def all_reduce(self, ranks: Ranks, device: torch.device) -> None:
        """Replace each count by its sum over all processes."""
        for field in fields(self):
            setattr(self, field.name, ranks.all_reduce_array(getattr(self, field.name), device))

    @property
    def load(self) -> Ints:
        """Assignments by layer and expert, `(L, E)`."""
        total: Ints = self.document_load.sum(axis=0)
        return total


def add_counts(counts: Ints, *indices: Tensor) -> None:
    """Add 1 to `counts` at each index; one tensor of indices for each axis, broadcast against each other."""
    flat = indices[0]
    for axis, index in enumerate(indices[1:], 1):
        flat = flat * counts.shape[axis] + index
    counts += torch.bincount(flat.flatten(), minlength=counts.size).cpu().numpy().reshape(counts.shape)
