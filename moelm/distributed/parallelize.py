"""Wrapping of a model for several processes: expert parallelism, activation checkpointing, compilation, FSDP2, in this
order.

The result is still a `Transformer` with the same parameter names; each parameter is a DTensor that knows its place in the
whole, so checkpoints do not depend on the parallel dimensions.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils.checkpoint import (
    SAC_IGNORED_OPS,
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from moelm.config import ParallelConfig
from moelm.distributed.expert_parallel import AllToAllDispatcher
from moelm.distributed.parallel_dims import ParallelDims, stack_shard_dim
from moelm.model import Transformer
from moelm.model.dtensor import local
from moelm.model.moe.layer import MoELayer

ROUTING_OPS = {torch.ops.aten.topk.default, torch.ops.aten.sort.stable}
"""Operations whose results are stored rather than recomputed, so that a recomputed pass has the same routing."""

PROFILER_OPS = {
    torch.ops.profiler._record_function_enter_new.default,
    torch.ops.profiler._record_function_exit._RecordFunction,
}
"""Operations without results."""

Groups = dict[tuple[int, ...], dist.ProcessGroup]
"""Process groups of this process by their ranks."""

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def parallelize(
    model: Transformer, dims: ParallelDims, config: ParallelConfig, device: torch.device, dtype: torch.dtype, compiled: bool
) -> None:
    """Wrap a model, which may be on the meta device, in place.

    Args:
        dtype: dtype of matrix products.
        compiled: whether to compile each block, if there are several processes; on one, the whole model is compiled later.
    """
    if dims.size == 1:
        apply_activation_checkpointing(model, config.activation_checkpointing)
        return
    groups: Groups = {}
    expert_mesh = build_mesh(
        device.type, {"dp_replicate": dims.dp_replicate, "dp_shard": dims.dp_shard, "ep": dims.ep}, groups
    )
    dense_mesh = build_mesh(device.type, dict(zip(("replicate", "shard"), dims.dense_mesh, strict=True)), groups)
    if dims.ep > 1:
        apply_expert_parallel(model, expert_mesh["ep"])
    replicate_routers(model, dense_mesh)
    apply_activation_checkpointing(model, config.activation_checkpointing, by_halves=dims.ep > 1)
    if compiled:
        _compile_blocks(model, dims.ep > 1 and config.activation_checkpointing == "full")
    apply_fsdp(model, dims, config, expert_mesh, dense_mesh, dtype)


def build_mesh(device_type: str, sizes: dict[str, int], groups: Groups) -> DeviceMesh:
    """A mesh of all processes.

    `init_device_mesh` creates the groups of all processes on each of them, also those of one process, which are as many as
    there are processes. Here a process creates only its own, one for each dimension, and each set of ranks once.

    Args:
        sizes: of the dimensions, by name.
        groups: those that exist; new ones are added.
    """
    ranks = torch.arange(dist.get_world_size()).view(*sizes.values())
    own = (ranks == dist.get_rank()).nonzero()[0].tolist()
    dim_groups = []
    for dim in range(ranks.dim()):
        members = tuple(ranks[(*own[:dim], slice(None), *own[dim + 1 :])].tolist())
        if members not in groups:
            world = dist.group.WORLD if len(members) == dist.get_world_size() else None
            groups[members] = world or dist.new_group(members, use_local_synchronization=True)
        dim_groups.append(groups[members])
    return DeviceMesh.from_group(dim_groups, device_type, ranks, mesh_dim_names=tuple(sizes))


def apply_expert_parallel(model: Transformer, mesh: DeviceMesh) -> None:
    """Shard every layer's experts over a one-dimensional mesh, and dispatch tokens by all-to-all."""
    for layer in _moe_layers(model):
        for name, weight in list(layer.experts.named_parameters()):
            sharded = distribute_tensor(weight, mesh, [Shard(0)], src_data_rank=None)
            layer.experts.register_parameter(name, nn.Parameter(sharded))
        layer.dispatcher = AllToAllDispatcher(mesh.get_group())


def replicate_routers(model: Transformer, mesh: DeviceMesh) -> None:
    """Mark the routers' parameters as whole on every process of a mesh; `sum_router_gradients` sums their gradients.

    They are small, always float32, and read inside of blocks: sharded by FSDP they would need collectives of their own in
    every layer, whose hooks a compiled block cannot contain and a recomputed one would call again.
    """
    replicated = [Replicate()] * mesh.ndim
    for layer in _moe_layers(model):
        for name, weight in list(layer.router.named_parameters()):
            whole = distribute_tensor(weight, mesh, replicated, src_data_rank=None)
            layer.router.register_parameter(name, nn.Parameter(whole))


def sum_router_gradients(model: Transformer) -> None:
    """Sum the routers' gradients over all processes, in one collective, after the last backward pass of a step."""
    gradients = [
        local(parameter.grad)
        for layer in _moe_layers(model)
        for parameter in layer.router.parameters()
        if isinstance(parameter, DTensor) and parameter.grad is not None
    ]
    if gradients:
        total = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(total)
        for gradient, summed in zip(gradients, torch.split(total, [each.numel() for each in gradients]), strict=True):
            gradient.copy_(summed.view_as(gradient))


