"""Continue prompts: prefill once, then one token at a time against a key/value cache.

Shapes: B prompts, T positions, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moelm.config import MoEFFNConfig
from moelm.data.tokenizer import Tokenizer
from moelm.errors import MoelmError
from moelm.model import KVCache, Transformer
from moelm.model.decoding import build_decoder

PREFILL = 512
"""Prompt positions read at once, to bound the memory of long prompts."""


class Sampling(NamedTuple):
    """How the next token is drawn."""

    max_new_tokens: int = 128
    temperature: float = 0.8
    """0 takes the likeliest token."""
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    """Divides the positive logits of tokens seen so far and multiplies the negative ones (Keskar et al. 2019)."""
    stop: tuple[str, ...] = ()
    seed: int = 0


def generate_text(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sampling: Sampling,
    stream: Callable[[str], None] | None = None,
) -> list[str]:
    """Continuations of a batch of prompts, each without its prompt and cut before a stop string.

    Args:
        stream: receives the text of a single prompt's continuation piece by piece.

    Raises:
        MoelmError: an empty prompt, characters never seen, or a context longer than the model's.
    """
    rows = encode_prompts(tokenizer, prompts)
    return continue_rows(model, tokenizer, rows, sampling, stream if len(rows) == 1 else None)


def encode_prompts(tokenizer: Tokenizer, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of prompts.

    Raises:
        MoelmError: an empty prompt, or characters never seen.
    """
    if not all(prompts):
        raise MoelmError("The prompt is empty; give some text to go on from.")
    return [tokenizer.encode_prompt(prompt) for prompt in prompts]


def continue_rows(
    model: Transformer,
    tokenizer: Tokenizer,
    rows: Sequence[Sequence[int]],
    sampling: Sampling,
    stream: Callable[[str], None] | None = None,
) -> list[str]:
    """The same for prompts that are token ids already."""
    return [writing.text for writing in write_rows(model, tokenizer, rows, sampling, stream)]


def write_rows(
    model: Transformer,
    tokenizer: Tokenizer,
    rows: Sequence[Sequence[int]],
    sampling: Sampling,
    stream: Callable[[str], None] | None = None,
) -> list["Writing"]:
    """The same with the tokens that the texts are made of."""
    written = [Writing(tokenizer, sampling, stream, row[-1]) for row in rows]
    for tokens_B in generate_tokens(model, rows, sampling, tokenizer.eos_id):
        for writing, token in zip(written, tokens_B, strict=True):
            writing.add(token)
        if all(writing.done for writing in written):
            break
    for writing in written:
        writing.finish()
    return written


class Writing:
    """The growing text of one continuation.

    Args:
        before: the prompt's last token; tokenizers whose words open with a space leave it out where a text begins.
    """

    def __init__(self, tokenizer: Tokenizer, sampling: Sampling, stream: Callable[[str], None] | None, before: int) -> None:
        self.tokenizer, self.stops, self.stream = tokenizer, sampling.stop, stream
        self.before, self.start = before, len(tokenizer.decode([before]))
        self.ids: list[int] = []
        self.text = ""
        self.shown = 0
        self.done = False

    def add(self, token: int) -> None:
        """Take in one more token, unless the text has ended."""
        if self.done:
            return
        if token == self.tokenizer.eos_id:
            self.done = True
            return
        self.ids.append(token)
        self.text = self.tokenizer.decode([self.before, *self.ids])[self.start :]
        ends = [place for stop in self.stops if (place := self.text.find(stop)) >= 0]
        if ends:
            self.text, self.done = self.text[: min(ends)], True
        self._show(held=0 if self.done else max(map(len, self.stops), default=1) - 1)

    def finish(self) -> str:
        """The whole text; what was held back is shown, half a character too."""
        self._show(held=0, whole=True)
        return self.text

    def _show(self, held: int, whole: bool = False) -> None:
        """Stream what can no longer change: not half a character, nor what may become a stop string."""
        end = len(self.text) - held
        if self.stream is not None and end > self.shown and (whole or not self.text.endswith("\ufffd")):
            self.stream(self.text[self.shown : end])
            self.shown = end


def generate_tokens(
    model: Transformer, prompts: Sequence[Sequence[int]], sampling: Sampling, pad_id: int
) -> Iterator[list[int]]:
    """Yield the next token of every prompt, step by step; prompts of different lengths are padded on the left."""
    config = model.config
    if isinstance(config.ffn, MoEFFNConfig) and config.ffn.router.kind == "expert_choice":
        raise MoelmError(
            "This model's experts choose among the tokens of a whole sequence (router.kind is expert_choice), "
            "so it cannot go on token by token; another router can."
        )
    device = model.embedding.weight.device
    longest = max(map(len, prompts))
    capacity = longest + sampling.max_new_tokens
    limit = config.max_seq_len
    if limit is not None and capacity > limit and config.window is None:
        raise MoelmError(
            f"The prompt of {longest} tokens and {sampling.max_new_tokens} new ones are more than the model's context of "
            f"{limit}; at most {max(0, limit - longest)} new tokens fit (a model with model.window set can slide on)."
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
        for part_BT in torch.split(tokens_BT, PREFILL, dim=1):
            logits_BV = model(part_BT, cache=cache, last_only=True).logits[:, -1]
    step: Callable[[Tensor], Tensor] | None = None
    for left in reversed(range(sampling.max_new_tokens)):
        with torch.inference_mode():
            tokens_B = draw(logits_BV.float(), seen_BV, sampling, generator)
            seen_BV.scatter_(1, tokens_B[:, None], True)
        yield tokens_B.tolist()
        if left:
            with torch.inference_mode():
                step = step or _stepper(model, cache)
                logits_BV = step(tokens_B)


def _stepper(model: Transformer, cache: KVCache) -> Callable[[Tensor], Tensor]:
    if model.embedding.weight.device.type == "cpu":
        return build_decoder(model, cache)

    def step(tokens_B: Tensor) -> Tensor:
        logits_BTV: Tensor = model(tokens_B[:, None], cache=cache).logits
        return logits_BTV[:, -1]

    return step


def draw(logits_BV: Tensor, seen_BV: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """One token per row: penalise repeats, then temperature, then the top-k, top-p and min-p cuts, then draw."""
    if sampling.repetition_penalty != 1.0:
        penalty = sampling.repetition_penalty
        penalised_BV = torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
        logits_BV = torch.where(seen_BV, penalised_BV, logits_BV)
    if sampling.temperature == 0:
        return logits_BV.argmax(dim=-1)
    probs_BV = (logits_BV / sampling.temperature).softmax(dim=-1)
    if sampling.top_k is None and sampling.top_p is None and sampling.min_p is None:
        return torch.multinomial(probs_BV, 1, generator=generator)[:, 0]
    sorted_BV, order_BV = probs_BV.sort(dim=-1, descending=True, stable=True)
    if sampling.top_k is not None:
        sorted_BV[:, sampling.top_k :] = 0
    if sampling.top_p is not None:
        # The token that reaches the total stays: what counts is the sum before it.
        before_BV = sorted_BV.cumsum(dim=-1) - sorted_BV
        sorted_BV[:, 1:] = sorted_BV[:, 1:].masked_fill(before_BV[:, 1:] >= sampling.top_p, 0)
    if sampling.min_p is not None:
        sorted_BV = sorted_BV.masked_fill(sorted_BV < sampling.min_p * sorted_BV[:, :1], 0)
    drawn_B = torch.multinomial(sorted_BV, 1, generator=generator)
    return order_BV.gather(1, drawn_B)[:, 0]
