"""Settings of a config that have no effect, or another one than their name promises.

They are reported, not refused: configs share settings through their `base`, and some of them apply to a part of the
configs.
"""

from collections.abc import Iterator

from pydantic import BaseModel

from moelm.config.ffn import MoEFFNConfig
from moelm.config.run import OptimConfig, RunConfig


def describe_ineffective(config: RunConfig) -> list[str]:
    """One sentence for each setting without effect that is not at its default."""
    return [*_schedule(config), *_model(config), *_experts(config), *_others(config)]


def _changed(section: BaseModel, name: str) -> bool:
    return bool(getattr(section, name) != type(section).model_fields[name].default)


def _schedule(config: RunConfig) -> Iterator[str]:
    optim, steps = config.optim, config.train.steps
    if optim.warmup_steps > steps:
        peak = optim.lr * steps / optim.warmup_steps
        yield (
            f"optim.warmup_steps is {optim.warmup_steps:,} and train.steps is {steps:,}, so the learning rate never "
            f"reaches its peak: it ends at {peak:.3g} of {optim.lr:.3g}."
        )
    elif optim.warmup_steps == steps > 1:
        yield f"optim.warmup_steps is {steps:,}, all of train.steps, so the learning rate only rises."
    yield from _schedule_settings(optim)


def _schedule_settings(optim: OptimConfig) -> Iterator[str]:
    if optim.schedule != "wsd" and _changed(optim, "decay_fraction"):
        yield (f"optim.decay_fraction is {optim.decay_fraction:g}, but only the schedule wsd has it, not {optim.schedule}.")
    if optim.schedule == "constant" and _changed(optim, "min_lr_ratio"):
        yield f"optim.min_lr_ratio is {optim.min_lr_ratio:g}, but the schedule constant does not decay."


def _model(config: RunConfig) -> Iterator[str]:
    window, longest = config.model.window, max(config.max_seq_len, config.data.seq_len)
    if window is not None and window >= longest:
        yield f"model.window is {window:,}, not below the longest context of {longest:,}, so attention is full in training."


def _experts(config: RunConfig) -> Iterator[str]:
    ffn = config.model.ffn
    if not isinstance(ffn, MoEFFNConfig):
        return
    kind, balance = ffn.router.kind, ffn.balance
    alone = ffn.top_k == ffn.num_experts
    if ffn.capacity_factor is not None and ffn.capacity_factor * ffn.top_k >= ffn.num_experts:
        yield (
            f"model.ffn.capacity_factor is {ffn.capacity_factor:g}, but no expert can have more than "
            f"{ffn.num_experts / ffn.top_k:g} times the mean load, so nothing is dropped."
        )
    own = type(ffn).model_validate({**ffn.model_dump(exclude={"balance"}), "balance": {}}).balance
    for name in ("aux", "importance", "load", "bias"):
        weight = getattr(balance, name)
        if alone and weight and weight != getattr(own, name):
            yield f"model.ffn.balance.{name} is {weight:g}, but each token goes to all experts, so all loads are equal."
    if balance.scope != "global" and not (balance.aux or balance.importance or balance.load):
        yield f"model.ffn.balance.scope is {balance.scope}, but no balance loss has a weight."
    constant = kind == "noisy_topk" or (kind in ("topk", "sigmoid") and getattr(ffn.router, "normalize", False))
    if ffn.top_k == 1 and not alone and constant:
        advice = "" if kind == "noisy_topk" else "; model.ffn.router.normalize=false prevents that"
        yield f"model.ffn.top_k is 1, so the gate is constant and the router learns nothing from the loss{advice}."


def _others(config: RunConfig) -> Iterator[str]:
    parallel, tokenizer, wandb = config.parallel, config.data.tokenizer, config.wandb
    sources = config.data.sources
    if len(sources) == 1 and sources[0].weight is not None:
        yield f"the weight of {sources[0].label} is {sources[0].weight:g}, but there is no other source."
    if parallel.dp_shard == 1 and parallel.dense_shard in (1, "auto") and not parallel.reshard_after_forward:
        yield "parallel.reshard_after_forward is false, but parallel.dp_shard is 1, so nothing is sharded."
    if tokenizer.kind != "bpe":
        for name in ("vocab_size", "train_bytes"):
            if _changed(tokenizer, name):
                value = getattr(tokenizer, name)
                yield f"data.tokenizer.{name} is {value:,}, but only the kind bpe has it, not {tokenizer.kind}."
    if wandb.mode == "disabled" and _changed(wandb, "project"):
        yield f"wandb.project is {wandb.project}, but wandb.mode is disabled."