def apply_activation_checkpointing(model: Transformer, mode: str, by_halves: bool = False) -> None:
    """Recompute activations in the backward pass: `none`, `selective` (hidden activations), or `full` (whole blocks).

    Args:
        by_halves: with `full`, whether the halves of a block are recomputed apart, which stores one tensor more. What is
            recomputed together is compiled if it is one graph; under expert parallelism the second half is not, and only
            its experts are.
    """
    model.set_recompute_hidden(mode == "selective")
    if mode != "full":
        return

    def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if operation in ROUTING_OPS else CheckpointPolicy.PREFER_RECOMPUTE

    # FSDP's hooks on experts record their duration, and a recomputed block does not call as many of them.
    SAC_IGNORED_OPS.update(PROFILER_OPS)
    contexts = partial(create_selective_checkpoint_contexts, policy)

    def checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
        def compute(*args: Any) -> Any:
            return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, preserve_rng_state=False)

        return compute

    for block in model.blocks:
        # Set on the module itself, so that parameter names and the hooks of other wrappers are unchanged; a function of its
        # own, because the compiler does not look into a `partial` of `checkpoint`.
        for name in ("add_attention", "add_ffn") if by_halves else ("forward",):
            setattr(block, name, checkpointed(getattr(block, name)))


def _compile_blocks(model: Transformer, experts_apart: bool) -> None:
    """Compile each block by itself, and apart from it the experts of blocks whose second half is recomputed as no graph.

    Of experts the function is compiled and not the module, whose hooks by FSDP stay outside. Their rows are of a dynamic
    number from the first, because a recomputed pass must run the same code.
    """
    model.compiled_blocks = True
    for block in model.blocks:
        block.compile()
        if experts_apart and isinstance(block.ffn, MoELayer):
            for part in filter(None, (block.ffn.experts, block.ffn.shared)):
                part.forward = torch.compile(part.forward, dynamic=True)


def apply_fsdp(
    model: Transformer,
    dims: ParallelDims,
    config: ParallelConfig,
    expert_mesh: DeviceMesh,
    dense_mesh: DeviceMesh,
    dtype: torch.dtype,
) -> None:
    """Shard or replicate parameters; gradients are summed, because the shares of the objective add up."""
    param_dtype = dtype if config.param_dtype == "auto" else _DTYPES[config.param_dtype]

    def shard(module: nn.Module, mesh: DeviceMesh, dtype: torch.dtype, **options: Any) -> None:
        policy = MixedPrecisionPolicy(dtype, _DTYPES[config.reduce_dtype], cast_forward_inputs=False)
        reshard = config.reshard_after_forward and mesh.size(1) > 1
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard, **options)

    # Outputs of the modules contain views; nothing modifies them in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
    unshared = {parameter for layer in _moe_layers(model) for parameter in layer.router.parameters()}
    for block in model.blocks:
        if isinstance(block.ffn, MoELayer):
            if dims.ep > 1 and dims.dp_replicate * dims.dp_shard > 1:
                # Along dimension 1, because expert parallelism shards dimension 0.
                mesh = expert_mesh["dp_replicate", "dp_shard"]
                shard(block.ffn.experts, mesh, param_dtype, shard_placement_fn=lambda _: Shard(1))
            elif dims.ep > 1:
                unshared |= set(block.ffn.experts.parameters())  # held by one process, whose gradient is complete
        placement = partial(_even_shard, dense_mesh.size(1))
        shard(block, dense_mesh, param_dtype, ignored_params=unshared, shard_placement_fn=placement)
    shard(model, dense_mesh, torch.float32, ignored_params=unshared)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    if dims.ep > 1:
        _prefetch_next_block(model)


def _prefetch_next_block(model: Transformer) -> None:
    """Gather each block's weights while the block before it computes.

    FSDP starts a block's gather when the host gets there, which is early enough if the host is ahead of the GPU. With
    expert parallelism the host waits in every layer for the numbers of rows, so the next gather would not have started.
    """
    for module, block in zip([model, *model.blocks], model.blocks, strict=False):
        parts = [block, block.ffn.experts] if isinstance(block.ffn, MoELayer) else [block]
        assert isinstance(module, FSDPModule)
        module.set_modules_to_forward_prefetch([part for part in parts if isinstance(part, FSDPModule)])


def set_gradient_sync(model: nn.Module, sync: bool, dims: ParallelDims) -> None:
    """Set whether the next backward pass sums gradients over processes; replicas can wait for the last micro-batch."""
    if isinstance(model, FSDPModule) and not dims.is_sharded:
        model.set_requires_gradient_sync(sync)


def _even_shard(shards: int, weight: nn.Parameter) -> Shard:
    return Shard(stack_shard_dim(weight.shape[0], weight.shape[1], shards) if weight.dim() == 3 else 0)


def _moe_layers(model: Transformer) -> list[MoELayer]:
    return [block.ffn for block in model.blocks if isinstance(block.ffn, MoELayer)]
