"""Evaluation, sampling, analysis and checkpoints on a fake CUDA device: where the host waits for the GPU."""

import json
import os
from pathlib import Path

import pytest

from tests.gpu_rehearsal.passes import NEW_TOKENS
from tests.gpu_rehearsal.passes import main as rehearse
from tests.processes import Process

pytestmark = pytest.mark.slow(seconds=5)

LAYERS = 2


def test_the_host_waits_where_it_is_listed(library: Path, trained: Path) -> None:
    done = Process(rehearse, ["rehearse", str(library)], trained, os.environ).finish()
    assert done.returncode == 0, done.stderr[-3000:]
    syncs = json.loads(done.stdout)
    assert syncs["read a checkpoint"].keys() == {"copy to the GPU in runs/checkpoint.py"}
    assert syncs["state to save"] == {}
    assert syncs["evaluate"] == {"copy to the host in evaluation/losses.py": 1}  # the losses of the one batch
    assert syncs["sample"] == {
        "copy to the GPU in inference/generate.py": 4,  # before the first token
        "tolist in inference/generate.py": NEW_TOKENS,
        "tolist in model/swiglu.py": LAYERS * NEW_TOKENS,  # rows of each expert: experts in float32 have no grouped kernel
    }
    assert syncs["analyze"] == {  # of the one batch; counts are added on the host
        "copy to the GPU in analyze/collect.py": 3,
        "mask in analyze/collect.py": 17,
        "bincount in analyze/counts.py": 3 + 10 * LAYERS,
        "copy to the host in analyze/counts.py": 3 + 10 * LAYERS,
        "copy to the host in analyze/collect.py": 2 * LAYERS,
    }
