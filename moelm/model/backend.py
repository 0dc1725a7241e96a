"""Which implementation of an operation runs: eager CPU code with a custom backward, or the plain formula.

In eager mode on a CPU each elementwise operation is a pass over memory, and a custom backward saves passes. GPUs and
compilers get the plain formula.
"""

import torch
from torch import Tensor


def eager_on_cpu(x: Tensor) -> bool:
    """Whether `x` is on a CPU and no compiler fuses its operations."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def use_custom_backward(x: Tensor) -> bool:
    """Whether an operation on `x` should use its custom backward."""
    return torch.is_grad_enabled() and eager_on_cpu(x)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matrix products with `x`: autocast's dtype, or its own."""
    return autocast_dtype(x.device.type) or x.dtype


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype of autocast on a kind of device, if it is enabled."""
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
