"""The time of an analysis compared with that of an evaluation of the same text."""

import contextlib
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moelm.analyze.collect import collect_routing
from moelm.config import check_config
from moelm.data.prepare import prepare
from moelm.evaluation.losses import evaluate
from moelm.model import build_model
from tests.conftest import open_data


def cpu_time(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


@pytest.mark.slow
@pytest.mark.exhaustive
def test_analyzing_a_model_of_the_demos_shape_takes_less_than_three_evaluations(tmp_path: Path) -> None:
    rng = random.Random(0)
    (tmp_path / "text.txt").write_text(
        "\n".join("".join(rng.choices("abcdefgh ", k=rng.randint(50, 400))) for _ in range(200))
    )
    config = check_config(
        {
            "name": "shape",
            "model": {
                "dim": 128,
                "num_layers": 4,
                "num_heads": 4,
                "vocab_size": 4096,
                "ffn": {"kind": "moe", "hidden_dim": 256, "num_experts": 8, "top_k": 2},
            },
            "data": {
                "sources": [{"path": "text.txt", "documents": "line"}],
                "tokenizer": {"kind": "byte"},
                "seq_len": 256,
                "val_fraction": 0.5,
            },
            "train": {"steps": 1, "batch_tokens": 256},
            "optim": {"lr": 1e-3},
        },
        "test",
    )
    with contextlib.chdir(tmp_path):
        prepare(config.data)
        rows = open_data(config).val
        model = build_model(config.model, seed=0)
        ratios = []
        for _ in range(3):
            evaluated = cpu_time(lambda: evaluate(model, rows, torch.float32))
            analyzed = cpu_time(lambda: collect_routing(model, rows, 10**6, 0, torch.float32))
            ratios.append(analyzed / evaluated)
    assert min(ratios[1:]) < 3, ratios
