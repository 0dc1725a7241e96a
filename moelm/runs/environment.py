"""environment.json: versions, machine, data fingerprints and model of a run."""

import datetime
import hashlib
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from moelm import __version__
from moelm.config import RunConfig
from moelm.data.loader import PreparedData
from moelm.distributed.parallel_dims import ParallelDims
from moelm.model import count_flops, count_parameters


def describe_code() -> str:
    """A hash of this package's source code, which all processes of a run must share."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def describe_environment(
    config: RunConfig, data: PreparedData, device: torch.device, dtype: torch.dtype, dims: ParallelDims
) -> dict[str, Any]:
    """The content of environment.json."""
    flops = count_flops(config.model, config.data.seq_len)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "moelm": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "device": f"{device.type} ({name})",
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": dims.size,
        "parallel_dims": dims.as_settings(),
        "precision": "bf16" if dtype == torch.bfloat16 else "fp32",
        "command": shlex.join(["moelm", *sys.argv[1:]]),
        **data.record._asdict(),
        "lossy": data.lossy,
        "model": config.model.model_dump(mode="json", exclude_none=True),
        "parameters": count_parameters(config.model)._asdict(),
        "flops_per_token": flops._asdict(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
