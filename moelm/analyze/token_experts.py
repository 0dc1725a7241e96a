"""Each token of a text with its experts, for `moelm sample --show-experts` and the passages of routing.html.

Shapes: B texts, T positions, K experts per token.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from moelm.analyze.layers import layer_number
from moelm.data.tokenizer import Tokenizer
from moelm.inference.continuation import INCOMPLETE, ContextDecoder
from moelm.inference.generate import Sampling, encode_prompts, generate_rows
from moelm.model import Transformer


class TokenExperts(NamedTuple):
    """One token of a text, and its experts."""

    id: int
    text: str
    """Its part of the text; empty for an incomplete character and after a stop text."""
    experts: list[int]
    """Best first."""


class SampleWithExperts(NamedTuple):
    """A continuation; the texts of its tokens add up to `text`."""

    prompt: str
    text: str
    layer: int
    tokens: list[TokenExperts]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**self._asdict(), "tokens": [token._asdict() for token in self.tokens]}


def sample_with_experts(
    model: Transformer, tokenizer: Tokenizer, prompts: Sequence[str], sampling: Sampling, layer: str
) -> list[SampleWithExperts]:
    """Continue prompts, and find the experts of each new token in one layer.

    The finished text is run through the model once more; a causal model routes it as it did during generation.

    Args:
        layer: `first`, `middle`, `last` or the index of a sparse layer.

    Raises:
        MoelmError: what `generate_text` raises, or there is no such sparse layer.
    """
    number = layer_number(model.config, layer)
    rows = encode_prompts(tokenizer, prompts)
    continuations = generate_rows(model, tokenizer, rows, sampling)
    samples = []
    for prompt, row, continuation in zip(prompts, rows, continuations, strict=True):
        experts_TK = experts_by_layer(model, [*row, *continuation.ids])[number][len(row) :]
        texts = token_texts(tokenizer, row, continuation.ids, continuation.text)
        tokens = [TokenExperts(*each) for each in zip(continuation.ids, texts, experts_TK, strict=True)]
        samples.append(SampleWithExperts(prompt, continuation.text, number, tokens))
    return samples


@torch.inference_mode()
def experts_by_layer(model: Transformer, ids: Sequence[int]) -> dict[int, list[list[int]]]:
    """The experts of each token of one text, best first, by the index of the sparse layer."""
    tokens_BT = torch.tensor([ids], device=model.embedding.weight.device)
    routings = model(tokens_BT, last_only=True).routings
    return {layer: routing.experts_NK.tolist() for layer, routing in sorted(routings.items())}


def token_texts(tokenizer: Tokenizer, context: Sequence[int], ids: Sequence[int], text: str) -> list[str]:
    """Split the text of tokens into the part of each token.

    A character of several tokens belongs to the last of them.

    Args:
        context: the tokens before.
        text: the text that the tokens add to the context, or its beginning.

    Returns:
        A text for each token; together they are `text`.
    """
    decoder = ContextDecoder(tokenizer, context)
    ends = [0]
    for token in ids:
        decoder.add(token)
        # An incomplete character decodes to a replacement character, which differs from the text.
        so_far, end = decoder.text, ends[-1]
        while end < min(len(so_far), len(text)) and so_far[end] == text[end]:
            end += 1
        ends.append(end)
    if ids:
        ends[-1] = len(text)
    return [text[first:end] for first, end in pairwise(ends)]


def token_name(tokenizer: Tokenizer, token: int) -> str:
    """The text of a token inside a text, or its name in the vocabulary if it has no text of its own."""
    decoder = ContextDecoder(tokenizer, tokenizer.encode_batch(["a"])[0])
    decoder.add(token)
    if decoder.text and INCOMPLETE not in decoder.text:
        return decoder.text
    return tokenizer.raw.id_to_token(token) or f"#{token}"
