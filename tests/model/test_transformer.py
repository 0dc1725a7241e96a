"""The whole model: counts, the cache, the mask, and a mixture of one expert that is the dense model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moelm.config import BalanceConfig, ModelConfig, OptimConfig, load_config
from moelm.data.loader import Batch
from moelm.model import KVCache, build_model, count_flops, count_parameters
from moelm.model.swiglu import grouped_swiglu_loop
from moelm.train.objective import micro_batch_loss
from moelm.train.optimizer import build_optimizer, clip_gradients, gradient_squares

MOE = {"kind": "moe", "hidden_dim": 16, "num_experts": 4, "top_k": 2}
CONFIGS = sorted(Path(__file__).parents[2].joinpath("configs").glob("*.yaml"))


def shape(**changes: Any) -> ModelConfig:
    plain = {"dim": 16, "num_layers": 2, "num_heads": 4, "vocab_size": 50, "ffn": MOE}
    return ModelConfig.model_validate({**plain, **changes})


SHAPES = [
    shape(),
    shape(ffn={"kind": "dense", "hidden_dim": 24}),
    shape(num_kv_heads=2, qk_norm=True, tie_embeddings=False),
    shape(num_layers=4, ffn={**MOE, "every": 2, "shared_experts": 1}, head_dim=6),
    shape(ffn={**MOE, "router": {"kind": "noisy_topk"}}, sandwich_norm=True, activation="gelu", attention_logit_cap=30.0),
    shape(ffn={**MOE, "router": {"kind": "sigmoid"}, "num_experts": 16, "top_k": 4, "hidden_dim": 8}),
    shape(ffn={**MOE, "router": {"kind": "hierarchical", "groups": 2, "group_k": 1}}),
    shape(ffn={**MOE, "router": {"kind": "hash"}}),
    shape(ffn={**MOE, "depth": 2, "shared_experts": 1}),
    shape(num_layers=4, unique_layers=2, ffn={**MOE, "every": 2, "depth": 4}),
]


@pytest.mark.parametrize("config", SHAPES)
def test_counts_are_those_of_the_built_model(config: ModelConfig) -> None:
    model = build_model(config, seed=0)
    assert count_parameters(config).total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("config", SHAPES)
def test_flops_are_those_torch_counts(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    # The counter does not see products that are written into place, and a norm's sum looks like a product to it.
    monkeypatch.setattr("moelm.model.norm.eager_on_cpu", lambda x: False)
    monkeypatch.setattr("moelm.model.swiglu.grouped_swiglu_cpu", lambda *inputs: grouped_swiglu_loop(*inputs[:-1]))
    model = build_model(config, seed=0)
    tokens = torch.randint(0, 50, (2, 12))
    expected = count_flops(config, 12)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        logits = model(tokens).logits
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    assert forward.get_total_flops() == expected.forward * tokens.numel()
    assert backward.get_total_flops() == expected.backward * tokens.numel()


@pytest.mark.parametrize("path", [p for p in CONFIGS if "base" not in p.name], ids=lambda p: p.stem)
def test_every_shipped_config_builds(path: Path) -> None:
    config = load_config(path).model
    config = config.model_copy(update={"vocab_size": config.vocab_size or 4096})
    model = build_model(config, seed=0, device="meta")
    assert count_parameters(config).total == sum(p.numel() for p in model.parameters())


def test_mixtral_has_its_published_size() -> None:
    config = load_config(next(p for p in CONFIGS if p.stem == "mixtral-8x7b")).model
    count = count_parameters(config)
    assert (round(count.total / 1e9, 1), round(count.active / 1e9, 1)) == (46.7, 12.9)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("cuts", [(7, 1, 1, 1), (3, 4, 1, 2)])
def test_prefill_and_decode_equal_the_full_forward(window: int | None, cuts: tuple[int, ...]) -> None:
    model = build_model(shape(window=window, num_kv_heads=2), seed=0).eval()
    tokens = torch.randint(0, 50, (3, 10), generator=torch.Generator().manual_seed(0))
    full = model(tokens).logits
    cache = KVCache(model.config, 3, 10, tokens.device)
    parts = [model(part, cache=cache).logits for part in tokens.split(cuts, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), full, rtol=1e-4, atol=1e-5)


def test_the_document_mask_keeps_documents_apart() -> None:
    model = build_model(shape(), seed=0).eval()
    tokens = torch.randint(0, 50, (1, 9), generator=torch.Generator().manual_seed(0))
    segments = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1]])
    together = model(tokens, segments).logits[0, 4:]
    torch.testing.assert_close(together, model(tokens[:, 4:]).logits[0], rtol=1e-4, atol=1e-5)


def test_the_window_forgets() -> None:
    model = build_model(shape(num_layers=1, window=3), seed=0).eval()
    tokens = torch.randint(0, 50, (1, 8), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[0, 4] = (changed[0, 4] + 1) % 50
    different = (model(tokens).logits != model(changed).logits).any(dim=-1)[0]
    assert different.tolist() == [False] * 4 + [True] * 3 + [False]


def test_dense_and_sparse_start_with_the_same_shared_weights() -> None:
    dense = build_model(shape(ffn={"kind": "dense", "hidden_dim": 16}), seed=3).state_dict()
    sparse = build_model(shape(), seed=3).state_dict()
    shared = dense.keys() & sparse.keys()
    assert "layers.1.attention.wq.weight" in shared
    assert all(torch.equal(dense[name], sparse[name]) for name in shared)
    assert torch.equal(dense["layers.1.ffn.w2"], sparse["layers.1.ffn.experts.w2"][0])


def train_losses(ffn: dict[str, Any]) -> list[float]:
    model = build_model(shape(ffn=ffn, dim=32), seed=0)
    optimizer = build_optimizer(model, OptimConfig(lr=0.01))
    rows = torch.randint(0, 50, (8, 17), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(20):
        batch = Batch(rows[:, :-1], rows[:, 1:], torch.zeros(8, 16, dtype=torch.long))
        output = model(batch.tokens_BT, targets_BT=batch.targets_BT)
        loss = micro_batch_loss(output, batch, None, torch.tensor(128.0), BalanceConfig(aux=0.1, z=0.1))
        losses.append(loss.tokens.item())
        loss.total.backward()
        clip_gradients(model.parameters(), gradient_squares(model.parameters()), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def test_a_mixture_of_one_expert_is_the_dense_model_bit_for_bit() -> None:
    sparse = train_losses({"kind": "moe", "hidden_dim": 48, "num_experts": 1, "top_k": 1})
    dense = train_losses({"kind": "dense", "hidden_dim": 48})
    assert sparse == dense
    assert dense[-1] < dense[0]
