"""A text of two domains with a rule each (a letter is followed by the next one of its alphabet, cyclically), and models
whose experts are known: one rule each, or copies of both."""

import contextlib
import json
import random
from pathlib import Path
from typing import Any

import torch

from moelm.config import RunConfig, check_config
from moelm.data.loader import PreparedData
from moelm.data.prepare import prepare
from moelm.model import Transformer, build_model
from moelm.runs.load import OpenedRun
from tests.analyze.test_collect import ALPHABETS
from tests.conftest import open_data

BYTES = 258


def config_of(**ffn: Any) -> RunConfig:
    """One layer, as wide as the vocabulary."""
    ffn = {"kind": "moe", "hidden_dim": BYTES, "num_experts": 4, "top_k": 1, **ffn}
    return check_config(
        {
            "name": "planted",
            "model": {
                "dim": BYTES,
                "num_layers": 1,
                "num_heads": 1,
                "vocab_size": BYTES,
                "tie_embeddings": False,
                "ffn": ffn,
            },
            "data": {
                "sources": [{"path": f"{name}.jsonl", "domain": name} for name in ALPHABETS],
                "tokenizer": {"kind": "byte"},
                "seq_len": 32,
                "val_fraction": 0.5,
            },
            "train": {"steps": 1, "batch_tokens": 32},
            "optim": {"lr": 1e-3},
        },
        "test",
    )


def planted_data(folder: Path) -> PreparedData:
    """Documents of both domains, as long as a random number of letters."""
    rng = random.Random(0)
    with contextlib.chdir(folder):
        for name, letters in ALPHABETS.items():
            starts = [(rng.randrange(7), rng.randint(10, 60)) for _ in range(80)]
            lines = ["".join(letters[(start + i) % 7] for i in range(length)) for start, length in starts]
            Path(f"{name}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
        prepare(config_of().data)
        opened = open_data(config_of())
        opened.val.split.take(torch.arange(1).numpy())
        return opened


@torch.no_grad()
def planted_model(data: PreparedData, copies: bool) -> Transformer:
    """Tokens are one-hot, and letters of a domain are routed to its own expert: 0 or 1. Without `copies`, this expert alone
    has the rule of the domain; with them, every expert has both rules."""
    model = build_model(config_of().model, seed=0).eval()
    (block,) = model.blocks
    assert model.head is not None
    model.embedding.weight.copy_(torch.eye(BYTES))
    model.head.weight.copy_(torch.eye(BYTES))
    block.attention.wo.weight.zero_()
    router, experts = block.ffn.get_submodule("router"), block.ffn.get_submodule("experts")
    for weight in (router.weight, experts.w1, experts.w2, experts.w3):
        assert isinstance(weight, torch.Tensor)
        weight.zero_()
    for domain, letters in enumerate(ALPHABETS.values()):
        tokens = data.tokenizer.encode_batch([letters])[0]
        assert len(tokens) == len(letters)
        router.weight[domain, tokens] = 1.0
        for expert in range(4) if copies else (domain,):
            experts.w1[expert, tokens, tokens] = 1.0
            experts.w3[expert, tokens, tokens] = 1.0
            experts.w2[expert, [*tokens[1:], tokens[0]], tokens] = 0.05
    return model


def opened(model: Transformer, data: PreparedData, config: RunConfig | None = None) -> OpenedRun:
    """A run with this model, on the validation rows."""
    config = config or config_of()
    return OpenedRun(model, data.tokenizer, config, data.val, False, torch.device("cpu"), torch.float32)
