"""The optimizer: AdamW and Muon by parameter group.

Gradient clipping is a factor that the update applies, not a pass over the gradients.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from moelm.config import OptimConfig
from moelm.model import Transformer
from moelm.model.dtensor import local, local_slices
from moelm.model.roles import head_counts
from moelm.train.gradient_norm import gradient_norm, gradient_squares
from moelm.train.muon import Muon
from moelm.train.parameter_groups import build_groups


class Optimizer(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019), fused, and Muon for the groups of that kind.

    Args:
        groups: from `build_groups`.
        config: betas, eps, momentum, steps of the orthogonalization, and the limit of the gradient norm.
        heads: see `head_counts`.
        dtype: dtype of the orthogonalization.
    """

    def __init__(
        self, groups: list[dict[str, Any]], config: OptimConfig, heads: Mapping[Tensor, int], dtype: torch.dtype
    ) -> None:
        super().__init__(groups, {"lr": config.lr})
        self.config = config
        matrices: list[nn.Parameter] = []
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = _fresh_state(group["kind"], parameter)
            matrices += group["params"] if group["kind"] == "muon" else []
        blocks = [heads[parameter] if config.split_heads and parameter in heads else 1 for parameter in matrices]
        self.muon = Muon(matrices, blocks, config.momentum, config.newton_schulz_steps, dtype) if matrices else None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters of all groups."""
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next step; each group has its factor on it."""
        for group in self.param_groups:
            group["lr"] = lr * group["lr_factor"]

    def gradient_squares(self) -> Tensor:
        """Squared norms of the gradients on this process, by matrix; see the function."""
        return gradient_squares(self.parameters)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None, *, squares: Sequence[float]) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient.

        Args:
            closure: unused; torch's interface has it.
            squares: `gradient_squares`, summed over processes.
        """
        norm = gradient_norm(squares)
        scale = min(1.0, self.config.clip / (norm + 1e-6))
        for group in self.param_groups:
            if group["kind"] == "adamw":
                with torch.profiler.record_function("adamw"):
                    self._adamw(group, scale)
        if self.muon is not None:
            zero = _zero_gradients(self.parameters, squares)
            with torch.profiler.record_function("muon"):
                self.muon.step([group for group in self.param_groups if group["kind"] == "muon"], self.state, scale, zero)

    def _adamw(self, group: dict[str, Any], scale: float) -> None:
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        states = [self.state[parameter] for parameter in parameters]
        if not parameters:
            return
        adamw(
            [local(parameter) for parameter in parameters],
            [local(parameter.grad) for parameter in parameters],
            [local(state["exp_avg"]) for state in states],
            [local(state["exp_avg_sq"]) for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            # The kernel divides gradients by it.
            grad_scale=None if scale == 1.0 else torch.full((), 1 / scale, device=parameters[0].device),
            amsgrad=False,
            beta1=self.config.beta1,
            beta2=self.config.beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=self.config.eps,
            maximize=False,
        )


def build_optimizer(model: Transformer, config: OptimConfig, dtype: torch.dtype) -> Optimizer:
    """The optimizer of a model that is on its device and distributed already.

    Args:
        dtype: dtype of matrix products, in which Muon orthogonalizes.
    """
    return Optimizer(build_groups(model, config), config, head_counts(model), dtype)


def _fresh_state(kind: str, parameter: Tensor) -> dict[str, Tensor]:
    if kind == "muon":
        return {"momentum": torch.zeros_like(parameter)}
    return {
        "step": torch.zeros((), device=parameter.device),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }


def _zero_gradients(parameters: Iterable[nn.Parameter], squares: Sequence[float]) -> dict[nn.Parameter, list[bool]]:
    """For each parameter, which of its matrices on this process have no gradient anywhere."""
    zero, start = {}, 0
    for parameter in parameters:
        stacked = parameter.dim() == 3
        end = start + (len(parameter) if stacked else 1)
        own = squares[start:end][local_slices(parameter)[0]] if stacked else squares[start:end]
        zero[parameter] = [square == 0 for square in own]
        start = end
    return zero
