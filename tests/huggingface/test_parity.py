"""Random transformers models, imported: same logits, gradients and continuations, and an export with the same bits."""

import contextlib
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from moelm.config import RunConfig
from moelm.huggingface.architectures import ARCHITECTURES
from moelm.huggingface.export import export_run
from moelm.huggingface.importing import import_model
from moelm.huggingface.weight_map import build_weight_map
from moelm.inference.generate import Sampling, generate_tokens
from moelm.model import Transformer
from moelm.runs.load import load_run
from tests.huggingface.hf_models import CASES, build_hf_model, read_tensors, save_hf_model

LENGTHS = (30, 17, 1)
"""Tokens of the batch's rows, without padding."""

STORED_NAMES = {
    "block_sparse_moe.router.weight": "block_sparse_moe.router.layer.weight",
    "block_sparse_moe.experts.gate_up_proj": "block_sparse_moe.input_linear.weight",
    "block_sparse_moe.experts.down_proj": "block_sparse_moe.output_linear.weight",
}
"""Names of tensors in files, where transformers 5 has others in memory and one layout only in files."""


class ImportedModel(NamedTuple):
    """A transformers model, and the moelm model imported from it."""

    hf_model: Any
    model: Transformer
    config: RunConfig
    folder: Path


@pytest.fixture(scope="module", params=CASES)
def imported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ImportedModel:
    folder = tmp_path_factory.mktemp("parity")
    hf_model = build_hf_model(request.param)
    with contextlib.chdir(folder):
        import_model(save_hf_model(hf_model, folder / "hf"), "imported", ["data.seq_len=64"])
        model, _, config = load_run("imported")
    return ImportedModel(hf_model, model, config, folder)


def padded_batch() -> tuple[Tensor, Tensor]:
    """Tokens padded on the right, and which of them are not padding."""
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(0, 256, (len(LENGTHS), max(LENGTHS)), generator=generator)
    return tokens_BT, torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]


def test_logits_equal(imported: ImportedModel) -> None:
    tokens_BT, valid_BT = padded_batch()
    with torch.no_grad():
        expected = imported.hf_model(tokens_BT, attention_mask=valid_BT.long()).logits[valid_BT]
        logits = imported.model(tokens_BT, valid_BT=valid_BT).logits[valid_BT]
    assert expected.std() > 0.5
    torch.testing.assert_close(logits, expected, rtol=0, atol=3e-5 * float(expected.std()))


def test_gradients_equal(imported: ImportedModel) -> None:
    tokens_BT, valid_BT = padded_batch()
    targets_BT = torch.where(valid_BT, tokens_BT, -100).roll(-1, dims=1)
    targets_BT[:, -1] = -100
    logits = imported.hf_model(tokens_BT, attention_mask=valid_BT.long()).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets_BT.flatten()).backward()
    losses = imported.model(tokens_BT, valid_BT=valid_BT, targets_BT=targets_BT).losses
    (losses.total / (targets_BT >= 0).sum()).backward()

    hf_gradients = {}
    for name, p in imported.hf_model.named_parameters():
        for in_memory, stored in STORED_NAMES.items():
            name = name.replace(in_memory, stored)
        if p.grad is not None:
            hf_gradients[name] = p.grad
    expected = {name: torch.zeros_like(weight) for name, weight in imported.model.state_dict().items()}
    architecture = ARCHITECTURES[imported.hf_model.config.model_type]
    fused = any("experts" in name for name in hf_gradients)
    for mapping in build_weight_map(imported.config.model, architecture, fused):
        if mapping.hf_name in hf_gradients and mapping.names:
            # The gradient of moelm's weight is that of the tensor times the scale, by which from_hf divides.
            mapping.from_hf(hf_gradients[mapping.hf_name] * mapping.scale**2, expected)
    for name, parameter in imported.model.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0, name
        atol = 2e-5 * float(expected[name].abs().max())
        torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def test_continuations_of_left_padded_prompts_equal(imported: ImportedModel) -> None:
    tokens_BT, valid_BT = padded_batch()
    prompts = [row[valid].tolist() for row, valid in zip(tokens_BT, valid_BT, strict=True)]
    tokens = torch.tensor(list(generate_tokens(imported.model, prompts, Sampling(12, temperature=0), 1))).T
    left_padded_BT, left_valid_BT = torch.full_like(tokens_BT, 1), valid_BT.flip(1)
    left_padded_BT[left_valid_BT] = tokens_BT[valid_BT]
    with torch.inference_mode():
        expected = imported.hf_model.generate(
            left_padded_BT,
            attention_mask=left_valid_BT.long(),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=1,
        )
    assert tokens.tolist() == expected[:, tokens_BT.shape[1] :].tolist()


def test_export_of_an_import_has_the_same_bits(imported: ImportedModel) -> None:
    export_run(imported.folder / "runs/imported", imported.folder / "exported")
    original, exported = read_tensors(imported.folder / "hf"), read_tensors(imported.folder / "exported")
    assert original.keys() == exported.keys()
    for name, tensor in original.items():
        assert torch.equal(exported[name], tensor), name
