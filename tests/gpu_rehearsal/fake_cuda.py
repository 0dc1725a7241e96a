"""A fake CUDA device for fake tensors: their shapes, dtypes, strides and devices are checked, and nothing is computed.

It replaces parts of torch for good, so it needs a process of its own.
"""

import contextlib
import ctypes
import subprocess
from pathlib import Path
from typing import Any

import torch
import torch.cuda.amp.common

SOURCE = Path(__file__).with_suffix(".cpp")


def build(folder: Path) -> Path:
    """Compile the device with g++; returns the library."""
    torch_folder = Path(torch.__file__).parent
    library = folder / "fake_cuda.so"
    include, link = torch_folder / "include", torch_folder / "lib"
    options = ["-O0", "-std=c++20", "-shared", "-fPIC", f"-I{include}", f"-I{include}/torch/csrc/api/include"]
    libraries = [f"-L{link}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{link}"]
    subprocess.run(["g++", *options, str(SOURCE), "-o", str(library), *libraries], check=True, capture_output=True)
    return library


def install(library: Path) -> torch.device:
    """Make the device available in this process."""
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL).use_fake_cuda()
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    replaced: dict[str, Any] = {
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "is_bf16_supported": lambda including_emulation=True: True,
        "get_device_name": lambda device=None: "NVIDIA H100 80GB HBM3",
        "get_device_capability": lambda device=None: (9, 0),
        "max_memory_allocated": lambda device=None: 0,
        "Stream": _Stream,
        "Event": _Stream,
        "current_stream": lambda device=None: _Stream(),
        "default_stream": lambda device=None: _Stream(),
        "stream": lambda stream: contextlib.nullcontext(),
    }
    for name, value in replaced.items():
        setattr(torch.cuda, name, value)
    torch.Tensor.pin_memory = lambda tensor, device=None: tensor  # type: ignore[method-assign]
    return torch.device("cuda", 0)


class _Stream:
    """A stream or an event: everything on it has happened."""

    device, device_index, device_type, stream_id = torch.device("cuda", 0), 0, 1, 0

    def __init__(self, *args: Any, **options: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **options: self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    def __hash__(self) -> int:
        return 0
