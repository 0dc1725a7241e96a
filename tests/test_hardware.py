"""The choice of precision for a CPU, and GPUs by their names."""

import itertools
import json
import os
from pathlib import Path

import pytest
import torch

from moelm import hardware

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("MOELM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def set_speedup(monkeypatch: pytest.MonkeyPatch, gain: float, flags: set[str] | None = None) -> None:
    """Pretend that bfloat16 products are so many times as fast."""
    monkeypatch.setattr(hardware, "_cpu_flags", lambda: flags or {"amx_bf16"})
    monkeypatch.setattr(hardware, "peak_flops", lambda device, dtype: gain if dtype == torch.bfloat16 else 1.0)


@pytest.mark.parametrize(
    ("flags", "gain", "expected"),
    [({"avx2"}, 9.0, "fp32"), ({"avx512_bf16"}, 0.5, "fp32"), ({"amx_bf16"}, 4.0, "bf16")],
)
def test_bfloat16_is_chosen_if_supported_and_faster(
    flags: set[str], gain: float, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_speedup(monkeypatch, gain, flags)
    assert hardware.pick_precision(CPU) == expected
    assert hardware.dtype_of("auto", CPU) == (torch.bfloat16 if expected == "bf16" else torch.float32)


def test_a_named_precision_is_used() -> None:
    assert hardware.dtype_of("bf16", CPU) == torch.bfloat16
    assert hardware.dtype_of("fp32", CPU) == torch.float32


def test_the_choice_is_settled_once(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_speedup(monkeypatch, 4.0)
    assert hardware.pick_precision(CPU) == "bf16"
    (path,) = cache_folder.iterdir()
    stored = json.loads(path.read_text())
    assert (stored["precision"], stored["threads"], stored["torch"]) == ("bf16", torch.get_num_threads(), torch.__version__)
    set_speedup(monkeypatch, 1.0)  # as on a machine that is busy now
    assert hardware.pick_precision(CPU) == "bf16"
    path.unlink()
    assert hardware.pick_precision(CPU) == "fp32"


@pytest.mark.parametrize("text", ["", "[]", '{"precision": "bf16"}', '{"cpu": 1', '"bf16"'])
def test_an_unreadable_or_foreign_choice_is_made_again(
    cache_folder: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    set_speedup(monkeypatch, 4.0)
    hardware.pick_precision(CPU)
    (path,) = cache_folder.iterdir()
    path.write_text(text)
    set_speedup(monkeypatch, 1.0)
    assert hardware.pick_precision(CPU) == "fp32"
    assert json.loads(path.read_text())["precision"] == "fp32"
    assert list(cache_folder.iterdir()) == [path]


def test_another_number_of_threads_is_another_choice(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_speedup(monkeypatch, 4.0)
    hardware.pick_precision(CPU)
    set_speedup(monkeypatch, 1.0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert hardware.pick_precision(CPU) == "fp32"
    assert len(list(cache_folder.iterdir())) == 2


def test_of_two_runs_that_start_together_both_use_the_first_choice(
    cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_speedup(monkeypatch, 4.0)
    hardware.pick_precision(CPU)
    read, answers = hardware._read_precision, iter([None])
    monkeypatch.setattr(hardware, "_read_precision", lambda *arguments: next(answers, read(*arguments)))
    set_speedup(monkeypatch, 1.0)
    assert hardware.pick_precision(CPU) == "bf16"


def test_a_cache_that_cannot_be_written_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cache").write_text("a file")
    set_speedup(monkeypatch, 4.0)
    assert hardware.pick_precision(CPU) == "bf16"
    assert "Warning: train.precision: auto is bf16 here, but" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("reported", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA L40", "l40"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA GeForce RTX 4090", "4090"),
    ],
)
def test_a_device_is_found_by_the_words_of_its_name(reported: str, name: str) -> None:
    assert hardware.device_named(reported) is hardware.DEVICES[name]


def test_an_unknown_device_is_timed() -> None:
    assert hardware.device_named("NVIDIA T4") is None


def test_deterministic_kernels_are_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        hardware.use_deterministic_kernels(torch.device("cpu"))
        assert not torch.are_deterministic_algorithms_enabled()
        hardware.use_deterministic_kernels(torch.device("cuda"))
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
        assert os.environ.pop("CUBLAS_WORKSPACE_CONFIG") == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.mark.parametrize(("seconds", "size"), [(1e-6, 1024), (0.01, 1024), (0.1, 256)])
def test_no_larger_product_is_timed_after_a_long_one(monkeypatch: pytest.MonkeyPatch, seconds: float, size: int) -> None:
    clock = itertools.count()
    monkeypatch.setattr("moelm.hardware.time.perf_counter", lambda: next(clock) * seconds)
    assert hardware.peak_flops.__wrapped__(CPU, torch.float32) == pytest.approx(2 * size**3 / seconds, rel=1e-6)
