"""Sparse upcycling: a dense model's feed-forward blocks become the experts of a mixture (Komatsuzaki et al. 2023).

Shapes: E experts, F hidden units, D model width.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moelm.checkpoint import read_weights, step_of
from moelm.config import DenseFFNConfig, MoEFFNConfig, RunConfig, check_config, load_config, override
from moelm.data.tokenizer import Tokenizer
from moelm.errors import MoelmError
from moelm.interop.words import check_words
from moelm.model import Transformer, build_model
from moelm.model.experts import Experts, experts_of
from moelm.model.noise import named_generator
from moelm.rundir import RunDirectory, create_run


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
    """Make a sparse run of a dense one; gates that sum to 1 give it, at first, the dense model's logits.

    Args:
        name: the dense run's directory, or its name under `runs/`.
        new_name: of the sparse run, under `runs/`; or a path.
        num_experts: copies of each feed-forward block.
        top_k: experts that a token visits; each is as wide as the dense block, so the work grows with them.
        noise: see `add_noise`.
        reinit: see `draw_anew`.
        checkpoint: `last`, `best` or a step number.
        overrides: `key=value` words for the new run's config.

    Raises:
        MoelmError: the run is sparse already, or a setting does not fit.
    """
    dense, run = RunDirectory.find(name), RunDirectory.new(new_name)
    if not math.isfinite(noise):
        raise MoelmError(f"noise is {noise}; a finite number is expected.")
    begun = load_config(dense.config)
    config = _sparse_config(begun, dense, run, num_experts, top_k, overrides)
    assert isinstance(config.model.ffn, MoEFFNConfig)
    if reinit and not round(reinit * config.model.ffn.hidden_dim):
        raise MoelmError(f"reinit is {reinit}, less than one of {config.model.ffn.hidden_dim} hidden units.")
    path = dense.checkpoint(checkpoint)
    tokenizer = Tokenizer.load(dense.tokenizer)
    model = build_model(config.model, config.seed)
    spread(read_weights(path), model)
    for number, layer in enumerate(experts_of(model)):
        for expert in range(num_experts):
            generator = named_generator(f"{config.seed}/upcycle/{number}/{expert}")
            draw_anew(layer, expert, reinit, generator)
            add_noise(layer, expert, noise, generator)
    origin: dict[str, Any] = {"upcycling of": str(dense.path), "step": step_of(path)}
    origin |= {"num_experts": num_experts, "noise": noise, "reinit": reinit}
    create_run(run, config, tokenizer, model.state_dict(), origin)
    return run


def _sparse_config(
    begun: RunConfig, dense: RunDirectory, run: RunDirectory, num_experts: int, top_k: int, overrides: Sequence[str]
) -> RunConfig:
    """The dense run's config with another feed-forward block, another name, and its own weights to start with."""
    ffn = begun.model.ffn
    if not isinstance(ffn, DenseFFNConfig):
        raise MoelmError(f"The run {dense.path} is a mixture of experts already; a dense one can be upcycled.")
    check_words(overrides, free=("model.ffn.router", "model.ffn.balance", "model.ffn.capacity_factor"))
    tree = begun.model_dump(mode="json", exclude_none=True)
    kept = {"hidden_dim": ffn.hidden_dim, "depth": ffn.depth}
    tree["model"]["ffn"] = {"kind": "moe", **kept, "num_experts": num_experts, "top_k": top_k}
    override(tree, overrides)
    tree |= {"name": run.path.name, "start": {"run": str(run.path), "checkpoint": "0"}}
    return check_config(tree, f"{run.path}/config.yaml")


@torch.no_grad()
def spread(dense: dict[str, Tensor], model: Transformer) -> None:
    """Copy every dense weight to its namesake, a feed-forward block's to all experts; routers stay as they were drawn."""
    for name, weight in model.named_parameters():
        if ".router." not in name:
            weight.copy_(dense[name.replace(".experts.", ".")].expand_as(weight))


@torch.no_grad()
def add_noise(layer: Experts, expert: int, noise: float, generator: torch.Generator) -> None:
    """Add normal noise to one expert, so that copies part sooner.

    Args:
        noise: its standard deviation, in standard deviations of each weight matrix.
    """
    if noise:
        for stack in (layer.w1, layer.w2, layer.w3):
            weight = stack[expert]
            weight += torch.empty_like(weight).normal_(generator=generator) * (noise * weight.std())


@torch.no_grad()
def draw_anew(layer: Experts, expert: int, part: float, generator: torch.Generator) -> None:
    """Draw a part of one expert's hidden units anew from the mean and deviation of what they were (Nakamura et al. 2025,
    drop-upcycling, section 3): the same units in all three matrices, others in each expert.

    Args:
        part: of the F hidden units.
    """
    hidden = layer.w1.shape[1]
    units = torch.randperm(hidden, generator=generator)[: round(part * hidden)]
    if not len(units):
        return
    for stack, dim in ((layer.w1, 0), (layer.w2, 1), (layer.w3, 0)):
        old = stack[expert].index_select(dim, units)
        drawn = torch.empty_like(old).normal_(generator=generator) * old.std() + old.mean()
        stack[expert].index_copy_(dim, units, drawn)
