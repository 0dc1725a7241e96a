"""Text token by token with the experts that each token visits: for `sample --show-experts`.

Generation itself does not tell: the finished text is read once more, which in a causal model routes it the same way.

Shapes: T positions, K choices per token.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.text import Text

from moelm.analysis.routing.layers import layer_number
from moelm.analysis.routing.palette import expert_colours, ink_on
from moelm.data.tokenizer import Tokenizer
from moelm.generate import Sampling, encode_prompts, write_rows
from moelm.model import Transformer

_OF_SIXTEEN = (11, 14, 10, 13, 9, 12, 7, 8, 3, 6, 2, 5, 1)
"""Colours of the oldest terminals that black is read on."""


class Visit(NamedTuple):
    """One token of a text, and what reads it."""

    token: int
    text: str
    """Its part of the text; empty where it holds but the beginning of a character, or stands after a stop string."""
    experts: list[int]
    """Best first."""


class Sampled(NamedTuple):
    """A continuation whose tokens' texts add up to it."""

    prompt: str
    text: str
    layer: int
    visits: list[Visit]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**self._asdict(), "visits": [visit._asdict() for visit in self.visits]}


def sample_visits(
    model: Transformer, tokenizer: Tokenizer, prompts: Sequence[str], sampling: Sampling, layer: str
) -> list[Sampled]:
    """Continue prompts and tell the experts of one layer that each new token visits when it is read.

    Raises:
        MoelmError: what `generate_text` raises, or a layer that is not sparse.
    """
    number = layer_number(model.config, layer)
    rows = encode_prompts(tokenizer, prompts)
    found = []
    for prompt, row, writing in zip(prompts, rows, write_rows(model, tokenizer, rows, sampling), strict=True):
        experts_TK = read(model, [*row, *writing.ids])[number][len(row) :]
        texts = cut(tokenizer, row[-1], writing.ids, writing.text)
        visits = [Visit(*each) for each in zip(writing.ids, texts, experts_TK, strict=True)]
        found.append(Sampled(prompt, writing.text, number, visits))
    return found


@torch.inference_mode()
def read(model: Transformer, ids: Sequence[int]) -> dict[int, list[list[int]]]:
    """The experts that each token of one text visits, best first, by the number of the layer."""
    tokens_BT = torch.tensor([ids], device=model.embedding.weight.device)
    routings = model(tokens_BT, last_only=True).routings
    return {layer: routing.experts_NK.tolist() for layer, routing in sorted(routings.items())}


def cut(tokenizer: Tokenizer, before: int, ids: Sequence[int], text: str) -> list[str]:
    """Cut the text of tokens into each token's part; together they are the text.

    A character in several tokens goes to the last of them.

    Args:
        before: the token before, for tokenizers whose words open with a space.
        text: of the tokens, or its beginning.
    """
    start = len(tokenizer.decode([before]))
    ends = [0]
    for count in range(1, len(ids) + 1):
        # What is half a character so far, and decodes to a mark, is no beginning of the text.
        so_far = tokenizer.decode([before, *ids[:count]])[start:]
        differing = (i for i, (a, b) in enumerate(zip(so_far, text, strict=False)) if a != b)
        ends.append(max(ends[-1], next(differing, min(len(so_far), len(text)))))
    if ids:
        ends[-1] = len(text)
    return [text[first:end] for first, end in pairwise(ends)]


def render_visits(console: Console, samples: Sequence[Sampled], num_experts: int) -> None:
    """Show samples: in colours where the terminal has them, else as text with a list of tokens after it."""
    for number, sample in enumerate(samples):
        if len(samples) > 1:
            print(f"--- {number}", file=console.file)
        if console.color_system is not None and not console.no_color:
            for painted in _painted(sample, _styles(console, num_experts)):
                console.print(painted, soft_wrap=True)
        else:
            for line in _listed(sample):
                print(line, file=console.file)  # the console would make spaces of a tab


def _styles(console: Console, num_experts: int) -> list[str]:
    if console.color_system == "standard":  # sixteen colours, among which ours would fall together
        return [f"black on color({_OF_SIXTEEN[e % len(_OF_SIXTEEN)]})" for e in range(num_experts)]
    return [f"{ink_on(colour)} on {colour}" for colour in expert_colours(num_experts)]


def _painted(sample: Sampled, styles: Sequence[str]) -> Iterator[Text]:
    yield Text(sample.prompt).append_tokens((visit.text, styles[visit.experts[0]]) for visit in sample.visits)
    legend = Text(f"\nfirst experts in layer {sample.layer}, and of how many tokens:")
    for expert, tokens in sorted(Counter(visit.experts[0] for visit in sample.visits).items()):
        legend.append(" ").append(f" {expert} ", styles[expert]).append(f" {tokens}")
    yield legend


def _listed(sample: Sampled) -> Iterator[str]:
    """The text, then a line a token: its experts, a tab, its part of the text in JSON."""
    yield sample.prompt + sample.text
    yield f"--- experts in layer {sample.layer}, the first one first, and the token"
    for visit in sample.visits:
        yield f"{' '.join(map(str, visit.experts))}\t{json.dumps(visit.text, ensure_ascii=False)}"
