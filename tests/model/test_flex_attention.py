"""FlexAttention against the boolean mask, in values and gradients; traced, and computed by its definition in torch.

Its kernel is for GPUs only. On CPUs torch refuses gradients of it, a check that these tests remove.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.attention import flex_attention as torch_flex

from moelm.config import DenseFFNConfig, ModelConfig
from moelm.distributed.parallelize import apply_activation_checkpointing
from moelm.model import Transformer, build_model, flex_attention
from moelm.model.flex_attention import MIN_HEAD_DIM, flex_mask, use_flex_attention
from tests.tolerance import assert_close

LENGTH = 300
"""More than two of the kernel's blocks."""


def config_with(window: int | None = None, cap: float | None = None, num_heads: int = 4) -> ModelConfig:
    return ModelConfig(
        vocab_size=50,
        dim=64,
        num_layers=1,
        num_heads=num_heads,
        num_kv_heads=2,
        window=window,
        attention_logit_cap=cap,
        ffn=DenseFFNConfig(kind="dense", hidden_dim=32),
    )


def documents(seed: int = 0) -> Tensor:
    """Documents of random lengths, other ones in each row."""
    starts_BT = torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(seed)) < 0.02
    return starts_BT.cumsum(1)


def logits_and_gradients(model: Transformer, forward: Callable[..., object], segments_BT: Tensor | None) -> list[Tensor]:
    tokens_BT = torch.randint(50, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    logits = forward(tokens_BT, segments_BT=segments_BT).logits  # type: ignore[attr-defined]
    return [logits.detach(), *torch.autograd.grad(logits.sin().sum(), list(model.parameters()))]


@pytest.fixture
def used_on_cpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    masks = []

    def mask(*args: Any) -> torch_flex.BlockMask:
        masks.append(args[0])
        return flex_mask(*args)

    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    monkeypatch.setattr("moelm.model.attention.use_flex_attention", lambda config, device, compiled: compiled)
    monkeypatch.setattr("moelm.model.attention.flex_mask", mask)
    torch._dynamo.reset()
    counters.clear()
    yield
    assert masks


@pytest.mark.usefixtures("used_on_cpus")
@pytest.mark.slow(seconds=5)
@pytest.mark.parametrize(
    ("window", "cap", "masked", "checkpointing"),
    [(None, None, True, "none"), (50, None, False, "none"), (None, 0.1, False, "none"), (50, 0.1, True, "full")],
    ids=["documents", "window", "cap", "all, recomputed"],
)
def test_it_equals_the_boolean_mask(window: int | None, cap: float | None, masked: bool, checkpointing: str) -> None:
    model = build_model(config_with(window, cap), seed=0)
    segments_BT = documents() if masked else None
    expected = logits_and_gradients(model, model, segments_BT)
    apply_activation_checkpointing(model, checkpointing)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for found, wanted in zip(logits_and_gradients(model, compiled, segments_BT), expected, strict=True):
        assert_close(found, wanted)


@pytest.mark.usefixtures("used_on_cpus")
@pytest.mark.slow(seconds=5)
def test_compiled_blocks_get_a_mask_that_is_made_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    create = torch.compile(torch_flex.create_block_mask, backend="aot_eager")
    monkeypatch.setattr(flex_attention, "_compiled_create_block_mask", lambda: create)
    model = build_model(config_with(50), seed=0)
    expected = [logits_and_gradients(model, model, documents(seed)) for seed in range(2)]
    model.compiled_blocks = True
    for block in model.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    for seed in range(2):
        for found, wanted in zip(logits_and_gradients(model, model, documents(seed)), expected[seed], strict=True):
            assert_close(found, wanted)
        assert counters["stats"]["unique_graphs"] == 2  # the mask, and the equal blocks; other documents need no more


@pytest.mark.parametrize(
    ("device", "dtype", "compiled", "num_heads", "used"),
    [
        ("cuda", torch.bfloat16, True, 64 // MIN_HEAD_DIM, True),
        ("cuda", torch.bfloat16, True, 128 // MIN_HEAD_DIM, False),
        ("cuda", torch.bfloat16, False, 4, False),
        ("cuda", None, True, 4, False),
        ("cpu", torch.bfloat16, True, 4, False),
    ],
    ids=["GPU", "small heads", "not compiled", "float32", "CPU"],
)
def test_where_it_is_used(
    device: str, dtype: torch.dtype | None, compiled: bool, num_heads: int, used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flex_attention, "autocast_dtype", lambda device_type: dtype)
    assert use_flex_attention(config_with(num_heads=num_heads), torch.device(device), compiled) == used
