"""environment.json: what a run ran on and with, for comparisons and for reproducing it."""

import datetime
import platform
import sys
from typing import Any

import torch

from moelm import __version__
from moelm.config import RunConfig
from moelm.data.loader import PreparedData
from moelm.model import count_flops, count_parameters


def describe_environment(config: RunConfig, data: PreparedData, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Versions, machine, command, fingerprints of the data and size of the model."""
    flops = count_flops(config.model, config.data.seq_len)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "moelm": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "device": f"{device.type} ({name})",
        "threads": torch.get_num_threads(),
        "precision": "bf16" if dtype == torch.bfloat16 else "float32",
        "command": " ".join(["moelm", *sys.argv[1:]]),
        "data_fingerprint": data.data_fingerprint,
        "tokenizer_fingerprint": data.tokenizer_fingerprint,
        "eval_fingerprint": data.eval_fingerprint,
        "parameters": count_parameters(config.model)._asdict(),
        "flops_per_token": flops._asdict(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
