"""The autocast forward pass of one batch, as training, evaluation and analysis call it."""

from collections.abc import Callable

import torch
from torch import Tensor

from moelm.data.loader import Batch
from moelm.model.transformer import ModelOutput


def autocast(device: torch.device, dtype: torch.dtype, cache_weights: bool = True) -> torch.autocast:
    """Autocast to bfloat16 if `dtype` is bfloat16; otherwise a context that changes nothing.

    Args:
        cache_weights: whether a weight is cast once for several uses within the context.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16, cache_enabled=cache_weights)


def forward_batch(
    model: Callable[..., ModelOutput],
    batch: Batch,
    dtype: torch.dtype,
    *,
    document_mask: bool = False,
    losses: bool = False,
    rng_keys_B: Tensor | None = None,
    last_only: bool = False,
    cache_weights: bool = True,
) -> ModelOutput:
    """Run a model, possibly compiled, on a batch.

    Args:
        dtype: dtype of matrix products; bfloat16 is autocast.
        document_mask: whether attention stops at document boundaries.
        losses: whether to compute losses at the batch's targets instead of logits.
        rng_keys_B, last_only: see `Transformer.forward`.
        cache_weights: see `autocast`.
    """
    with autocast(batch.tokens_BT.device, dtype, cache_weights):
        return model(
            batch.tokens_BT,
            batch.fragments_BT if document_mask else None,
            valid_BT=batch.valid_BT,
            rng_keys_B=rng_keys_B,
            targets_BT=batch.targets_BT if losses else None,
            last_only=last_only,
        )
