"""A pass that is continued from a layer equals a whole pass of a model that is changed there, router or expert."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moelm.analyze.ablation.cached_pass import CachedPass, RouteChange, subset_of_routing
from moelm.analyze.ablation.capacity import _most_useful, _top_k
from moelm.config import ModelConfig
from moelm.data.loader import IGNORE, Batch
from moelm.model import Routing, Transformer, build_model
from moelm.model.moe.router import TokenContext

SHAPE = {"dim": 16, "num_layers": 4, "num_heads": 2, "vocab_size": 50, "init_std": 0.3}
FFN = {"kind": "moe", "hidden_dim": 8, "num_experts": 6, "top_k": 2}
ROUTERS: list[dict[str, Any]] = [
    {"router": {"kind": "topk"}},
    {"router": {"kind": "topk"}, "balance": {"bias": 0.1}},
    {"router": {"kind": "topk", "normalize": False}},
    {"router": {"kind": "sigmoid"}},
    {"router": {"kind": "sigmoid", "normalize": False, "scale": 2.5}},
    {"router": {"kind": "noisy_topk"}},
]


def model_of(changes: dict[str, Any], **ffn: Any) -> Transformer:
    config = ModelConfig.model_validate({**SHAPE, **changes, "ffn": {**FFN, **ffn}})
    model = build_model(config, seed=0).eval()
    generator = torch.Generator().manual_seed(1)
    for name, values in (*model.named_parameters(), *model.named_buffers()):
        if "router.weight" in name or "router.noise" in name:
            values.data.normal_(generator=generator)
        elif "router.bias" in name:
            values.data.uniform_(-0.3, 0.3, generator=generator)
    return model


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(2)
    tokens, targets = (torch.randint(50, (3, 12), generator=generator) for _ in range(2))
    fragments = torch.arange(12).div(5, rounding_mode="floor").expand(3, -1) + torch.arange(3)[:, None] * 3
    targets[2, 8:] = IGNORE
    return Batch(tokens, targets, fragments.masked_fill(targets == IGNORE, -1))


def losses(model: Transformer, batch: Batch, document_mask: bool) -> Tensor:
    with torch.no_grad():
        output = model(
            batch.tokens_BT,
            batch.fragments_BT if document_mask else None,
            valid_BT=batch.valid_BT,
            targets_BT=batch.targets_BT,
        )
    assert output.losses is not None
    return output.losses.each_N


class Replaying(nn.Module):
    """A router that returns given routings, one at each call."""

    needs_rng = False

    def __init__(self, routings: list[Routing]) -> None:
        super().__init__()
        self.routings = routings

    def forward(self, x_ND: Tensor, context: TokenContext) -> Routing:
        return self.routings.pop(0)


@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize(
    "changes",
    [{}, {"unique_layers": 2}, {"sandwich_norm": True, "embedding_multiplier": 3.0, "output_multiplier": 0.5}],
    ids=["plain", "repeated", "grok"],
)
@pytest.mark.parametrize("ffn", [{}, {"every": 2, "shared_experts": 1}], ids=["all", "every"])
def test_changed_routes_give_the_losses_of_a_model_with_that_router(
    batch: Batch, changes: dict[str, Any], ffn: dict[str, Any], document_mask: bool
) -> None:
    model = model_of(changes, **ffn)
    cached = CachedPass(model, batch, torch.float32, document_mask)
    torch.testing.assert_close(cached.losses_N, losses(model, batch, document_mask))
    assert sorted(cached.layers) == model.config.sparse_layers
    generator = torch.Generator().manual_seed(3)
    blocks = model.repeated_blocks
    once = [layer for layer in cached.layers if blocks.count(blocks[layer]) == 1]
    for layer in once or [max(cached.layers)]:
        own = cached.layers[layer].routing
        subsets = [batch.valid_N.nonzero()[::step, 0] for step in (1, 3)]
        news = [torch.rand(36, 6, generator=generator).topk(2).indices for _ in subsets]
        made = [
            RouteChange(tokens, subset_of_routing(own, tokens)._replace(experts_NK=new[tokens]))
            for tokens, new in zip(subsets, news, strict=True)
        ]
        for tokens, new, found in zip(subsets, news, cached.losses_with(layer, made), strict=True):
            experts = own.experts_NK.index_copy(0, tokens, new[tokens])
            block = blocks[layer]
            router = block.ffn.router
            # A repeated block routes as before in its earlier repeats.
            earlier = [cached.layers[number].routing for number in cached.layers if blocks[number] is block]
            block.ffn.router = Replaying([*earlier[:-1], own._replace(experts_NK=experts)])  # type: ignore[assignment]
            torch.testing.assert_close(found, losses(model, batch, document_mask), rtol=1e-5, atol=1e-5)
            block.ffn.router = router


def without_expert(model: Transformer, layers: dict[int, list[int]]) -> Transformer:
    """A model that has only these experts in each layer."""
    left = len(next(iter(layers.values())))
    ffn = {**model.config.ffn.model_dump(exclude_none=True), "num_experts": left}
    config = {**model.config.model_dump(exclude_none=True), "ffn": ffn}
    smaller = build_model(ModelConfig.model_validate(config), seed=0).eval()
    weights = dict(model.state_dict())
    for name in weights:
        layer = int(name.split(".")[1]) if name.startswith("layers.") else -1
        if layer in layers and ("ffn.experts" in name or "ffn.router" in name):
            weights[name] = weights[name][layers[layer]]
    smaller.load_state_dict(weights)
    return smaller


@pytest.mark.parametrize("ffn", ROUTERS, ids=str)
def test_removed_experts_are_those_of_a_smaller_model(batch: Batch, ffn: dict[str, Any]) -> None:
    model = model_of({}, **ffn)
    usefulness = torch.rand(4, 6, generator=torch.Generator().manual_seed(4)).double().numpy()
    available = _most_useful(usefulness, 4, [0, 1, 2, 3], torch.device("cpu"))
    kept = {layer: each.nonzero()[:, 0].tolist() for layer, each in available.items()}
    assert all(min(usefulness[layer, kept[layer]]) > sorted(usefulness[layer])[1] for layer in kept)
    pruned = CachedPass(model, batch, torch.float32, False, available)
    torch.testing.assert_close(pruned.losses_N, losses(without_expert(model, kept), batch, False), rtol=1e-5, atol=1e-5)
    for layer, state in pruned.layers.items():
        assert not torch.isin(state.routing.experts_NK, torch.tensor(sorted(set(range(6)) - set(kept[layer])))).any()


@pytest.mark.parametrize("ffn", ROUTERS, ids=str)
def test_tokens_are_rerouted_as_without_the_expert(batch: Batch, ffn: dict[str, Any]) -> None:
    """The routing of tokens whose best expert is masked is that of a router without its row."""
    model = model_of({}, **ffn)
    cached = CachedPass(model, batch, torch.float32, False)
    routing = cached.layers[1].routing
    for expert in range(6):
        tokens = (routing.experts_NK == expert).any(dim=1).nonzero()[:, 0]
        available = torch.ones(len(tokens), 6, dtype=torch.bool)
        available[:, expert] = False
        found = cached.reroute(1, tokens, available)
        others = [each for each in range(6) if each != expert]
        smaller = without_expert(model, dict.fromkeys(range(4), others)).blocks[1].ffn.router
        expected = smaller(cached.layers[1].normed_ND, cached.context(1))  # type: ignore[operator]
        assert torch.equal(found.experts_NK, torch.tensor(others)[expected.experts_NK[tokens]])
        torch.testing.assert_close(found.gates_NK, expected.gates_NK[tokens])


@pytest.mark.parametrize(
    "router", [{"kind": "hash"}, {"kind": "random"}, {"kind": "hierarchical", "groups": 3, "group_k": 2}]
)
def test_masked_experts_are_not_selected(batch: Batch, router: dict[str, Any]) -> None:
    model = model_of({}, router=router)
    cached = CachedPass(model, batch, torch.float32, False)
    everything = torch.arange(36)
    for expert in range(6):
        available = torch.ones(36, 6, dtype=torch.bool)
        available[:, expert] = False
        found = cached.reroute(0, everything, available)
        assert not (found.experts_NK == expert).any()
        unaffected = ~(cached.layers[0].routing.experts_NK == expert).any(dim=1)
        assert torch.equal(found.experts_NK[unaffected], cached.layers[0].routing.experts_NK[unaffected])
        torch.testing.assert_close(found.gates_NK.sum(dim=1), torch.ones(36))


@pytest.mark.parametrize("top_k", [1, 3])
def test_another_number_of_experts_per_token_is_that_of_the_config(batch: Batch, top_k: int) -> None:
    model = model_of({})
    other = model_of({}, top_k=top_k)
    other.load_state_dict(model.state_dict())
    with _top_k(model, top_k):
        found = CachedPass(model, batch, torch.float32, False).losses_N
    torch.testing.assert_close(found, losses(other, batch, False))
    assert CachedPass(model, batch, torch.float32, False).layers[0].routing.experts_NK.shape[1] == 2
