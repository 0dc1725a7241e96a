"""The machine: device, precision, peak FLOP/s, memory. Nothing here depends on models."""

import ctypes
import hashlib
import json
import os
import platform
import resource
import sys
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.utils.deterministic

from moelm.atomic import temporary_path
from moelm.console import warn
from moelm.errors import MoelmError


class Device(NamedTuple):
    """A GPU model, from its vendor's data sheet; bandwidths are bytes per second in one direction."""

    name: str
    """Words of the device name that CUDA reports."""
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
    "h100-nvl": Device("H100 NVL", 835e12, 94e9, 3.9e12, 300e9, 50e9),
    "h100-pcie": Device("H100 PCIe", 756e12, 80e9, 2e12, 64e9, 50e9),
    "h200": Device("H200", 989e12, 141e9, 4.8e12, 450e9, 50e9),
    "b200": Device("B200", 2250e12, 180e9, 8e12, 900e9, 50e9),
    "a100": Device("A100", 312e12, 80e9, 2.04e12, 300e9, 25e9),
    "l40": Device("L40", 181e12, 48e9, 0.86e12, 32e9, 25e9),
    "l40s": Device("L40S", 362e12, 48e9, 0.86e12, 32e9, 25e9),
    "l4": Device("L4", 121e12, 24e9, 0.3e12, 32e9, 12.5e9),
    "4090": Device("4090", 165e12, 24e9, 1.01e12, 32e9, 12.5e9),
}
"""By the name for `moelm plan --device`; those without NVLink communicate over PCIe."""

MIN_BF16_SPEEDUP = 1.25
"""Speed of a CPU's bfloat16 products relative to float32 that `auto` requires; with native support it is 2 or more."""

LONG_PRODUCT_S = 0.02
"""Seconds of a matrix product beyond which no larger one is timed."""

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

    CPUs are timed, because some have bfloat16 instructions that are slower than float32. They are timed once, because the
    result depends on what else the machine is doing, and the runs of a comparison must have the same; it is kept in
    `cache_folder`.
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if not _cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"}:
        return "fp32"
    key = {"cpu": _cpu_model(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]
    path = cache_folder() / f"precision-{name}.json"
    if (stored := _read_precision(path, key)) is not None:
        return stored
    gain = peak_flops(device, torch.bfloat16) / peak_flops(device, torch.float32)
    chosen: Precision = "bf16" if gain > MIN_BF16_SPEEDUP else "fp32"
    try:
        _store_first(path, json.dumps(key | {"precision": chosen, "bf16_speedup": round(gain, 2)}, indent=1), key)
    except OSError as error:
        warn(f"train.precision: auto is {chosen} here, but {path} cannot be written for other runs ({error.strerror}).")
    return _read_precision(path, key) or chosen


def cache_folder() -> Path:
    """The folder of what is measured once for a machine: `MOELM_CACHE`, or `moelm` in the user's cache directory."""
    if chosen := os.environ.get("MOELM_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "moelm"


def _read_precision(path: Path, key: dict[str, Any]) -> Precision | None:
    """The precision that was chosen for this machine; None without a readable file of this machine."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(stored, dict) or {name: stored.get(name) for name in key} != key:
        return None
    precision = stored.get("precision")
    return precision if precision in ("fp32", "bf16") else None


def _store_first(path: Path, text: str, key: dict[str, Any]) -> None:
    """Write the file, unless another process has meanwhile: of two that start together, both use the first choice."""
    path.parent.mkdir(parents=True, exist_ok=True)
    work = temporary_path(path)
    try:
        work.write_text(text, encoding="utf-8")
        with suppress(OSError):  # it exists, or the file system has no hard links
            os.link(work, path)
        if _read_precision(path, key) is None:
            work.replace(path)
    finally:
        work.unlink(missing_ok=True)


def dtype_of(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products for a `train.precision`."""
    wanted = pick_precision(device) if precision == "auto" else precision
    return torch.bfloat16 if wanted == "bf16" else torch.float32


def use_deterministic_kernels(device: torch.device) -> None:
    """Have torch use kernels whose results do not vary on GPUs; cuBLAS and NCCL read this when they are initialized.

    Attention is then computed without cuDNN, gradients are added in a fixed order, and compiled kernels are not chosen by
    timing. An operation without such a kernel raises an error; training uses none that torch lists.
    """
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.use_deterministic_algorithms(True)


def should_compile(wanted: bool | str, device: torch.device) -> bool:
    """Whether to compile, for a value of `parallel.compile`; `auto` compiles on GPUs only."""
    return device.type == "cuda" if wanted == "auto" else bool(wanted)


def _cpu_flags() -> set[str]:
    return set(_cpu_info("flags", "Features").split())


def _cpu_model() -> str:
    return _cpu_info("model name") or platform.processor() or platform.machine()


def _cpu_info(*names: str) -> str:
    """A value of the first CPU; empty where the system has no such file or value."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(names)), "")


def device_named(name: str) -> Device | None:
    """The device all words of whose name are in the one that CUDA reports; of several, the one with the most words."""
    words = set(name.replace("-", " ").split())
    known = [kind for kind in DEVICES.values() if words.issuperset(kind.name.split())]
    return max(known, key=lambda kind: len(kind.name.split()), default=None)


@cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that MFU is relative to: a GPU's in bfloat16 by its data sheet, or by the fastest of a few matrix products."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        known = device_named(torch.cuda.get_device_name(device))
        if known is not None:
            return known.peak_bf16
    peak = 0.0
    for size in (256, 512, 1024) if device.type == "cpu" else (8192,):
        a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
        fastest = float("inf")
        for _ in range(8):
            start = time.perf_counter()
            (a @ b).sum().item()
            fastest = min(fastest, time.perf_counter() - start)
        peak = max(peak, 2 * size**3 / fastest)
        if fastest > LONG_PRODUCT_S:  # bfloat16 without instructions for it: a larger product would take seconds
            break
    return peak


def peak_memory(device: torch.device) -> int:
    """Peak memory so far in bytes: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024
