"""Evaluation, sampling, analysis and checkpoints on a CUDA device that is not there."""

import json
import os
from pathlib import Path

import pytest

from tests.gpu_rehearsal.passes import NEW_TOKENS
from tests.gpu_rehearsal.passes import main as rehearse
from tests.processes import Process

pytestmark = pytest.mark.slow(seconds=5)

LAYERS = 2


def test_the_host_waits_for_the_results_alone(library: Path, trained: Path) -> None:
    done = Process(rehearse, ["rehearse", str(library)], trained, os.environ).finish()
    assert done.returncode == 0, done.stderr[-3000:]
    syncs = json.loads(done.stdout)
    assert syncs["read a checkpoint"] == syncs["state to save"] == {}
    assert syncs["evaluate"] == {"copy to the host in evaluation/losses.py": 1}  # the losses of the one batch
    assert syncs["sample"] == {
        "tolist in inference/generate.py": NEW_TOKENS,
        "tolist in model/swiglu.py": LAYERS * NEW_TOKENS,  # rows of each expert: experts in float32 have no grouped kernel
    }
    # Counts are added on the host; nothing waits for anything else.
    assert {sync.split(" in ")[1] for sync in syncs["analyze"]} == {"analyze/collect.py", "analyze/counts.py"}
