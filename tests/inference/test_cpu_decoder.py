"""The CPU decoder against the model's forward pass."""

from typing import Any

import pytest
import torch

from moelm.inference.cpu_decoder import build_decoder
from moelm.model import KVCache, build_model
from tests.model.test_transformer import MODELS, MOE, fill_biases, model_config
from tests.tolerance import assert_close

CASES: list[dict[str, Any]] = [
    {"window": 4},
    {"num_kv_heads": 1, "ffn": {**MOE, "shared_experts": 1, "router": {"kind": "random"}}},
    {
        "ffn": {**MOE, "router": {"kind": "topk", "normalize": False}},
        "output_multiplier": 0.5,
        "embedding_multiplier": 2.0,
        "parametrization": "mup",
        "base_dim": 8,
    },
]


@pytest.mark.parametrize("config", [*MODELS, *(model_config(**case) for case in CASES)])
@pytest.mark.parametrize("starts", [None, [0, 2, 5]])
def test_steps_equal_the_forward_pass(config: Any, starts: list[int] | None) -> None:
    model = fill_biases(build_model(config, seed=0).eval())
    tokens = torch.randint(0, 50, (3, 12), generator=torch.Generator().manual_seed(0))
    caches = [KVCache(config, 3, 12, tokens.device, None if starts is None else torch.tensor(starts)) for _ in range(2)]
    with torch.inference_mode():
        for cache in caches:
            model(tokens[:, :8], cache=cache)
        step = build_decoder(model, caches[0])
        for position in range(8, 12):
            expected = model(tokens[:, position : position + 1], cache=caches[1]).logits[:, -1]
            assert_close(step(tokens[:, position]), expected)


def test_an_unselected_expert_is_not_read() -> None:
    config = model_config(num_layers=1)
    model = build_model(config, seed=0).eval()
    cache = KVCache(config, 1, 4, torch.device("cpu"))
    token = torch.tensor([7])
    with torch.inference_mode():
        chosen = set(model(token[:, None]).routings[0].experts_NK.flatten().tolist())
        for expert in set(range(4)) - chosen:
            for weight in (model.layers[0].ffn.experts.w1, model.layers[0].ffn.experts.w2, model.layers[0].ffn.experts.w3):
                weight[expert] = float("nan")
        assert build_decoder(model, cache)(token).isfinite().all()
