"""What a run has recorded of its model, data and tokenizer, and the check of what is used against it."""

import os
from pathlib import Path

from moelm.config import (
    ModelConfig,
    MoEFFNConfig,
    RunConfig,
    check_section,
    differing,
    flatten,
    format_override,
    load_config,
)
from moelm.data.identity import DataRecord
from moelm.data.tokenizer import Tokenizer, tokenizer_fingerprint
from moelm.errors import MoelmError
from moelm.runs.directory import RunDirectory
from moelm.runs.record import read_environment

WITHOUT_EFFECT = ("init_", "max_seq_len", "ffn.balance", "ffn.capacity_factor")
"""Prefixes of model settings that do not change what given weights compute."""


def effective_settings(model: ModelConfig) -> dict[str, object]:
    """The settings that change what given weights compute, by dotted name and with their defaults resolved."""
    resolved = {"num_kv_heads": model.kv_heads, "head_dim": model.size_per_head, "unique_layers": model.num_unique_layers}
    settings = flatten(model.model_copy(update=resolved))
    effective = {key: value for key, value in settings.items() if not key.startswith(WITHOUT_EFFECT)}
    if isinstance(model.ffn, MoEFFNConfig) and model.ffn.router.kind == "topk" and model.ffn.balance.bias:
        effective["ffn.balance.bias"] = "above 0"  # the rate has no effect on given weights, but the bias is one of them
    return effective


def load_run_config(run: RunDirectory) -> RunConfig:
    """The config of a run.

    Raises:
        MoelmError: config.yaml is missing or malformed, or describes another model than the recorded one.
    """
    config = load_config(run.config)
    tree = read_environment(run).get("model")
    if not isinstance(tree, dict):
        raise MoelmError(
            f"{run.environment} has no model, because an earlier version of moelm made the run; make it again under "
            "another name."
        )
    recorded = effective_settings(check_section(ModelConfig, tree, f"{run.environment}, model"))
    found = effective_settings(config.model)
    if different := differing(found, recorded):
        now, before = (format_override(f"model.{different[0]}", each.get(different[0])) for each in (found, recorded))
        raise MoelmError(f"{run.config} has {now}, but the weights of the run were made with {before}; restore it.")
    return config


def read_data_record(run: RunDirectory) -> DataRecord | None:
    """What the run has recorded of its data; None for an imported or upcycled run that has not been trained.

    Raises:
        MoelmError: environment.json is missing, broken or of an earlier version.
    """
    environment = read_environment(run)
    if "origin" in environment:
        return None
    values = [environment.get(key) for key in DataRecord._fields]
    for key, value in zip(DataRecord._fields, values, strict=True):
        if not isinstance(value, str):
            raise MoelmError(
                f"{run.environment} has no {key}, because an earlier version of moelm made the run; choose another "
                "name=... and train it again."
            )
    record = DataRecord(*map(str, values))
    # A relative folder is below the directory in which the run was trained, which is one of those that contain the run.
    folders = [base / record.data_folder for base in (Path(), *run.path.resolve().parents)]
    return record._replace(data_folder=str(next(filter(os.path.isdir, folders), folders[0])))


def recorded_tokenizer(run: RunDirectory) -> str:
    """The fingerprint of the run's tokenizer.

    Raises:
        MoelmError: it is not recorded, or tokenizer.json is another one.
    """
    recorded = read_environment(run).get("tokenizer_fingerprint")
    if not isinstance(recorded, str):
        raise MoelmError(f"{run.environment} has no tokenizer_fingerprint; it is not a run that moelm trained or imported.")
    if (found := tokenizer_fingerprint(run.tokenizer)) != recorded:
        raise MoelmError(
            f"{run.tokenizer} is not the tokenizer of this run: its hash is {found} instead of {recorded}; "
            "the file that the run was made with is expected."
        )
    return recorded


def load_tokenizer(run: RunDirectory) -> Tokenizer:
    """The tokenizer of a run.

    Raises:
        MoelmError: see `recorded_tokenizer`.
    """
    recorded_tokenizer(run)
    return Tokenizer.load(run.tokenizer)


def check_data_tokenizer(run: RunDirectory, data: DataRecord) -> None:
    """Refuse to use a run's weights with the data of another tokenizer.

    Raises:
        MoelmError: the tokenizers differ.
    """
    if recorded_tokenizer(run) != data.tokenizer_fingerprint:
        raise MoelmError(
            f"The weights of {run.path} belong to another tokenizer than the data in {data.data_folder}; "
            f"set data.tokenizer to {{kind: file, path: {run.tokenizer}}}."
        )
