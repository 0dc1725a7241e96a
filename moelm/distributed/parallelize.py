"""All wrapping of a model, in the order in which it must be done: deal out the experts, make activations again, compile,
share weights (FSDP2).

What is wrapped is still a `Transformer` with the same parameter names, each of them a DTensor that knows its place in the
whole; so a checkpoint of one layout is one of any other.
"""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from moelm.config import ParallelConfig
from moelm.distributed.expert_parallel import ExpertExchange
from moelm.distributed.layout import Layout
from moelm.model import Transformer
from moelm.model.experts import Experts
from moelm.model.moe import MoE

DIRECTIONS = ("dp_replicate", "dp_shard", "ep")

CHOICES = {torch.ops.aten.topk.default, torch.ops.aten.sort.stable}
"""What decides who computes what; kept rather than made again."""


def parallelize(
    model: Transformer, layout: Layout, config: ParallelConfig, device: torch.device, dtype: torch.dtype, compiled: bool
) -> None:
    """Spread a model, which may be on the meta device, over the processes of `layout`; changes it in place.

    Args:
        dtype: what products are computed in.
        compiled: whether each layer is compiled, where there are several processes; one compiles the model whole.
    """
    alone = layout.size == 1
    if not alone:
        experts_mesh = init_device_mesh(device.type, layout, mesh_dim_names=DIRECTIONS)
        trunk_mesh = init_device_mesh(device.type, layout.trunk, mesh_dim_names=("copies", "shared"))
    if layout.ep > 1:
        deal_experts(model, experts_mesh["ep"])
    checkpoint_activations(model, config.activation_checkpointing)
    if compiled and not alone:
        for block in model.blocks:
            block.compile()
    if not alone:
        share_weights(model, layout, config, experts_mesh, trunk_mesh, dtype)


def deal_experts(model: Transformer, mesh: DeviceMesh) -> None:
    """Give each process of a mesh of one direction its part of every layer's experts."""
    for experts in _experts(model):
        for name, weight in list(experts.named_parameters()):
            dealt = distribute_tensor(weight, mesh, [Shard(0)], src_data_rank=None)
            experts.register_parameter(name, nn.Parameter(dealt))
        experts.exchange = ExpertExchange(mesh.get_group())


def checkpoint_activations(model: Transformer, what: str) -> None:
    """Make activations again in the backward pass: none, those inside the feed-forward blocks, or whole layers."""
    model.recompute_hidden(what == "selective")
    if what != "full":
        return

    def policy(context: Any, operation: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
        kept = operation in CHOICES
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy)
    for block in model.blocks:
        # Inside the module, so that its name and the hooks of whoever wraps it stay as they are.
        again = partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts, preserve_rng_state=False)
        setattr(block, "forward", again)  # noqa: B010


def share_weights(
    model: Transformer,
    layout: Layout,
    config: ParallelConfig,
    experts_mesh: DeviceMesh,
    trunk_mesh: DeviceMesh,
    dtype: torch.dtype,
) -> None:
    """Share weights and sum gradients over processes; gradients are sums, for the parts of the objective add up."""
    param_dtype = dtype if config.param_dtype == "auto" else _DTYPES[config.param_dtype]

    def share(module: nn.Module, mesh: DeviceMesh, dtype: torch.dtype, **options: Any) -> None:
        policy = MixedPrecisionPolicy(dtype, _DTYPES[config.reduce_dtype], cast_forward_inputs=False)
        reshard = config.reshard_after_forward and mesh.size(1) > 1
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard, **options)

    whole: set[nn.Parameter] = set()
    for block in model.blocks:
        if isinstance(block.ffn, MoE):
            if layout.ep > 1 and layout.dp_replicate * layout.dp_shard > 1:
                # Along the other dimension: the first one is dealt out already.
                mesh = experts_mesh["dp_replicate", "dp_shard"]
                share(block.ffn.experts, mesh, param_dtype, shard_placement_fn=lambda _: Shard(1))
            elif layout.ep > 1:
                whole |= set(block.ffn.experts.parameters())  # one copy in the world, whose gradient is whole as it is
            if param_dtype != torch.float32 and list(block.ffn.router.parameters()):
                share(block.ffn.router, trunk_mesh, torch.float32)
        share(block, trunk_mesh, param_dtype, ignored_params=whole, shard_placement_fn=partial(_evenly, trunk_mesh.size(1)))
    share(model, trunk_mesh, torch.float32, ignored_params=whole)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def sum_gradients(model: nn.Module, now: bool, layout: Layout) -> None:
    """Whether the next backward pass sums gradients over processes; whole copies can wait for the last micro-batch."""
    if isinstance(model, FSDPModule) and layout.dp_shard == 1:
        model.set_requires_gradient_sync(now)


def _evenly(shares: int, weight: nn.Parameter) -> Shard:
    """Where a weight is cut: stacks of experts along their next dimension if their number is no multiple of the shares."""
    stacked = weight.dim() == 3 and len(weight) % shares and weight.shape[1] % shares == 0
    return Shard(1 if stacked else 0)


_DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


def _experts(model: Transformer) -> list[Experts]:
    return [block.ffn.experts for block in model.blocks if isinstance(block.ffn, MoE)]
