"""The machine: device, precision, peak FLOP/s, memory. Nothing here depends on models."""

import ctypes
import os
import resource
import sys
import time
from functools import cache
from typing import Literal, NamedTuple

import torch

from moelm.errors import MoelmError


class Device(NamedTuple):
    """A GPU model, from its vendor's data sheet; bandwidths are bytes per second in one direction."""

    name_part: str
    """Part of the device name that CUDA reports."""
    peak_bf16: float
    """Dense FLOP/s."""
    memory: float
    """Bytes."""
    memory_bandwidth: float
    link: float
    """To other GPUs of the same machine."""
    network: float
    """To other machines; 400 Gb/s per GPU for newer ones."""


DEVICES = {
    "h100": Device("H100", 989e12, 80e9, 3.35e12, 450e9, 50e9),
    "h200": Device("H200", 989e12, 141e9, 4.8e12, 450e9, 50e9),
    "b200": Device("B200", 2250e12, 180e9, 8e12, 900e9, 50e9),
    "a100": Device("A100", 312e12, 80e9, 2.04e12, 300e9, 25e9),
    "l40s": Device("L40S", 362e12, 48e9, 0.86e12, 32e9, 25e9),
    "l4": Device("L4", 121e12, 24e9, 0.3e12, 32e9, 12.5e9),
    "4090": Device("4090", 165e12, 24e9, 1.01e12, 32e9, 12.5e9),
}
"""By the name for `moelm plan --device`; those without NVLink communicate over PCIe."""

MIN_BF16_SPEEDUP = 1.25
"""Speed of a CPU's bfloat16 products relative to float32 that `auto` requires; with native support it is 2 or more."""

Precision = Literal["fp32", "bf16"]


def keep_memory() -> None:
    """Configure glibc to keep freed memory instead of returning it to the system.

    A training step repeatedly frees and allocates the same large buffers; by default each allocation is a new mapping with
    a page fault for every page. Steps of the demo models become 1.2 to 1.4 times as fast. Other C libraries: no effect.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # absent from other C libraries, such as musl
    if mallopt is not None:
        m_trim_threshold, m_mmap_max = -1, -4
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)


def pick_device() -> torch.device:
    """This process's GPU, by its local rank, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    number, available = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= available:
        raise MoelmError(
            f"There are {available} GPUs here for {os.environ.get('LOCAL_WORLD_SIZE')} processes; one each is needed."
        )
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    return device


def pick_precision(device: torch.device) -> Precision:
    """The precision for `train.precision: auto` on this machine: bf16 if its products are clearly faster, otherwise fp32.

    CPUs are timed, because some have bfloat16 instructions that are slower than float32.
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if not _cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"}:
        return "fp32"
    gain = peak_flops(device, torch.bfloat16) / peak_flops(device, torch.float32)
    return "bf16" if gain > MIN_BF16_SPEEDUP else "fp32"


def dtype_of(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products for a `train.precision`."""
    wanted = pick_precision(device) if precision == "auto" else precision
    return torch.bfloat16 if wanted == "bf16" else torch.float32


def should_compile(wanted: bool | str, device: torch.device) -> bool:
    """Whether to compile, for a value of `parallel.compile`; `auto` compiles on GPUs only."""
    return device.type == "cuda" if wanted == "auto" else bool(wanted)


def _cpu_flags() -> set[str]:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            lines = [line for line in file if line.startswith(("flags", "Features"))]
    except OSError:
        return set()
    return set(lines[0].split()) if lines else set()


@cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that MFU is relative to: from a GPU's data sheet, or from the fastest of a few timed matrix products."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = [kind.peak_bf16 for kind in DEVICES.values() if kind.name_part in name]
        if known:
            return known[0]
    size = 1024 if device.type == "cpu" else 8192
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        (a @ b).sum().item()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def peak_memory(device: torch.device) -> int:
    """Peak memory so far in bytes: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024
