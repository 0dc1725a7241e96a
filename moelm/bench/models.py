"""Models to time, ours and Hugging Face's, with random weights of the same shapes."""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from moelm.config import ModelConfig, MoEFFNConfig, RunConfig
from moelm.data.loader import Batch
from moelm.distributed.parallelize import checkpoint_activations
from moelm.hardware import compiles
from moelm.interop.architectures import write_settings
from moelm.model import Transformer, build_model
from moelm.train.objective import part_loss

Loss = Callable[[], Tensor]


def shape_of(config: RunConfig) -> ModelConfig:
    """The model's shape, its vocabulary taken from the tokenizer's wish where it has none of its own."""
    return config.model.model_copy(
        update={
            "vocab_size": config.model.vocab_size or config.data.tokenizer.vocab_size,
            "max_seq_len": config.max_seq_len,
        }
    )


def random_batch(config: RunConfig) -> Batch:
    """A batch of the config's shape whose tokens are drawn evenly."""
    generator = torch.Generator().manual_seed(0)
    vocab_size = shape_of(config).vocab_size or 0
    rows = torch.randint(0, vocab_size, (config.batch_rows, config.data.seq_len + 1), generator=generator)
    return Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), torch.zeros_like(rows[:, 1:]))


def build_own(config: RunConfig) -> Transformer:
    """Our model."""
    model = build_model(shape_of(config), config.seed)
    checkpoint_activations(model, config.parallel.activation_checkpointing)
    return model


def own_loss(model: Transformer, config: RunConfig, batch: Batch) -> Loss:
    """Our training loss on a batch, balance losses included."""
    compiled = compiles(config.parallel.compile, batch.tokens_BT.device)
    forward = torch.compile(model) if compiled else model
    objective = torch.compile(part_loss) if compiled else part_loss
    tokens = batch.valid_N.sum().double()
    balance = config.model.ffn.balance if isinstance(config.model.ffn, MoEFFNConfig) else None

    def loss() -> Tensor:
        output = forward(batch.tokens_BT, valid_BT=batch.valid_BT, targets_BT=batch.targets_BT)
        return objective(output, batch, None, tokens, balance).total

    return loss


def build_peer(config: RunConfig, positions: int, train: bool) -> nn.Module:
    """The library's model of the same shape (Mixtral, Llama and their like), its weights drawn at random.

    Args:
        positions: longest context that it will see.
        train: whether its balance loss is wanted; in generation the library fails on it.
    """
    transformers: Any = import_module("transformers")
    settings = write_settings(shape_of(config)) | {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
    settings["max_position_embeddings"] = positions
    if isinstance(config.model.ffn, MoEFFNConfig):
        settings["output_router_logits"] = train
    wanted = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.manual_seed(config.seed)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(wanted)
    return model


def peer_loss(model: nn.Module, batch: Batch) -> Loss:
    """The library's own training loss on a batch."""
    return partial(_peer_loss, model, batch)


def _peer_loss(model: nn.Module, batch: Batch) -> Tensor:
    loss: Tensor = model(input_ids=batch.tokens_BT, labels=batch.tokens_BT, use_cache=False).loss
    return loss
