"""FlexAttention against the boolean mask, in values and gradients; traced, and computed by its definition in torch.

Its kernel is for GPUs only. On CPUs torch refuses gradients of it, a check that these tests remove.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex

from moelm.config import DenseFFNConfig, ModelConfig
from moelm.distributed.parallelize import apply_activation_checkpointing
from moelm.model import Transformer, build_model, flex_attention
from moelm.model.flex_attention import MIN_HEAD_DIM, use_flex_attention
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


def documents() -> Tensor:
    """Documents of random lengths, other ones in each row."""
    starts_BT = torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(0)) < 0.02
    return starts_BT.cumsum(1)


def logits_and_gradients(model: Transformer, forward: Callable[..., object], segments_BT: Tensor | None) -> list[Tensor]:
    tokens_BT = torch.randint(50, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    logits = forward(tokens_BT, segments_BT=segments_BT).logits  # type: ignore[attr-defined]
    return [logits.detach(), *torch.autograd.grad(logits.sin().sum(), list(model.parameters()))]


@pytest.fixture
def used_on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    monkeypatch.setattr("moelm.model.attention.use_flex_attention", lambda config, device, compiled: compiled)


@pytest.mark.usefixtures("used_on_cpus")
@pytest.mark.slow(seconds=5)
@pytest.mark.parametrize(
    ("window", "cap", "masked", "checkpointing"),
    [(None, None, True, "none"), (50, None, False, "none"), (None, 0.1, False, "none"), (50, 0.1, True, "full")],
    ids=["documents", "window", "cap", "all, recomputed"],
)
def test_it_equals_the_boolean_mask(window: int | None, cap: float | None, masked: bool, checkpointing: str) -> None:
    torch._dynamo.reset()
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
    torch._dynamo.reset()
    create = torch.compile(torch_flex.create_block_mask, backend="aot_eager")
    monkeypatch.setattr(flex_attention, "_compiled_create_block_mask", lambda: create)
    model = build_model(config_with(50), seed=0)
    expected = logits_and_gradients(model, model, documents())
    model.compiled_blocks = True
    for block in model.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    for found, wanted in zip(logits_and_gradients(model, model, documents()), expected, strict=True):
        assert_close(found, wanted)


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
