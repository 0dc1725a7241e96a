"""Hugging Face's models of random weights, imported: the same logits, gradients and continuations, and every bit back."""

import contextlib
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from moelm.config import RunConfig
from moelm.generate import Sampling, generate_tokens
from moelm.interop.architectures import ARCHITECTURES
from moelm.interop.export import export_run
from moelm.interop.importing import import_model
from moelm.interop.places import find_places
from moelm.model import Transformer
from moelm.rundir import load_run
from tests.interop.peers import CASES, build, save, tensors

LENGTHS = (30, 17, 1)
"""Real tokens of the batch's rows; the rest is padding."""


class Pair(NamedTuple):
    """A model of theirs and what it became here."""

    theirs: Any
    ours: Transformer
    config: RunConfig
    folder: Path


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("parity")
    theirs = build(request.param)
    with contextlib.chdir(folder):
        import_model(save(theirs, folder / "theirs"), "imported", ["data.seq_len=64"])
        ours, _, config = load_run("imported")
    return Pair(theirs, ours, config, folder)


def batch() -> tuple[Tensor, Tensor]:
    """Tokens padded on the right, and which of them are real."""
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(0, 256, (len(LENGTHS), max(LENGTHS)), generator=generator)
    return tokens_BT, torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]


def test_logits_agree(pair: Pair) -> None:
    tokens_BT, valid_BT = batch()
    with torch.no_grad():
        theirs = pair.theirs(tokens_BT, attention_mask=valid_BT.long()).logits[valid_BT]
        ours = pair.ours(tokens_BT, valid_BT=valid_BT).logits[valid_BT]
    assert theirs.std() > 0.5
    torch.testing.assert_close(ours, theirs, rtol=0, atol=3e-5)


def test_gradients_agree(pair: Pair) -> None:
    tokens_BT, valid_BT = batch()
    targets_BT = torch.where(valid_BT, tokens_BT, -100).roll(-1, dims=1)
    targets_BT[:, -1] = -100
    logits = pair.theirs(tokens_BT, attention_mask=valid_BT.long()).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets_BT.flatten()).backward()
    losses = pair.ours(tokens_BT, valid_BT=valid_BT, targets_BT=targets_BT).losses
    (losses.total / (targets_BT >= 0).sum()).backward()

    given = {name: p.grad for name, p in pair.theirs.named_parameters() if p.grad is not None}
    expected = {name: torch.zeros_like(weight) for name, weight in pair.ours.state_dict().items()}
    architecture = ARCHITECTURES[pair.theirs.config.model_type]
    for place in find_places(pair.config.model, architecture, fused=any("experts" in name for name in given)):
        if place.theirs in given and place.ours:
            place.write(given[place.theirs] * place.scale**2, expected)  # a factor acts the other way on gradients
    for name, parameter in pair.ours.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0, name
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_prompts_padded_on_the_left_go_on_alike(pair: Pair) -> None:
    tokens_BT, valid_BT = batch()
    prompts = [row[real].tolist() for row, real in zip(tokens_BT, valid_BT, strict=True)]
    ours = torch.tensor(list(generate_tokens(pair.ours, prompts, Sampling(12, temperature=0), 1))).T
    flipped_BT, there_BT = torch.full_like(tokens_BT, 1), valid_BT.flip(1)
    flipped_BT[there_BT] = tokens_BT[valid_BT]
    with torch.inference_mode():
        written = pair.theirs.generate(
            flipped_BT,
            attention_mask=there_BT.long(),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=1,
        )
    assert written[:, tokens_BT.shape[1] :].tolist() == ours.tolist()


def test_export_gives_back_every_bit(pair: Pair) -> None:
    export_run(pair.folder / "runs/imported", pair.folder / "back")
    there, back = tensors(pair.folder / "theirs"), tensors(pair.folder / "back")
    assert there.keys() == back.keys()
    for name, tensor in there.items():
        assert torch.equal(back[name], tensor), name
