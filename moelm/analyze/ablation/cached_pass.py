"""The forward pass of one batch, kept by layer, so that it can be continued from a layer with another routing.

Shapes: B rows, T positions, N = B*T tokens, M tokens of a subset, C copies of a batch, D model width, E experts, K experts
per token.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moelm.data.loader import Batch
from moelm.evaluation.losses import EVAL_TOKENS
from moelm.model import Routing, Transformer
from moelm.model.forward import autocast
from moelm.model.moe.layer import MoELayer
from moelm.model.moe.router import TokenContext
from moelm.model.transformer import Block, BlockInputs


class LayerState(NamedTuple):
    """One sparse layer in the forward pass of a batch."""

    residual_ND: Tensor
    """Input of the second half of the block."""
    normed_ND: Tensor
    """Input of the router and the experts."""
    routing: Routing
    output_ND: Tensor
    """Output of the block."""


class RouteChange(NamedTuple):
    """Another routing of some tokens in one layer."""

    tokens_M: Tensor
    """Indices of the tokens."""
    routing: Routing
    """Of these tokens; its gates, experts and probabilities are read."""


class CachedPass:
    """A forward pass over a batch without gradients, with its sparse layers' states.

    Args:
        model: in evaluation mode.
        available: by layer, `(E,)`: False for experts that no token may select.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: Transformer,
        batch: Batch,
        dtype: torch.dtype,
        document_mask: bool,
        available: Mapping[int, Tensor] | None = None,
    ) -> None:
        self._model, self._dtype, self._document_mask, self.batch = model, dtype, document_mask, batch
        self._inputs: dict[int, BlockInputs] = {}
        self.layers: dict[int, LayerState] = {}
        with self._autocast():
            inputs = self._inputs_of(1)
            x_BTD = model.embed(batch.tokens_BT)
            for number, block in enumerate(model.repeated_blocks):
                residual_BTD = block.add_attention(x_BTD, inputs.rope, inputs.mask, None)
                context = self.context(number)
                if available is not None and number in available:
                    context = context._replace(available_NE=available[number].expand(len(context.tokens_N), -1))
                x_BTD, routing = block.add_ffn(residual_BTD, context)
                if routing is not None:
                    normed_BTD = block.ffn_norm(residual_BTD)
                    flat = (each.flatten(0, 1) for each in (residual_BTD, normed_BTD, x_BTD))
                    residual_ND, normed_ND, output_ND = flat
                    self.layers[number] = LayerState(residual_ND, normed_ND, routing, output_ND)
            self.losses_N: Tensor = model.losses(x_BTD.flatten(0, 1), batch.targets_BT.flatten()).each_N

    @torch.no_grad()
    def reroute(self, number: int, tokens_M: Tensor, available_ME: Tensor) -> Routing:
        """The routing of some tokens in a layer whose router does not have all experts."""
        block, context = self._block(number), self.context(number).subset(tokens_M)
        routing: Routing = _sparse(block).router(
            self.layers[number].normed_ND[tokens_M], context._replace(available_NE=available_ME)
        )
        return routing

    @torch.no_grad()
    def losses_with(self, number: int, changes: Sequence[RouteChange]) -> Tensor:
        """The losses of all tokens after each of several changes in one layer, `(len(changes), N)`."""
        per_pass = max(1, EVAL_TOKENS // len(self.losses_N))
        parts = [changes[start : start + per_pass] for start in range(0, len(changes), per_pass)]
        return torch.cat([self._losses_with(number, part) for part in parts])

    def _losses_with(self, number: int, changes: Sequence[RouteChange]) -> Tensor:
        """Run the rest of the model once, on a copy of the batch for each change."""
        model, state, block = self._model, self.layers[number], self._block(number)
        tokens, copies = len(self.losses_N), len(changes)
        changed_M = torch.cat([change.tokens_M for change in changes])
        routings = [change.routing for change in changes]
        routing = Routing(
            torch.cat([each.gates_NK for each in routings]),
            torch.cat([each.experts_NK for each in routings]),
            torch.cat([each.probs_NE for each in routings]),
        )
        index_M = torch.cat([change.tokens_M + copy * tokens for copy, change in enumerate(changes)])
        losses_CN = self.losses_N.repeat(copies)
        targets_CN = self.batch.targets_BT.flatten().repeat(copies)
        with self._autocast():
            context = self.context(number).subset(changed_M)
            y_1MD, _ = _sparse(block)(state.normed_ND[changed_M][None], context, routing)
            x_MD = state.residual_ND[changed_M] + block.scale_ffn(y_1MD)[0]
            if number + 1 == model.config.num_layers:  # no other token attends to them any more
                return losses_CN.index_copy(0, index_M, model.losses(x_MD, targets_CN[index_M]).each_N).view(copies, -1)
            x_CND = state.output_ND.repeat(copies, 1).index_copy(0, index_M, x_MD.to(state.output_ND.dtype))
            x_BTD = x_CND.view(-1, self.batch.tokens_BT.shape[1], x_CND.shape[-1])
            inputs = self._inputs_of(copies)
            for later in range(number + 1, model.config.num_layers):
                context = model.context_at(later, inputs)
                x_BTD, _ = self._block(later)(x_BTD, inputs.rope, inputs.mask, None, context)
            return model.losses(x_BTD.flatten(0, 1), targets_CN).each_N.view(copies, -1)

    def _inputs_of(self, copies: int) -> BlockInputs:
        """What blocks read in addition to their input, for some copies of the batch."""
        if copies not in self._inputs:
            tokens_BT, fragments_BT, valid_BT = (
                each.repeat(copies, 1) for each in (self.batch.tokens_BT, self.batch.fragments_BT, self.batch.valid_BT)
            )
            segments_BT = fragments_BT if self._document_mask else None
            self._inputs[copies] = self._model.block_inputs(tokens_BT, segments_BT, valid_BT=valid_BT)
        return self._inputs[copies]

    def context(self, number: int) -> TokenContext:
        """What the router of a layer reads."""
        return self._model.context_at(number, self._inputs_of(1))

    def _block(self, number: int) -> Block:
        return self._model.repeated_blocks[number]

    def _autocast(self) -> torch.autocast:
        return autocast(self.batch.tokens_BT.device, self._dtype)


def _sparse(block: Block) -> MoELayer:
    assert isinstance(block.ffn, MoELayer)
    return block.ffn


def subset_of_routing(routing: Routing, tokens_M: Tensor) -> Routing:
    """The gates and experts of some tokens; the probabilities of all experts with them."""
    return Routing(routing.gates_NK[tokens_M], routing.experts_NK[tokens_M], routing.probs_NE[tokens_M])
