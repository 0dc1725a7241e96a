"""Random numbers that are a function of what they are for: seed, step, row, position, layer, expert; nothing has a state.

So a token meets the same noise however its batch is cut, on whichever process, in a recomputed forward pass and after a
resume (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; the mixer is that of SplitMix64, Steele et al.
2014).

Shapes: B rows, T positions, N tokens, E columns drawn for each token.
"""

import hashlib
import math

import torch
from torch import Tensor


def _signed(word: int) -> int:
    return word - (1 << 64) if word >= 1 << 63 else word


GOLDEN = _signed(0x9E3779B97F4A7C15)
FIRST, SECOND = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def _mix(x: Tensor) -> Tensor:
    """A bijection of int64 whose every output bit depends on every input bit; the masks make the shifts logical."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * FIRST
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * SECOND
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def row_keys(seed: int, step: int, rows_B: Tensor) -> Tensor:
    """A key for each training row of one step, int64 `(B,)`."""
    digest = hashlib.blake2b(f"{seed}/{step}".encode(), digest_size=8).digest()
    return _mix(rows_B * GOLDEN + int.from_bytes(digest, "big", signed=True))


def token_keys(rows_B: Tensor, positions_BT: Tensor) -> Tensor:
    """A key for each token, int64 `(B, T)`."""
    return _mix(rows_B[:, None] + (positions_BT + 1) * GOLDEN)


def uniform(keys_N: Tensor, columns: int, stream: int) -> Tensor:
    """Numbers in (0, 1), float32 `(N, columns)`; another `stream` gives independent ones."""
    counter_E = torch.arange(1, columns + 1, device=keys_N.device)
    bits_NE = _mix(_mix(keys_N + _signed(stream * 0x9E3779B97F4A7C15 % (1 << 64)))[:, None] + counter_E * GOLDEN)
    return (((bits_NE >> 40) & 0xFFFFFF).float() + 0.5) / (1 << 24)


def normal(keys_N: Tensor, columns: int, stream: int) -> Tensor:
    """Standard normal numbers, float32 `(N, columns)` (Box and Muller 1958)."""
    radius_NE = (-2 * uniform(keys_N, columns, 2 * stream).log()).sqrt()
    return radius_NE * (2 * math.pi * uniform(keys_N, columns, 2 * stream + 1)).cos()


def named_generator(name: str) -> torch.Generator:
    """A stream of random numbers of its own for every name, the same on every machine."""
    digest = hashlib.blake2b(name.encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))
