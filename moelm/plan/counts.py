"""Parameter and FLOP totals of a whole run."""

from typing import Any

from moelm.config import RunConfig
from moelm.model.flops import count_flops, count_layer, count_parameters
from moelm.plan.strategy import BF16_BYTES
from moelm.plan.update import update_flops

BYTE_VOCABULARY = 258
"""Tokens of a tokenizer of kind `byte`: 256 bytes and 2 special tokens."""


def assumed_vocab_size(config: RunConfig) -> int:
    """The model's vocabulary size, or the tokenizer's; that of a `bpe` where a text or file determines it."""
    tokenizer = config.data.tokenizer
    return config.model.vocab_size or (BYTE_VOCABULARY if tokenizer.kind == "byte" else tokenizer.vocab_size)


def count_model(config: RunConfig) -> tuple[dict[str, Any], RunConfig]:
    """Count the parameters, FLOPs and training tokens of a config.

    Returns:
        The counts as plain values, and the config with a vocabulary size.
    """
    model = config.model.model_copy(update={"vocab_size": assumed_vocab_size(config)})
    resolved = config.model_copy(update={"model": model})
    parameters, flops = count_parameters(model), count_flops(model, config.data.seq_len)
    tokens = config.train.steps * config.train.batch_tokens
    counts = {
        "name": config.name,
        "parameters_total": parameters.total,
        "parameters_active": parameters.active,
        "parameters_embedding": parameters.embedding,
        "weight_bytes_bf16": BF16_BYTES * parameters.total,
        "largest_layer_bytes_bf16": BF16_BYTES * max(count_layer(model, i).total for i in range(model.num_unique_layers)),
        "flops_per_token_forward": flops.forward,
        "flops_per_token_backward": flops.backward,
        "tokens": tokens,
        "training_flops": tokens * flops.training,
        "optimizer_flops_per_step": update_flops(resolved),
    }
    return counts, resolved
