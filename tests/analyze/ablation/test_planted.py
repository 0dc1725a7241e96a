"""Ablations tell experts that compute a domain's rule from copies that a router merely divides the domains among."""

from typing import Any

import numpy as np
import pytest
import torch

from moelm.analyze.ablation.experts import ablate_experts
from moelm.analyze.ablation.run import measure_ablations
from moelm.analyze.ablation.statistics import means_by_documents
from moelm.analyze.ablation.text import AblationText
from moelm.analyze.collect import collect_routing, sample_rows
from moelm.analyze.counts import UNIT
from moelm.analyze.summary import summarize
from moelm.data.loader import PreparedData
from moelm.errors import MoelmError
from moelm.model import build_model
from moelm.model.moe.experts import expert_stacks
from moelm.model.moe.router import TopKRouter
from tests.analyze.ablation.planted import ALPHABETS, BYTES, config_of, opened, planted_data, planted_model
from tests.analyze.test_collect import RandomRouter


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    return planted_data(tmp_path_factory.mktemp("planted"))


def measured(data: PreparedData, copies: bool) -> dict[str, Any]:
    """The only layer, its routing's Cramér's V, and the whole result."""
    model = planted_model(data, copies)
    result = measure_ablations(opened(model, data), "all", 2000, 0)
    sample = collect_routing(model, data.val, 2000, 0, torch.float32)
    (layer,) = summarize(sample, model, str, 19, 0)["layers"]
    assert layer["association"]["all"]["cramers_v"] > 0.9  # the shares say that the experts are specialized
    return {**result["layers"][0], "result": result}


def test_an_expert_that_computes_a_domains_rule_is_found(data: PreparedData) -> None:
    layer = measured(data, copies=False)
    assert layer["experts"]["serves"] == [["alpha"], ["omega"], [], []]
    mask = layer["experts"]["mask"]["domains"]
    assert mask["alpha"]["loss"][0] > 1
    assert mask["alpha"]["loss"][1] == pytest.approx(0, abs=1e-6)
    assert layer["experts"]["agreement"]["spearman"] > 0.3
    replaced = layer["routes"]["replaced"]
    assert replaced["uniform"]["low"] > 0.5
    assert replaced["shuffled_in_domain"]["mean"] < replaced["shuffled"]["mean"] / 2  # letters get a start token's at most
    assert layer["routes"]["better_than_random"]["low"] > 0.6
    assert layer["routes"]["regret"]["own"]["mean"] < layer["routes"]["regret"]["random"]["mean"]
    removal = layer["result"]["removal"]
    assert removal["ablation"][1]["mean"] == pytest.approx(0, abs=1e-6)  # two experts have all rules
    assert removal["random"][1]["mean"] > 0.1


def test_copies_behind_a_router_that_follows_domains_are_not_found(data: PreparedData) -> None:
    layer = measured(data, copies=True)
    assert layer["experts"]["serves"] == [[], [], [], []]
    assert layer["result"]["effects"]["mask"] == 0
    assert max(map(abs, layer["experts"]["mask"]["loss"])) < 1e-6
    for replaced in layer["routes"]["replaced"].values():
        assert replaced["mean"] == pytest.approx(0, abs=1e-6)
    assert layer["routes"]["better_than_random"]["mean"] == pytest.approx(0.5, abs=0.2)
    # An output of zero costs the domain that is routed there, whoever else could have computed it.
    assert layer["experts"]["zero"]["domains"]["alpha"]["effect"][0]


