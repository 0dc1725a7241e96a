"""What else runs on a GPU, on the fake device: evaluation, sampling, analysis, and what a checkpoint reads and stores.

Upcycling, export and import compute on the CPU. Argument: LIBRARY, in a folder with the trained run tiny-moe.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from moelm.analyze.collect import collect_routing
from moelm.data.identity import folder_to_read
from moelm.data.loader import open_folder
from moelm.distributed.ranks import SINGLE_PROCESS
from moelm.evaluation.losses import evaluate
from moelm.inference.generate import Sampling, generate_tokens
from moelm.model import Transformer
from moelm.runs.checkpoint import list_checkpoints, load_newest, training_state
from moelm.runs.directory import RunDirectory
from moelm.runs.identity import load_run_config
from moelm.train.optimizer import build_optimizer
from tests.gpu_rehearsal import fake_cuda
from tests.gpu_rehearsal.recorder import Recorder

PROMPTS = [[1, 2, 3], [4, 5]]
NEW_TOKENS = 4
SAMPLING = Sampling(NEW_TOKENS, top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=1.1)


def main() -> None:
    """Print the syncs of each pass as one JSON object."""
    device = fake_cuda.install(Path(sys.argv[1]))
    run = RunDirectory.find("tiny-moe")
    config = load_run_config(run)
    data = open_folder(config, folder_to_read(config.data))
    recorder = Recorder(rows=0)
    FakeTensor.tolist, FakeTensor.numpy = (lambda x: recorder.tolist(x)), (lambda x: recorder.numpy(x))
    with torch.device("meta"):
        model = Transformer(config.model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device=device)
        optimizer = build_optimizer(model, config.optim, torch.bfloat16)
        passes: dict[str, Callable[[], object]] = {
            "read a checkpoint": lambda: load_newest(list_checkpoints(run.checkpoints), model, optimizer, SINGLE_PROCESS),
            "state to save": lambda: training_state(model, optimizer),
            "evaluate": lambda: evaluate(model, data.val, torch.bfloat16),
            "sample": lambda: list(generate_tokens(model, PROMPTS, SAMPLING, data.tokenizer.eos_id)),
            "analyze": lambda: collect_routing(model, data.val, 512, 0, torch.bfloat16),
        }
        syncs = {}
        for name, run_pass in passes.items():
            recorder.clear()
            with recorder:
                assert run_pass() is not None
            syncs[name] = dict(recorder.syncs)
    print(json.dumps(syncs))
