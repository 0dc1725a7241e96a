"""Routing counts: equal to those of a loop over positions, with planted routers, and without changing the model."""

import contextlib
import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from moelm.analyze.collect import RoutingSample, collect_routing, sample_rows
from moelm.analyze.counts import UNIT
from moelm.analyze.summary import summarize
from moelm.config import RunConfig, check_config
from moelm.data.loader import PreparedData
from moelm.data.prepare import prepare
from moelm.data.tokenizer import Tokenizer
from moelm.errors import MoelmError
from moelm.model import Transformer, build_model
from moelm.model.moe.router import Routing, TokenContext
from tests.conftest import open_data

ALPHABETS = {"alpha": "abcdefg", "omega": "tuvwxyz"}


def config_of(top_k: int) -> RunConfig:
    ffn = {"kind": "moe", "hidden_dim": 8, "num_experts": 6, "top_k": top_k}
    return check_config(
        {
            "name": "run",
            "model": {"dim": 8, "num_layers": 2, "num_heads": 2, "vocab_size": 258, "init_std": 0.5, "ffn": ffn},
            "data": {
                "sources": [{"path": f"{name}.jsonl", "domain": name} for name in ALPHABETS],
                "tokenizer": {"kind": "byte"},
                "seq_len": 32,
                "val_fraction": 0.3,
            },
            "train": {"steps": 1, "batch_tokens": 32},
            "optim": {"lr": 1e-3},
        },
        "test",
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    """Two domains that have no letter in common."""
    folder = tmp_path_factory.mktemp("domains")
    rng = np.random.default_rng(0)
    with contextlib.chdir(folder):
        for name, letters in ALPHABETS.items():
            lines = ["".join(rng.choice(list(letters), rng.integers(5, 30))) for _ in range(200)]
            Path(f"{name}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
        prepare(config_of(2).data)
        opened = open_data(config_of(2))
        opened.val.split.take(np.arange(1))
        return opened


def collect(model: Transformer, data: PreparedData, tokens: int = 10**6, seed: int = 0) -> RoutingSample:
    return collect_routing(model, data.val, tokens, seed, torch.float32, document_mask=True)


def report_layers(model: Transformer, data: PreparedData) -> list[dict[str, Any]]:
    layers: list[dict[str, Any]] = summarize(collect(model, data), model, str, 99, 0)["layers"]
    return layers


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_counts_are_those_of_a_loop_over_positions(data: PreparedData, top_k: int) -> None:
    model = build_model(config_of(top_k).model, seed=0).eval()
    counts = collect(model, data).counts
    rows = data.val
    expected: Counter[Any] = Counter()
    entropy = margin = 0.0
    for row in range(len(rows)):
        batch = rows.batch(np.array([row]))
        with torch.no_grad():
            output = model(batch.tokens_BT, batch.fragments_BT, valid_BT=batch.valid_BT)
        for layer, routing in output.routings.items():
            for t in np.flatnonzero(batch.valid_N).tolist():
                fragment = int(batch.fragments_BT[0, t])
                domain = int(rows.split.documents["domain"][rows.packing.document[fragment]])
                chosen = routing.experts_NK[t].tolist()
                expected["tokens", domain] += layer == 0
                expected["first", layer, domain, chosen[0]] += 1
                for expert in chosen:
                    expected["load", layer, expert] += 1
                    expected["input", layer, expert, int(batch.tokens_BT[0, t])] += 1
                    expected["predicted", layer, expert, int(output.logits[0, t].argmax())] += 1
                for a in chosen:
                    for b in chosen:
                        expected["coactivation", layer, a, b] += a != b
                if t and int(batch.fragments_BT[0, t - 1]) == fragment:
                    previous = routing.experts_NK[t - 1].tolist()
                    expected["adjacent", domain] += layer == 0
                    expected["same first", layer, domain] += previous[0] == chosen[0]
                    expected["same any", layer, domain] += bool(set(previous) & set(chosen))
                probs = routing.probs_NE[t].double()
                entropy -= float((probs * probs.log()).sum())
                margin += float(min(probs[chosen]) - max(probs[e] for e in range(6) if e not in chosen))
    for layer in range(2):
        for expert in range(6):
            assert counts.load[layer, expert] == expected["load", layer, expert]
            for domain in range(2):
                assert counts.first_experts[domain, layer, expert] == expected["first", layer, domain, expert]
            for token in range(258):
                assert counts.by_input[layer, expert, token] == expected["input", layer, expert, token]
                assert counts.by_prediction[layer, expert, token] == expected["predicted", layer, expert, token]
            for other in range(6):
                assert counts.coactivation[layer, expert, other] == expected["coactivation", layer, expert, other]
        for domain in range(2):
            assert counts.tokens[domain] == expected["tokens", domain] > 0
            assert counts.adjacent_pairs[domain] == expected["adjacent", domain]
            assert counts.adjacent_matches[domain, layer].tolist() == [
                expected["same first", layer, domain],
                expected["same any", layer, domain],
            ]
    assert counts.entropy.sum() * UNIT == pytest.approx(entropy, rel=1e-5)
    assert counts.margin.sum() * UNIT == pytest.approx(margin, rel=1e-5)


class PlantedRouter(nn.Module):
    """Routes each domain, recognized by its letters, to its own experts; the start token is routed like the next token."""

    needs_rng = False

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.bos = tokenizer.bos_id
        self.omega = torch.tensor(tokenizer.encode_batch([ALPHABETS["omega"]])[0])

    def forward(self, x_ND: Tensor, context: TokenContext) -> Routing:
        tokens_N = context.tokens_N
        letters_N = torch.where(tokens_N == self.bos, tokens_N.roll(-1), tokens_N)
        omega_N = torch.isin(letters_N, self.omega).long()
        experts_NK = torch.stack((3 * omega_N, 3 * omega_N + 1 + letters_N % 2), dim=1)
        probs_NE = torch.zeros(len(x_ND), 6).scatter(1, experts_NK, 0.5)
        return Routing(torch.full(experts_NK.shape, 0.5), experts_NK, probs_NE)


class RandomRouter(nn.Module):
    """Uniformly random experts, whatever the token."""

    needs_rng = False

    def forward(self, x_ND: Tensor, context: TokenContext) -> Routing:
        probs_NE = torch.rand(len(x_ND), 6).softmax(dim=1)
        return Routing(torch.full((len(x_ND), 2), 0.5), probs_NE.topk(2, dim=1).indices, probs_NE)


def with_router(router: nn.Module) -> Transformer:
    model = build_model(config_of(2).model, seed=0)
    for block in model.blocks:
        block.ffn.router = router  # type: ignore[assignment]
    return model


def test_a_planted_router_is_found(data: PreparedData) -> None:
    model = with_router(PlantedRouter(data.tokenizer))
    for layer in report_layers(model, data):
        assert layer["association"]["all"] == {
            "cramers_v": pytest.approx(1),
            "permuted": pytest.approx(0.08, abs=0.08),
            "mutual_information": pytest.approx(np.log(2), abs=0.01),
            "p": 0.01,
        }
        assert sum(layer["shares"]["alpha"][:3]) == pytest.approx(1)
        assert sum(layer["shares"]["omega"][3:]) == pytest.approx(1)
        assert layer["repetition"]["first"]["all"] == 1
        assert layer["repetition"]["first"]["matched"] == pytest.approx(0.5, abs=0.02)
        assert layer["repetition"]["first"]["shuffled"] == 1  # all tokens of a domain share their first expert
        assert layer["entropy"]["all"] == pytest.approx(np.log(2))


def test_a_random_router_is_not_found_and_matches_the_chance_levels(data: PreparedData) -> None:
    torch.manual_seed(0)
    model = with_router(RandomRouter())
    for layer in report_layers(model, data):
        assert layer["association"]["all"]["cramers_v"] < 0.1
        assert layer["association"]["all"]["p"] > 0.05
        for kind in ("first", "any"):
            repetition = layer["repetition"][kind]
            for baseline in ("uniform", "matched", "shuffled"):
                assert repetition["all"] == pytest.approx(repetition[baseline], abs=0.05), (kind, baseline)


def test_the_model_is_not_changed(data: PreparedData) -> None:
    model = build_model(config_of(2).model, seed=0)
    model.train()
    before = copy.deepcopy(model.state_dict())
    collect(model, data)
    assert model.training
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name])


def test_a_sample_depends_on_its_seed(data: PreparedData) -> None:
    model = build_model(config_of(2).model, seed=0)
    one, same, other = (collect(model, data, tokens=200, seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(one.counts.by_input, same.counts.by_input)
    assert not np.array_equal(one.counts.by_input, other.counts.by_input)
    assert len(sample_rows(data.val, 200, 0)) == 7
    assert 100 < one.counts.tokens.sum() <= 224


@pytest.mark.parametrize(
    ("ffn", "sentence"),
    [
        ({"kind": "dense", "hidden_dim": 8}, "The model is dense"),
        (
            {"kind": "moe", "hidden_dim": 8, "num_experts": 4, "top_k": 2, "router": {"kind": "expert_choice"}},
            "experts choose",
        ),
    ],
)
def test_models_whose_tokens_select_no_experts_are_refused(data: PreparedData, ffn: dict[str, Any], sentence: str) -> None:
    config = config_of(2)
    tree = {**config.model.model_dump(exclude_none=True), "ffn": ffn}
    with pytest.raises(MoelmError, match=sentence):
        collect(build_model(type(config.model).model_validate(tree), seed=0), data)
