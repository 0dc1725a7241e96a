"""The timed models, moelm's and Hugging Face's, with random weights, and their training losses."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from moelm.config import ModelConfig, MoEFFNConfig, OptimConfig, RunConfig
from moelm.data.loader import Batch
from moelm.distributed.parallelize import apply_activation_checkpointing
from moelm.distributed.ranks import copy_to_host
from moelm.hardware import should_compile
from moelm.huggingface.config_json import to_hf_config
from moelm.model import Routing, Transformer, build_model
from moelm.model.forward import autocast, forward_batch
from moelm.model.moe.balance import map_layer_sums
from moelm.model.moe.router import Router
from moelm.plan.counts import assumed_vocab_size
from moelm.train.objective import layer_sums, micro_batch_loss
from moelm.train.optimizer import build_optimizer
from moelm.train.routing_metrics import routing_metrics

LossFunction = Callable[[], Tensor]
UpdateFunction = Callable[[], None]


def resolve_model(config: RunConfig) -> ModelConfig:
    """The model's config with its context length and a vocabulary size."""
    return config.model.model_copy(update={"vocab_size": assumed_vocab_size(config), "max_seq_len": config.max_seq_len})


def random_batch(config: RunConfig) -> Batch:
    """A batch of uniformly random tokens."""
    generator = torch.Generator().manual_seed(0)
    vocab_size = resolve_model(config).vocab_size or 0
    rows = torch.randint(0, vocab_size, (config.batch_rows, config.data.seq_len + 1), generator=generator)
    return Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), torch.zeros_like(rows[:, 1:]))


def build_own(config: RunConfig, balanced: bool = False) -> Transformer:
    """moelm's model.

    Args:
        balanced: whether tokens select experts by turns instead of the router's choices.
    """
    model = build_model(resolve_model(config), config.seed)
    if balanced:
        for router in (module for module in model.modules() if isinstance(module, Router)):
            router.register_forward_hook(_select_by_turns)
    apply_activation_checkpointing(model, config.parallel.activation_checkpointing)
    return model


def _select_by_turns(router: nn.Module, inputs: tuple[Any, ...], routing: Routing) -> Routing:
    """The same gates for other experts: the first k for the first token, the next k for the next, and so on."""
    choices = torch.arange(routing.experts_NK.numel(), device=routing.experts_NK.device) % routing.num_experts
    return routing._replace(experts_NK=choices.view_as(routing.experts_NK))


def own_loss(model: Transformer, config: RunConfig, batch: Batch, dtype: torch.dtype) -> LossFunction:
    """moelm's training loss on a batch, including balance losses."""
    compiled = should_compile(config.parallel.compile, batch.tokens_BT.device)
    forward = torch.compile(model) if compiled else model
    objective = torch.compile(micro_batch_loss) if compiled else micro_batch_loss
    num_tokens = batch.valid_N.sum().double()
    balance = config.model.ffn.balance if isinstance(config.model.ffn, MoEFFNConfig) else None

    def loss() -> Tensor:
        output = forward_batch(forward, batch, dtype, losses=True)
        return objective(output, batch, None, num_tokens, balance).total

    return loss


def load_max_over_mean(model: Transformer, batch: Batch, dtype: torch.dtype) -> float | None:
    """Load of the most loaded expert, relative to the mean, averaged over layers; None for a dense model."""
    with torch.no_grad():
        routings = forward_batch(model, batch, dtype, losses=True).routings
    if not routings:
        return None
    load: float = routing_metrics(map_layer_sums(layer_sums(routings, batch), copy_to_host))["moe/load_max_over_mean"]
    return load


def own_update(model: Transformer, config: OptimConfig, dtype: torch.dtype) -> UpdateFunction:
    """moelm's update with the gradients of a backward pass, gradient clipping included."""
    optimizer = build_optimizer(model, config, dtype)
    optimizer.set_lr(config.lr)

    def update() -> None:
        optimizer.step(squares=optimizer.gradient_squares().tolist())
        optimizer.zero_grad()

    return update


def build_peer(config: RunConfig, max_positions: int, train: bool) -> nn.Module:
    """Hugging Face's model of the same shape.

    Args:
        max_positions: longest context.
        train: whether the loss includes its balance loss, with which the library cannot generate.
    """
    transformers: Any = import_module("transformers")
    settings = to_hf_config(resolve_model(config)) | {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
    settings["max_position_embeddings"] = max_positions
    if isinstance(config.model.ffn, MoEFFNConfig):
        settings["output_router_logits"] = train
    hf_config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.manual_seed(config.seed)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(hf_config)
    return model


def peer_loss(model: nn.Module, batch: Batch, dtype: torch.dtype) -> LossFunction:
    """The library's own training loss on a batch."""

    def loss() -> Tensor:
        with autocast(batch.tokens_BT.device, dtype):
            value: Tensor = model(input_ids=batch.tokens_BT, labels=batch.tokens_BT, use_cache=False).loss
        return value

    return loss


def peer_update(model: nn.Module, config: OptimConfig) -> UpdateFunction:
    """Gradient clipping and fused AdamW, as torch has them."""
    optimizer = torch.optim.AdamW(
        model.parameters(), config.lr, (config.beta1, config.beta2), config.eps, config.weight_decay, fused=True
    )

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad()

    return update
