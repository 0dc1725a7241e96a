"""Fused output head and cross-entropy: logits are computed for a block of tokens at a time, never for the whole batch.

The logits of a batch would be many times larger than any other activation. Each block is turned into its gradient while it
is in the cache.

Shapes: N tokens, D model width, V vocabulary, R tokens of one block.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moelm.model.backend import compute_dtype

BLOCK = {"cpu": 2**22, "cuda": 2**28}
"""Logits per block, by device type: a block fits a CPU's cache, and fills a GPU."""


class TokenLosses(NamedTuple):
    """Negative log-likelihoods in nats; zero for tokens without a target (a negative one)."""

    total: Tensor
    """Their sum; only this has a gradient."""
    each_N: Tensor
    """Per token, float32."""


def next_token_losses(x_ND: Tensor, head_VD: Tensor, targets_N: Tensor) -> TokenLosses:
    """Cross-entropy of `softmax(head x)` at the targets; products in autocast's dtype, the softmax in float32."""
    needs_grad = torch.is_grad_enabled()
    return TokenLosses(*_LinearCrossEntropy.apply(x_ND, head_VD, targets_N, compute_dtype(x_ND), needs_grad))  # type: ignore[no-untyped-call]


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients in the forward pass, block by block; the backward pass only scales them."""

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, head_VD: Tensor, targets_N: Tensor, dtype: torch.dtype, needs_grad: bool
    ) -> tuple[Tensor, Tensor]:
        vocab_size = len(head_VD)
        rows = max(1, BLOCK.get(x_ND.device.type, BLOCK["cpu"]) // vocab_size)
        weight_VD = head_VD.to(dtype)
        grad_ND = torch.empty_like(x_ND)
        grad_VD = torch.zeros_like(head_VD)
        losses = []
        for x_RD, targets_R, grad_RD in zip(*(torch.split(t, rows) for t in (x_ND, targets_N, grad_ND)), strict=True):
            x_RD = x_RD.to(dtype)
            valid_R1 = (targets_R >= 0)[:, None]
            index_R1 = targets_R.clamp_min(0)[:, None]
            logits_RV = x_RD @ weight_VD.t()
            target_R1 = logits_RV.gather(1, index_R1).float() - logits_RV.amax(dim=-1, keepdim=True)
            probs_RV = logits_RV.softmax(dim=-1, dtype=torch.float32)
            del logits_RV  # its memory is that of errors_RV
            # The largest probability is 1 / sum_i exp(logit_i - largest logit), and does not underflow.
            losses.append(((-probs_RV.amax(dim=-1, keepdim=True).log() - target_R1) * valid_R1)[:, 0])
            if not needs_grad:
                continue
            # d loss / d logits = softmax - onehot(target).
            errors_RV = probs_RV.scatter_add_(1, index_R1, -torch.ones_like(target_R1)).to(dtype)
            torch.mul(errors_RV @ weight_VD, valid_R1, out=grad_RD)
            x_RD = x_RD * valid_R1
            if dtype == grad_VD.dtype:
                grad_VD.addmm_(errors_RV.t(), x_RD)
            else:
                grad_VD += errors_RV.t() @ x_RD
        each_N = torch.cat(losses)
        ctx.save_for_backward(grad_ND, grad_VD)
        ctx.mark_non_differentiable(each_N)
        return each_N.sum(), each_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_ND, grad_VD = ctx.saved_tensors
        return grad_ND * grads[0], grad_VD * grads[0], None, None, None
