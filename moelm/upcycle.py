"""Sparse upcycling: a dense model's feed-forward blocks become the experts of a mixture (Komatsuzaki et al. 2023)."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moelm.config import DenseFFNConfig, RunConfig, apply_overrides, check_config, refuse_overrides
from moelm.errors import MoelmError
from moelm.model import Transformer, build_model
from moelm.model.moe.experts import Experts, expert_stacks
from moelm.model.rng import named_generator
from moelm.runs.checkpoint import read_weights, step_of
from moelm.runs.directory import RunDirectory
from moelm.runs.identity import load_run_config, load_tokenizer
from moelm.runs.load import create_run


def upcycle_run(
    name: str | Path,
    new_name: str,
    num_experts: int,
    top_k: int,
    noise: float = 0.0,
    reinit: float = 0.0,
    checkpoint: str = "last",
    overrides: Sequence[str] = (),
) -> RunDirectory:
    """Make a sparse run from a dense one; with gates that sum to 1 it has at first the dense model's logits.

    Args:
        name: the dense run's directory, or its name under `runs/`.
        new_name: of the sparse run, under `runs/`; or a path.
        num_experts: copies of each feed-forward block.
        top_k: experts per token; each is as wide as the dense block, so compute grows with it.
        noise: see `add_noise`.
        reinit: see `reinitialize_units`.
        checkpoint: `last`, `best` or a step number.
        overrides: `key=value` settings of the new run's config.

    Raises:
        MoelmError: the run is sparse already, or a setting does not fit.
    """
    dense, run = RunDirectory.find(name), RunDirectory.new(new_name)
    if not math.isfinite(noise):
        raise MoelmError(f"noise is {noise}; a finite number is expected.")
    config = _sparse_config(dense, run, num_experts, top_k, overrides)
    hidden_dim = config.model.ffn.hidden_dim
    if reinit and not round(reinit * hidden_dim):
        raise MoelmError(f"reinit is {reinit}, less than one of {hidden_dim} hidden units.")
    path = dense.checkpoint(checkpoint)
    tokenizer = load_tokenizer(dense)
    model = build_model(config.model, config.seed)
    copy_dense_weights(read_weights(path), model)
    for layer, experts in enumerate(expert_stacks(model)):
        for expert in range(num_experts):
            generator = named_generator(f"{config.seed}/upcycle/{layer}/{expert}")
            reinitialize_units(experts, expert, reinit, generator)
            add_noise(experts, expert, noise, generator)
    origin: dict[str, Any] = {"upcycling of": str(dense.path), "step": step_of(path)}
    origin |= {"num_experts": num_experts, "noise": noise, "reinit": reinit}
    create_run(run, config, tokenizer, model.state_dict(), origin)
    return run


def _sparse_config(
    dense: RunDirectory, run: RunDirectory, num_experts: int, top_k: int, overrides: Sequence[str]
) -> RunConfig:
    """The dense run's config with a sparse feed-forward block, the new name, and `init_from` naming the new run itself."""
    dense_config = load_run_config(dense)
    ffn = dense_config.model.ffn
    if not isinstance(ffn, DenseFFNConfig):
        raise MoelmError(f"The run {dense.path} is a mixture of experts already; a dense one can be upcycled.")
    refuse_overrides(overrides, allowed=("model.ffn.router", "model.ffn.balance", "model.ffn.capacity_factor"))
    tree = dense_config.model_dump(mode="json", exclude_none=True)
    tree["model"]["ffn"] = {
        "kind": "moe",
        "hidden_dim": ffn.hidden_dim,
        "depth": ffn.depth,
        "num_experts": num_experts,
        "top_k": top_k,
    }
    apply_overrides(tree, overrides)
    tree |= {"name": run.path.name, "init_from": {"run": str(run.path), "checkpoint": "0"}}
    return check_config(tree, f"{run.path}/config.yaml")


@torch.no_grad()
def copy_dense_weights(dense: dict[str, Tensor], model: Transformer) -> None:
    """Copy a dense model's weights into a sparse model, those of a feed-forward block to every expert.

    Routers keep their random initialization.

    Args:
        dense: weights by name.
        model: the sparse model.
    """
    for name, weight in model.named_parameters():
        if ".router." not in name:
            weight.copy_(dense[name.replace(".experts.", ".")].expand_as(weight))


@torch.no_grad()
def add_noise(experts: Experts, expert: int, noise: float, generator: torch.Generator) -> None:
    """Add normal noise to the weights of one expert, so that the copies diverge sooner.

    Args:
        noise: its standard deviation, in standard deviations of each weight matrix.
    """
    if noise:
        for stack in (experts.w1, experts.w2, experts.w3):
            weight = stack[expert]
            weight += torch.empty_like(weight).normal_(generator=generator) * (noise * weight.std())


@torch.no_grad()
def reinitialize_units(experts: Experts, expert: int, fraction: float, generator: torch.Generator) -> None:
    """Reinitialize a random fraction of one expert's hidden units (drop-upcycling, Nakamura et al. 2025, section 3).

    The new weights are normal, with mean and standard deviation of the replaced ones. The units are the same in the three
    matrices and differ between experts.

    Args:
        fraction: of the hidden units.
    """
    hidden_dim = experts.w1.shape[1]
    units = torch.randperm(hidden_dim, generator=generator)[: round(fraction * hidden_dim)]
    if not len(units):
        return
    for stack, dim in ((experts.w1, 0), (experts.w2, 1), (experts.w3, 0)):
        old = stack[expert].index_select(dim, units)
        new = torch.empty_like(old).normal_(generator=generator) * old.std() + old.mean()
        stack[expert].index_copy_(dim, units, new)
