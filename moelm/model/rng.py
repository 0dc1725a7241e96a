"""Counter-based random numbers: stateless functions of seed, step, row, position, layer and expert.

A token gets the same numbers in any micro-batch, on any process, in a recomputed forward pass and after a resume (Salmon et
al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; the mixing function is that of SplitMix64, Steele et al. 2014).

Shapes: B rows, T positions, N tokens, E numbers per token.
"""

import hashlib
import math

import torch
from torch import Tensor


def _signed(bits: int) -> int:
    return bits - (1 << 64) if bits >= 1 << 63 else bits


GOLDEN = _signed(0x9E3779B97F4A7C15)
FIRST, SECOND = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def _mix(x: Tensor) -> Tensor:
    """A bijection of int64 whose every output bit depends on every input bit; the masks make the shifts logical."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * FIRST
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * SECOND
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def row_keys(seed: int, step: int, rows_B: Tensor) -> Tensor:
    """Keys of the training rows of one step, int64 `(B,)`."""
    digest = hashlib.blake2b(f"{seed}/{step}".encode(), digest_size=8).digest()
    return _mix(rows_B * GOLDEN + int.from_bytes(digest, "big", signed=True))


def token_keys(rows_B: Tensor, positions_BT: Tensor) -> Tensor:
    """Keys of the tokens, int64 `(B, T)`."""
    return _mix(rows_B[:, None] + (positions_BT + 1) * GOLDEN)


def uniform(rng_keys_N: Tensor, columns: int, stream: Tensor) -> Tensor:
    """Uniform numbers in (0, 1), float32 `(N, columns)`; each `stream`, an int64 scalar, is independent."""
    counter_E = torch.arange(1, columns + 1, device=rng_keys_N.device)
    bits_NE = _mix(_mix(rng_keys_N + stream * GOLDEN)[:, None] + counter_E * GOLDEN)
    return (((bits_NE >> 40) & 0xFFFFFF).float() + 0.5) / (1 << 24)


def normal(rng_keys_N: Tensor, columns: int, stream: Tensor) -> Tensor:
    """Standard normal numbers, float32 `(N, columns)` (Box and Muller 1958)."""
    radius_NE = (-2 * uniform(rng_keys_N, columns, 2 * stream).log()).sqrt()
    return radius_NE * (2 * math.pi * uniform(rng_keys_N, columns, 2 * stream + 1)).cos()


def named_generator(name: str) -> torch.Generator:
    """A generator seeded by a name, the same on every machine."""
    digest = hashlib.blake2b(name.encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))
