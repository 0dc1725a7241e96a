"""The whole model: counts, cache, masks, initialization, and a mixture of one expert against the dense model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moelm.config import BalanceConfig, ModelConfig, OptimConfig, load_config
from moelm.data.loader import Batch
from moelm.model import KVCache, Transformer, build_model, count_flops, count_parameters
from moelm.model.swiglu import grouped_swiglu_loop
from moelm.train.objective import micro_batch_loss
from moelm.train.optimizer import build_optimizer
from tests.tolerance import assert_close

MOE = {"kind": "moe", "hidden_dim": 16, "num_experts": 4, "top_k": 2}
CONFIG_FILES = sorted(Path(__file__).parents[2].joinpath("configs").glob("*.yaml"))


def model_config(**changes: Any) -> ModelConfig:
    """A small model whose initial weights are so large that every layer matters to the logits."""
    defaults = {"dim": 16, "num_layers": 2, "num_heads": 4, "vocab_size": 50, "init_std": 0.2, "ffn": MOE}
    return ModelConfig.model_validate({**defaults, **changes})


def fill_biases(model: Transformer) -> Transformer:
    """Replace the selection biases, which are zero at first, so that they change selections."""
    for name, buffer in model.named_buffers():
        if name.endswith("router.bias"):
            buffer.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    return model


MODELS = [
    model_config(),
    model_config(ffn={"kind": "dense", "hidden_dim": 24}),
    model_config(num_kv_heads=2, qk_norm=True, tie_embeddings=False),
    model_config(num_layers=4, ffn={**MOE, "every": 2, "shared_experts": 1}, head_dim=6),
    model_config(
        ffn={**MOE, "router": {"kind": "noisy_topk"}}, sandwich_norm=True, activation="gelu", attention_logit_cap=30.0
    ),
    model_config(ffn={**MOE, "router": {"kind": "sigmoid"}, "num_experts": 16, "top_k": 4, "hidden_dim": 8}),
    model_config(ffn={**MOE, "balance": {"bias": 0.01}}),
    model_config(ffn={**MOE, "router": {"kind": "hierarchical", "groups": 2, "group_k": 1}}),
    model_config(ffn={**MOE, "router": {"kind": "hash"}}),
    model_config(ffn={**MOE, "depth": 2, "shared_experts": 1}),
    model_config(num_layers=4, unique_layers=2, ffn={**MOE, "every": 2, "depth": 4}),
    model_config(
        num_kv_heads=2,
        head_dim=8,
        qk_norm="all_heads",
        qkv_bias=True,
        attention_output_bias=True,
        rotary_fraction=0.5,
        attention_multiplier=0.4,
        residual_multiplier=0.7,
        ffn={**MOE, "shared_experts": 1, "shared_gate": True, "first_dense": 1, "first_dense_dim": 20},
    ),
]


@pytest.mark.parametrize("config", MODELS)
def test_parameter_count_equals_the_built_model(config: ModelConfig) -> None:
    model = build_model(config, seed=0)
    assert count_parameters(config).total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("config", MODELS)
def test_flop_count_equals_torch(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    # torch's counter misses products with an output argument, and counts the sums of the CPU's norm as products.
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


@pytest.mark.parametrize("path", [p for p in CONFIG_FILES if "base" not in p.name], ids=lambda p: p.stem)
def test_every_shipped_config_builds(path: Path) -> None:
    config = load_config(path).model
    config = config.model_copy(update={"vocab_size": config.vocab_size or 4096})
    model = build_model(config, seed=0, device="meta")
    assert count_parameters(config).total == sum(p.numel() for p in model.parameters())


def test_mixtral_has_its_published_size() -> None:
    config = load_config(next(p for p in CONFIG_FILES if p.stem == "mixtral-8x7b")).model
    count = count_parameters(config)
    assert (round(count.total / 1e9, 1), round(count.active / 1e9, 1)) == (46.7, 12.9)


def test_the_initial_embeddings_have_a_vector_in_common() -> None:
    plain, shifted = (build_model(model_config(init_embedding_mean=mean), seed=0).state_dict() for mean in (0.0, 0.3))
    changed = [name for name in plain if not torch.equal(plain[name], shifted[name])]
    assert changed == ["embedding.weight"]
    common_D = (shifted["embedding.weight"] - plain["embedding.weight"]).mean(dim=0)
    assert_close(shifted["embedding.weight"], plain["embedding.weight"] + common_D)
    assert 0.15 < common_D.std() < 0.45


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("lengths", [(7, 1, 1, 1), (3, 4, 1, 2)])
@pytest.mark.parametrize("bias", [0.0, 0.01])
def test_prefill_and_decode_equal_the_full_forward(window: int | None, lengths: tuple[int, ...], bias: float) -> None:
    config = model_config(window=window, num_kv_heads=2, ffn={**MOE, "balance": {"bias": bias}})
    model = fill_biases(build_model(config, seed=0).eval())
    tokens = torch.randint(0, 50, (3, 10), generator=torch.Generator().manual_seed(0))
    full = model(tokens).logits
    cache = KVCache(model.config, 3, 10, tokens.device)
    parts = [model(part, cache=cache).logits for part in tokens.split(lengths, dim=1)]
    assert_close(torch.cat(parts, dim=1), full)


def test_the_document_mask_separates_documents() -> None:
    model = build_model(model_config(), seed=0).eval()
    tokens = torch.randint(0, 50, (1, 9), generator=torch.Generator().manual_seed(0))
    segments = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1]])
    second = model(tokens, segments).logits[0, 4:]
    assert_close(second, model(tokens[:, 4:]).logits[0])


def test_a_token_affects_the_positions_within_the_window() -> None:
    model = build_model(model_config(num_layers=1, window=3), seed=0).eval()
    tokens = torch.randint(0, 50, (1, 8), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[0, 4] = (changed[0, 4] + 1) % 50
    logits = model(tokens).logits[0]
    difference_T = (model(changed).logits[0] - logits).abs().amax(dim=-1)
    # Other positions may differ by rounding, because their expert gets another number of rows.
    assert (difference_T > 1e-4 * logits.abs().max()).tolist() == [False] * 4 + [True] * 3 + [False]


def test_dense_and_sparse_models_start_with_equal_weights() -> None:
    dense = build_model(model_config(ffn={"kind": "dense", "hidden_dim": 16}), seed=3).state_dict()
    sparse = build_model(model_config(), seed=3).state_dict()
    shared = dense.keys() & sparse.keys()
    assert "layers.1.attention.wq.weight" in shared
    assert all(torch.equal(dense[name], sparse[name]) for name in shared)
    assert torch.equal(dense["layers.1.ffn.w2"], sparse["layers.1.ffn.experts.w2"][0])


def train_losses(ffn: dict[str, Any], kind: str, **changes: Any) -> list[float]:
    """The losses of 20 optimizer steps, with another rate for experts and dense blocks."""
    model = build_model(model_config(ffn=ffn, dim=32, **changes), seed=0)
    config = OptimConfig.model_validate({"kind": kind, "lr": 0.01, "clip": 0.5, "groups": {"ffn": {"lr": 0.5}}})
    optimizer = build_optimizer(model, config, torch.float32)
    optimizer.set_lr(config.lr)
    rows = torch.randint(0, 50, (8, 17), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(20):
        batch = Batch(rows[:, :-1], rows[:, 1:], torch.zeros(8, 16, dtype=torch.long))
        output = model(batch.tokens_BT, targets_BT=batch.targets_BT)
        loss = micro_batch_loss(output, batch, None, torch.tensor(128.0), BalanceConfig(aux=0.1, z=0.1))
        losses.append(loss.tokens.item())
        loss.total.backward()
        optimizer.step(squares=optimizer.gradient_squares().tolist())
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("changes", [{}, {"parametrization": "mup", "base_dim": 12}], ids=["standard", "mup"])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_mixture_of_one_expert_is_bitwise_equal_to_the_dense_model(kind: str, changes: dict[str, Any]) -> None:
    sparse = train_losses({"kind": "moe", "hidden_dim": 48, "num_experts": 1, "top_k": 1}, kind, **changes)
    dense = train_losses({"kind": "dense", "hidden_dim": 48}, kind, **changes)
    assert sparse == dense
    assert dense[-1] < dense[0]
