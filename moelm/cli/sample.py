"""`moelm sample`."""

import io
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from moelm.cli.options import AsJson, Checkpoint, RunOrModel, print_json
from moelm.report.palette import expert_colors, text_color_on

if TYPE_CHECKING:
    from moelm.analyze.token_experts import SampleWithExperts

ANSI_BACKGROUNDS = (11, 14, 10, 13, 9, 12, 7, 8, 3, 6, 2, 5, 1)
"""Of the 16 ANSI colors, those on which black text is readable."""


def sample(
    run: RunOrModel,
    prompt: Annotated[list[str] | None, typer.Option(help="May be repeated; `-` or none reads stdin.")] = None,
    max_new_tokens: Annotated[int, typer.Option()] = 128,
    temperature: Annotated[float, typer.Option(help="From 0, which takes the most likely token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Keep the k most likely tokens, from 1.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep the most likely tokens up to this total (0 to 1).")] = None,
    min_p: Annotated[float | None, typer.Option(help="Drop tokens below this fraction of the best (0 to 1).")] = None,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 discourages repeats.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="Stop at this text; may be repeated.")] = None,
    seed: Annotated[int, typer.Option(help="From -2^63 to 2^64-1.")] = 0,
    show_experts: Annotated[
        str | None,
        typer.Option(
            metavar="[=LAYER]",
            help="Color each new token by its first expert in this layer: its number, first, middle or last (default).",
        ),
    ] = None,
    checkpoint: Checkpoint = "last",
    as_json: AsJson = False,
) -> None:
    """Continue one or more prompts."""
    from moelm.data.tokenizer import check_unicode
    from moelm.hardware import pick_device
    from moelm.huggingface.opening import load_model
    from moelm.inference.generate import Sampling, check_sampling, generate_text

    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, tuple(stop or ()), seed)
    check_sampling(sampling)
    prompts = [_read_stdin() if text == "-" else text for text in prompt or ["-"]]
    for text in (*prompts, *sampling.stop):
        check_unicode(text)
    model, tokenizer, config = load_model(run, checkpoint, pick_device())
    if show_experts is not None:
        from moelm.analyze.layers import sparse_ffn
        from moelm.analyze.token_experts import sample_with_experts

        samples = sample_with_experts(model, tokenizer, prompts, sampling, show_experts)
        if as_json:
            print_json({"schema": 2, "run": run, "samples": [each.as_dict() for each in samples]})
        else:
            print_samples(Console(highlight=False), samples, sparse_ffn(config.model).num_experts)
        return
    stream = None if as_json or len(prompts) > 1 else _Stream(prompts[0])
    texts = generate_text(model, tokenizer, prompts, sampling, stream)
    if as_json:
        print_json({"run": run, "samples": [{"prompt": p, "text": t} for p, t in zip(prompts, texts, strict=True)]})
    elif stream is not None:
        typer.echo(stream.prompt)
    else:
        for number, (text_in, text_out) in enumerate(zip(prompts, texts, strict=True)):
            typer.echo(f"--- {number}\n{text_in}{text_out}")


def _read_stdin() -> str:
    """All of stdin; bytes that are not UTF-8 become surrogates, as in arguments."""
    data = b"" if sys.stdin is None else sys.stdin.buffer.read()
    return io.TextIOWrapper(io.BytesIO(data), "utf-8", errors="surrogateescape").read()


class _Stream:
    """Prints a continuation piece by piece, the prompt with the first one, so that a refused prompt prints nothing."""

    def __init__(self, prompt: str) -> None:
        self.prompt = prompt
        """Not printed yet."""

    def __call__(self, text: str) -> None:
        typer.echo(self.prompt + text, nl=False)
        sys.stdout.flush()
        self.prompt = ""


def print_samples(console: Console, samples: "Sequence[SampleWithExperts]", num_experts: int) -> None:
    """Print samples with the experts of their tokens: as colors, or without colors as a list below each text."""
    for number, sample in enumerate(samples):
        if len(samples) > 1:
            print(f"--- {number}", file=console.file)
        if console.color_system is not None and not console.no_color:
            for text in _colored(sample, _expert_styles(console, num_experts)):
                console.print(text, soft_wrap=True)
        else:
            for line in _listed(sample):
                print(line, file=console.file)  # console.print would expand tabs


def _expert_styles(console: Console, num_experts: int) -> list[str]:
    if console.color_system == "standard":  # with 16 colors, different experts' colors would become equal
        colors = [f"color({ANSI_BACKGROUNDS[e % len(ANSI_BACKGROUNDS)]})" for e in range(num_experts)]
        return [f"black on {color}" for color in colors]
    return [f"{text_color_on(color)} on {color}" for color in expert_colors(num_experts)]


def _colored(sample: "SampleWithExperts", styles: Sequence[str]) -> Iterator[Text]:
    """The text with each new token in its first expert's color, and a legend."""
    yield Text(sample.prompt).append_tokens((token.text, styles[token.experts[0]]) for token in sample.tokens)
    legend = Text(f"\nfirst experts in layer {sample.layer}, with their numbers of tokens:")
    for expert, count in sorted(Counter(token.experts[0] for token in sample.tokens).items()):
        legend.append(" ").append(f" {expert} ", styles[expert]).append(f" {count}")
    yield legend


def _listed(sample: "SampleWithExperts") -> Iterator[str]:
    """The text, then a line for each new token: its experts, a tab, and its text in JSON."""
    yield sample.prompt + sample.text
    yield f"--- experts in layer {sample.layer}, best first, and the token"
    for token in sample.tokens:
        yield f"{' '.join(map(str, token.experts))}\t{json.dumps(token.text, ensure_ascii=False)}"
