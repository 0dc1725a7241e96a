"""The choice of precision for a CPU."""

import pytest
import torch

from moelm import hardware

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("flags", "gain", "expected"),
    [({"avx2"}, 9.0, "fp32"), ({"avx512_bf16"}, 0.5, "fp32"), ({"amx_bf16"}, 4.0, "bf16")],
)
def test_bfloat16_is_chosen_if_supported_and_faster(
    flags: set[str], gain: float, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "_cpu_flags", lambda: flags)
    monkeypatch.setattr(hardware, "peak_flops", lambda device, dtype: gain if dtype == torch.bfloat16 else 1.0)
    assert hardware.pick_precision(CPU) == expected
    assert hardware.dtype_of("auto", CPU) == (torch.bfloat16 if expected == "bf16" else torch.float32)


def test_a_named_precision_is_used() -> None:
    assert hardware.dtype_of("bf16", CPU) == torch.bfloat16
    assert hardware.dtype_of("fp32", CPU) == torch.float32
