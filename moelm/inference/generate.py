"""Text generation: prompts are read in one pass, then one token is generated at a time with a key/value cache.

Shapes: B prompts, T positions, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moelm.config import MoEFFNConfig
from moelm.console import warn
from moelm.data.tokenizer import Tokenizer
from moelm.errors import MoelmError
from moelm.inference.continuation import Continuation
from moelm.inference.cpu_decoder import build_decoder
from moelm.model import KVCache, Transformer

PREFILL_TOKENS = 512
"""Prompt positions in one forward pass, to bound the memory of long prompts."""
GREEDY_BELOW = 1e-12
"""Temperatures below it take the most likely token, as 0 does: dividing by them could exceed the range of float32."""
MAX_TEMPERATURE = 1e6
"""At which all tokens are equally likely in float32, more or less."""
PENALTIES = (0.01, 100.0)
"""Smallest and largest accepted repetition penalty."""
SEEDS = (-(2**63), 2**64 - 1)
"""Smallest and largest seed of torch's generators."""


class Sampling(NamedTuple):
    """How tokens are sampled, and where a text stops."""

    max_new_tokens: int = 128
    temperature: float = 0.8
    """0 takes the most likely token."""
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    """Divides the positive logits of tokens that occurred before and multiplies the negative ones (Keskar et al. 2019)."""
    stop: tuple[str, ...] = ()
    """Texts that end a continuation."""
    seed: int = 0


def check_sampling(sampling: Sampling) -> None:
    """Refuse settings with which no token or no text can be chosen.

    Raises:
        MoelmError: with the setting and what is accepted.
    """
    inf = float("inf")
    ranges: dict[str, tuple[float, float, str]] = {
        "max_new_tokens": (1, inf, "a whole number from 1"),
        "temperature": (0, MAX_TEMPERATURE, f"a number from 0 to {MAX_TEMPERATURE:g}"),
        "top_k": (1, inf, "a whole number from 1"),
        "top_p": (0, 1, "a number from 0 to 1"),
        "min_p": (0, 1, "a number from 0 to 1"),
        "repetition_penalty": (*PENALTIES, f"a number from {PENALTIES[0]:g} to {PENALTIES[1]:g}"),
        "seed": (*SEEDS, "a whole number from -2^63 to 2^64-1"),
    }
    for name, (smallest, largest, accepted) in ranges.items():
        value = getattr(sampling, name)
        if value is not None and not smallest <= value <= largest:
            raise MoelmError(f"{name} is {value}; {accepted} is expected.")
    if not all(sampling.stop):
        raise MoelmError("A stop text is empty; a text at which to stop is expected.")


def generate_text(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sampling: Sampling,
    stream: Callable[[str], None] | None = None,
) -> list[str]:
    """Continue a batch of prompts.

    Args:
        stream: receives the continuation piece by piece, if there is only one prompt.

    Returns:
        The continuations, without the prompts, each up to its first stop text.

    Raises:
        MoelmError: an empty prompt, unknown characters, or more tokens than the model's context.
    """
    rows = encode_prompts(tokenizer, prompts)
    continuations = generate_rows(model, tokenizer, rows, sampling, stream if len(rows) == 1 else None)
    return [continuation.text for continuation in continuations]


