"""Saturation: a loop over tokens, a model compared with itself, and uniformly random experts."""

import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from moelm.analyze.collect import sample_rows
from moelm.analyze.layers import sparse_ffn
from moelm.analyze.saturation import Agreement, count_agreement, layer_saturation
from moelm.config import RunConfig, load_config
from moelm.data.loader import Rows
from moelm.model import Transformer, build_model
from moelm.model.moe.router import Routing, TokenContext
from tests.conftest import open_data


@pytest.fixture(scope="module")
def opened(trained: Path) -> tuple[RunConfig, Rows]:
    with contextlib.chdir(trained):
        config = load_config("runs/tiny-moe/config.yaml")
        rows = open_data(config).val
        rows.split.take(np.arange(1))
    return config, rows


def built(config: RunConfig, seed: int, top_k: int = 2) -> Transformer:
    ffn = sparse_ffn(config.model).model_copy(update={"top_k": top_k})
    return build_model(config.model.model_copy(update={"ffn": ffn, "init_std": 0.5}), seed).eval()


def agreement(model: Transformer, other: Transformer, rows: Rows, tokens: int = 10**6, mask: bool = True) -> Agreement:
    return count_agreement(model, other, rows, tokens, 0, torch.float32, mask)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_agreement_is_that_of_a_loop_over_tokens(opened: tuple[RunConfig, Rows], top_k: int) -> None:
    config, rows = opened
    one, two = built(config, 1, top_k), built(config, 2, top_k)
    found = agreement(one, two, rows, tokens=300)
    common, first, tokens = [0, 0], [0, 0], 0
    for row in sample_rows(rows, 300, 0):
        batch = rows.batch(np.array([row]))
        with torch.no_grad():
            routings = [
                model(batch.tokens_BT, batch.fragments_BT, valid_BT=batch.valid_BT).routings for model in (one, two)
            ]
        for t in np.flatnonzero(batch.valid_N).tolist():
            tokens += 1
            for layer in (0, 1):
                a, b = (routing[layer].experts_NK[t].tolist() for routing in routings)
                common[layer] += len(set(a) & set(b))
                first[layer] += a[0] == b[0]
    assert found.tokens == tokens <= 320
    assert found.experts_L.tolist() == common
    assert found.first_L.tolist() == first
    saturation = layer_saturation({5: found}, 1, sparse_ffn(one.config))
    assert saturation["checkpoints"] == [{"step": 5, "experts": common[1] / tokens / top_k, "first": first[1] / tokens}]
    assert saturation["uniform"] == {"experts": top_k / 4, "first": 1 / 4}


@pytest.mark.parametrize("mask", [True, False])
def test_a_model_agrees_with_itself_exactly(opened: tuple[RunConfig, Rows], mask: bool) -> None:
    config, rows = opened
    found = agreement(built(config, 1), built(config, 1), rows, mask=mask)
    assert found.tokens == rows.count_tokens(np.arange(len(rows)))
    for at in (0, 1):
        same = layer_saturation({0: found}, at, sparse_ffn(config.model))["checkpoints"][0]
        assert (same["experts"], same["first"]) == (1.0, 1.0)


class RandomRouter(nn.Module):
    """Uniformly random experts, whatever the token."""

    needs_rng = False

    def forward(self, x_ND: Tensor, context: TokenContext) -> Routing:
        probs_NE = torch.rand(len(x_ND), 4).softmax(dim=1)
        return Routing(torch.full((len(x_ND), 2), 0.5), probs_NE.topk(2, dim=1).indices, probs_NE)


def test_independent_models_agree_as_uniformly_random_ones(opened: tuple[RunConfig, Rows]) -> None:
    config, rows = opened
    model = built(config, 1)
    for block in model.blocks:
        block.ffn.router = RandomRouter()  # type: ignore[assignment]
    torch.manual_seed(0)
    saturation = layer_saturation({0: agreement(model, model, rows)}, 0, sparse_ffn(config.model))
    same = saturation["checkpoints"][0]
    assert {kind: same[kind] for kind in saturation["uniform"]} == pytest.approx(saturation["uniform"], abs=0.04)
