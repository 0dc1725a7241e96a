"""Next-token loss straight from hidden states: the scores of a few tokens at a time, never those of the whole batch.

At a vocabulary of 4096 the scores of a batch are many times as large as anything else in the step; here each block of them
is made, turned into its gradient in place, multiplied out and forgotten while it is still in the cache.

Shapes: N tokens, D model width, V vocabulary, R tokens of one block.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moelm.model.passes import compute_dtype

BLOCK = {"cpu": 2**22, "cuda": 2**28}
"""Scores held at once: a block fits a CPU's cache, and fills a GPU."""


class TokenLosses(NamedTuple):
    """Negative log-likelihoods in nats; a token without a target (a negative one) counts zero."""

    total: Tensor
    """Their sum, which alone carries gradients."""
    each_N: Tensor
    """Per token, float32."""


def next_token_losses(x_ND: Tensor, head_VD: Tensor, targets_N: Tensor) -> TokenLosses:
    """Cross-entropy of `softmax(head x)` at the targets; products in autocast's dtype, the softmax in float32."""
    learn = torch.is_grad_enabled()
    return TokenLosses(*_LinearCrossEntropy.apply(x_ND, head_VD, targets_N, compute_dtype(x_ND), learn))  # type: ignore[no-untyped-call]


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradients are made in the forward pass, while a block's scores are at hand; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, head_VD: Tensor, targets_N: Tensor, dtype: torch.dtype, learn: bool
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
            at_R1 = targets_R.clamp_min(0)[:, None]
            scores_RV = (x_RD @ weight_VD.t()).float()
            top_R1 = scores_RV.amax(dim=-1, keepdim=True)
            target_R1 = scores_RV.gather(1, at_R1) - top_R1
            probs_RV = scores_RV.sub_(top_R1).exp_()
            sum_R1 = probs_RV.sum(dim=-1, keepdim=True)
            losses.append(((sum_R1.log() - target_R1) * valid_R1)[:, 0])
            if not learn:
                continue
            # d loss / d scores = softmax - onehot(target); what is divided by the softmax's sum is the smaller factor.
            probs_RV.scatter_add_(1, at_R1, -sum_R1)
            scale_R1 = valid_R1 / sum_R1
            errors_RV = probs_RV.to(dtype)
            torch.mul(errors_RV @ weight_VD, scale_R1, out=grad_RD)
            x_RD = x_RD * scale_R1.to(dtype)
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