def encode_prompts(tokenizer: Tokenizer, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of prompts, each with the start token.

    Raises:
        MoelmError: an empty prompt, or unknown characters.
    """
    if not all(prompts):
        raise MoelmError("The prompt is empty; a text to continue is expected.")
    rows = [tokenizer.encode_prompt(prompt) for prompt in prompts]
    _, unknown, lost = tokenizer.count_losses(list(prompts), [row[1:] for row in rows])
    if unknown or lost:
        warn(f"the tokenizer reads {unknown} characters of the prompt as unknown, and drops or changes {lost}.")
    return rows


def generate_rows(
    model: Transformer,
    tokenizer: Tokenizer,
    rows: Sequence[Sequence[int]],
    sampling: Sampling,
    stream: Callable[[str], None] | None = None,
) -> list[Continuation]:
    """Continue a batch of prompts that are token ids.

    Args:
        rows: token ids of each prompt.
        stream: receives the text of every continuation piece by piece.

    Returns:
        The finished continuations, with their texts and tokens.
    """
    check_sampling(sampling)
    continuations = [Continuation(tokenizer, row, sampling.stop, stream) for row in rows]
    for tokens_B in generate_tokens(model, rows, sampling, tokenizer.eos_id):
        for continuation, token in zip(continuations, tokens_B, strict=True):
            continuation.add(token)
        if all(continuation.done for continuation in continuations):
            break
    for continuation in continuations:
        continuation.finish()
    return continuations


def generate_tokens(
    model: Transformer, prompts: Sequence[Sequence[int]], sampling: Sampling, pad_id: int
) -> Iterator[list[int]]:
    """Yield the next token of every prompt, step by step.

    Args:
        prompts: token ids; shorter prompts are padded on the left.
        pad_id: the padding token.

    Raises:
        MoelmError: expert-choice routing, or more tokens than the model's context.
    """
    config = model.config
    if isinstance(config.ffn, MoEFFNConfig) and config.ffn.router.kind == "expert_choice":
        raise MoelmError(
            "This model's experts choose among the tokens of a whole sequence (router.kind is expert_choice), "
            "so it cannot generate token by token; another router can."
        )
    device = model.embedding.weight.device
    longest = max(map(len, prompts))
    capacity = longest + sampling.max_new_tokens
    limit = config.max_seq_len
    if limit is not None and capacity > limit and config.window is None:
        raise MoelmError(
            f"The prompt of {longest} tokens and {sampling.max_new_tokens} new ones are more than the model's context of "
            f"{limit}; at most {max(0, limit - longest)} new tokens fit (a model with model.window set has no limit)."
        )
    tokens_BT = torch.tensor([[pad_id] * (longest - len(row)) + list(row) for row in prompts], device=device)
    ragged = any(len(row) < longest for row in prompts)
    starts_B = torch.tensor([longest - len(row) for row in prompts], device=device) if ragged else None
    cache = KVCache(config, len(prompts), capacity, device, starts_B)
    generator = torch.Generator(device).manual_seed(sampling.seed)
    seen_BV = torch.zeros(len(prompts), model.embedding.num_embeddings, dtype=torch.bool, device=device)
    for row, ids in enumerate(prompts):
        seen_BV[row, list(ids)] = True
    with torch.inference_mode():
        for chunk_BT in torch.split(tokens_BT, PREFILL_TOKENS, dim=1):
            logits_BV = model(chunk_BT, cache=cache, last_only=True).logits[:, -1]
    decode: Callable[[Tensor], Tensor] | None = None
    for remaining in reversed(range(sampling.max_new_tokens)):
        with torch.inference_mode():
            tokens_B = sample_token(logits_BV.float(), seen_BV, sampling, generator)
            seen_BV.scatter_(1, tokens_B[:, None], True)
        yield tokens_B.tolist()
        if remaining:
            with torch.inference_mode():
                decode = decode or _decode_function(model, cache)
                logits_BV = decode(tokens_B)


def _decode_function(model: Transformer, cache: KVCache) -> Callable[[Tensor], Tensor]:
    """A function from the newest token of each prompt `(B)` to the next logits `(B, V)`; it extends the cache."""
    if model.embedding.weight.device.type == "cpu":
        return build_decoder(model, cache)

    def decode(tokens_B: Tensor) -> Tensor:
        logits_BTV: Tensor = model(tokens_B[:, None], cache=cache).logits
        return logits_BTV[:, -1]

    return decode


def sample_token(logits_BV: Tensor, seen_BV: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Sample one token per prompt, after repetition penalty, temperature, top-k, top-p and min-p, in this order.

    Args:
        logits_BV: float32.
        seen_BV: whether a token occurred in the prompt or in its continuation.

    Returns:
        Token ids `(B)`.
    """
    if sampling.repetition_penalty != 1.0:
        penalty = sampling.repetition_penalty
        penalized_BV = torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
        logits_BV = torch.where(seen_BV, penalized_BV, logits_BV)
    if sampling.temperature < GREEDY_BELOW:
        return logits_BV.argmax(dim=-1)
    probs_BV = (logits_BV / sampling.temperature).softmax(dim=-1)
    if sampling.top_k is None and sampling.top_p is None and sampling.min_p is None:
        return torch.multinomial(probs_BV, 1, generator=generator)[:, 0]
    sorted_BV, order_BV = probs_BV.sort(dim=-1, descending=True, stable=True)
    if sampling.top_k is not None:
        sorted_BV[:, min(sampling.top_k, sorted_BV.shape[1]) :] = 0
    if sampling.top_p is not None:
        # The token that reaches top_p stays: the sum of the tokens before it is what is compared.
        before_BV = sorted_BV.cumsum(dim=-1) - sorted_BV
        sorted_BV[:, 1:] = sorted_BV[:, 1:].masked_fill(before_BV[:, 1:] >= sampling.top_p, 0)
    if sampling.min_p is not None:
        sorted_BV = sorted_BV.masked_fill(sorted_BV < sampling.min_p * sorted_BV[:, :1], 0)
    sampled_B = torch.multinomial(sorted_BV, 1, generator=generator)
    return order_BV.gather(1, sampled_B)[:, 0]