def test_equal_experts_under_random_routing_have_effects_by_chance_only(data: PreparedData) -> None:
    """Zeroing an expert costs, but no more than zeroing as many random assignments: p is uniformly distributed."""
    small: list[float] = []
    for seed in range(6):
        config = config_of(num_experts=6, top_k=2, hidden_dim=8)
        model = build_model(config.model.model_copy(update={"init_std": 0.5}), seed).eval()
        for experts in expert_stacks(model):
            for weight in (experts.w1, experts.w2, experts.w3):
                weight.data.copy_(weight.data[:1].expand_as(weight))
        torch.manual_seed(seed)
        for block in model.blocks:
            block.ffn.router = RandomRouter()  # type: ignore[assignment]
        text = AblationText(model, data.val, sample_rows(data.val, 3000, seed), torch.float32, False, min_batches=20)
        sums = ablate_experts(text, seed, lambda: None)
        assert abs(sums.ablated[0]).sum() * UNIT < 1  # masked: the next best is a copy
        assert abs(sums.ablated[1]).sum() * UNIT > 100
        for domain in (0, 1):
            of_domain = text.domains == domain
            excess = (sums.ablated[1, 0] - sums.control[1, 0])[:, of_domain] * UNIT
            small += (means_by_documents(excess, text.tokens[of_domain]).p < 0.05).tolist()
    assert np.mean(small) < 0.12


def test_what_cannot_be_ablated_is_refused(data: PreparedData) -> None:
    config = config_of(num_experts=2, top_k=2)
    model = build_model(config.model, 0).eval()
    with pytest.raises(MoelmError, match="Every token selects all 2 experts"):
        measure_ablations(opened(model, data, config), "layers", 100, 0)
    with pytest.raises(MoelmError, match=r"needs at least 2\."):
        measure_ablations(opened(planted_model(data, copies=True), data), "layers", 1, 0)


def test_a_hierarchical_router_has_no_curve_over_top_k(data: PreparedData) -> None:
    config = config_of(num_experts=6, top_k=2, hidden_dim=8, router={"kind": "hierarchical", "groups": 3, "group_k": 2})
    result = measure_ablations(opened(build_model(config.model, 0).eval(), data, config), "layers", 300, 0)
    assert result["top_k"] == []
    assert [point["experts"] for point in result["removal"]["load"]] == [2, 3, 4, 6]


def test_a_domain_is_not_served_by_the_expert_that_it_merely_uses_more(data: PreparedData) -> None:
    """Copies of all rules, of which a domain's letters prefer one. The gate of the next best is smaller, so that every
    masked assignment costs the same, whichever expert it had."""
    model = planted_model(data, copies=True)
    (block,) = model.blocks
    router, experts = block.ffn.get_submodule("router"), block.ffn.get_submodule("experts")
    block.ffn.router = TopKRouter(BYTES, 4, 1, normalize=False)  # type: ignore[assignment]
    router = block.ffn.get_submodule("router")
    with torch.no_grad():
        assert isinstance(experts.w2, torch.Tensor)
        assert isinstance(router.weight, torch.Tensor)
        experts.w2.mul_(0.16)
        router.weight.zero_()
        for letters, preferred in zip(ALPHABETS.values(), ([0, 0, 0, 0, 1, 2, 3], [1, 2, 3, 1, 2, 3, 0]), strict=True):
            router.weight[preferred, data.tokenizer.encode_batch([letters])[0]] = 0.3
    result = measure_ablations(opened(model, data), "all", 4000, 0)
    (layer,) = result["layers"]
    assert layer["routes"]["shares"]["alpha"][0] > 2 * layer["routes"]["shares"]["omega"][0]
    assert layer["experts"]["mask"]["domains"]["alpha"]["loss"][0] > 1
    assert layer["experts"]["serves"] == [[], [], [], []]


def test_a_hierarchical_router_is_ablated_where_an_expert_has_no_token(data: PreparedData) -> None:
    for group_k in (1, 2):
        router = {"kind": "hierarchical", "groups": 3, "group_k": group_k}
        config = config_of(num_experts=6, top_k=2, hidden_dim=8, router=router)
        result = measure_ablations(opened(build_model(config.model, 0).eval(), data, config), "all", 200, 0)
        assert "second_best" not in result["layers"][0]["routes"]["replaced"]
