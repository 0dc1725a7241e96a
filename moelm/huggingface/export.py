"""A run exported to a directory in the Hugging Face format: config, weights, tokenizer, model card."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import processors
from torch import Tensor

from moelm.atomic import atomic_directory, require_empty_directory
from moelm.config import RunConfig
from moelm.data.tokenizer import Tokenizer
from moelm.errors import MoelmError
from moelm.huggingface.architectures import architecture_for
from moelm.huggingface.config_json import to_hf_config
from moelm.huggingface.model_card import model_card
from moelm.huggingface.weight_map import TensorMapping, Weights, build_weight_map
from moelm.runs.checkpoint import read_progress, read_weights
from moelm.runs.directory import RunDirectory
from moelm.runs.identity import load_run_config, load_tokenizer

StorageDtype = Literal["stored", "float32", "bf16", "float16"]
_DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "float16": torch.float16}
_NEVER_CONVERTED = "e_score_correction_bias"
"""The selection bias of sigmoid routers, which transformers stores in float32 whatever the dtype of the weights."""


def export_run(
    name: str | Path, out: Path, checkpoint: str = "last", dtype: StorageDtype = "stored", shard_gb: float = 5.0
) -> str:
    """Write a checkpoint of a run as config, weights, tokenizer and model card; after an error nothing is left.

    Args:
        name: the run's directory, or its name under `runs/`.
        out: a directory that does not exist yet, or is empty.
        checkpoint: `last`, `best` or a step number.
        dtype: of the stored weights; `stored` leaves every bit as it is in the run.
        shard_gb: maximum gigabytes in one file of weights.

    Returns:
        The `model_type` of config.json.

    Raises:
        MoelmError: a setting that the format cannot express, a directory that is not empty, a full disk.
    """
    run = RunDirectory.find(name)
    config = load_run_config(run)
    architecture = architecture_for(config.model)
    directory = require_empty_directory(out)
    path = run.checkpoint(checkpoint)
    tokenizer = load_tokenizer(run)
    weights = read_weights(path)
    mappings = build_weight_map(config.model, architecture)
    convert_to = _DTYPES.get(dtype)
    dtype_name = str(convert_to or weights["embedding.weight"].dtype).removeprefix("torch.")
    try:
        with atomic_directory(directory) as work:
            special_ids = _special_ids(tokenizer)
            hf_config = {**to_hf_config(config.model), **special_ids, "dtype": dtype_name, "torch_dtype": dtype_name}
            _write_json(work / "config.json", hf_config)
            _write_json(work / "generation_config.json", special_ids)
            _write_tokenizer(work, tokenizer, config)
            _write_weights(work, mappings, weights, convert_to, shard_gb * 1e9)
            card = model_card(run, config, read_progress(path), architecture, dtype_name)
            (work / "README.md").write_text(card, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise MoelmError(f"{out} cannot be written: {getattr(error, 'strerror', None) or error}.") from error
    return architecture.model_type


def _special_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    eos_ids = list(tokenizer.eos_ids)
    eos = eos_ids if len(eos_ids) > 1 else tokenizer.eos_id
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": eos, "pad_token_id": tokenizer.eos_id}


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_tokenizer(directory: Path, tokenizer: Tokenizer, config: RunConfig) -> None:
    """Write the tokenizer with a template that puts the start token before every text, as moelm does."""
    raw = tokenizer.raw
    bos, eos = raw.id_to_token(tokenizer.bos_id), raw.id_to_token(tokenizer.eos_id)
    if tokenizer.records_tokens or raw.encode("").ids != [tokenizer.bos_id]:
        pair = [bos, "$A", bos, "$B"]
        raw.post_processor = processors.TemplateProcessing(pair[:2], pair, [(bos, tokenizer.bos_id)])
    tokenizer.save(directory / "tokenizer.json")
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": eos,
        **({} if tokenizer.unknown_id is None else {"unk_token": raw.id_to_token(tokenizer.unknown_id)}),
        "add_bos_token": True,
        "add_eos_token": False,
        "split_special_tokens": True,  # text that spells a special token stays text
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.max_seq_len,
    }
    _write_json(directory / "tokenizer_config.json", settings)


def _write_weights(
    directory: Path, mappings: list[TensorMapping], weights: Weights, convert_to: torch.dtype | None, shard_bytes: float
) -> None:
    """Write one file, or several with an index; besides `weights`, only the tensors of one file are in memory."""
    shards = list(_split_into_shards(mappings, weights, convert_to, shard_bytes))
    file_names: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        tensors = {mapping.hf_name: _hf_tensor(mapping, weights, convert_to) for mapping in shard}
        save_file(tensors, directory / name, metadata={"format": "pt"})
        # safetensors makes its files readable by their owner only.
        (directory / name).chmod((directory / "config.json").stat().st_mode)
        total += sum(tensor.nbytes for tensor in tensors.values())
        file_names |= dict.fromkeys(tensors, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": file_names}
        _write_json(directory / "model.safetensors.index.json", index)


def _hf_tensor(mapping: TensorMapping, weights: Weights, convert_to: torch.dtype | None) -> Tensor:
    """A contiguous copy of a Hugging Face tensor, converted to a dtype.

    Raises:
        MoelmError: a value that is too large for the dtype.
    """
    tensor = mapping.to_hf(weights)
    if convert_to is None or mapping.hf_name.endswith(_NEVER_CONVERTED):
        return tensor.clone(memory_format=torch.contiguous_format)
    converted = tensor.to(convert_to, copy=True, memory_format=torch.contiguous_format)
    if not converted.isfinite().all() and tensor.isfinite().all():
        largest = float(tensor.abs().max())
        raise MoelmError(f"{mapping.hf_name} reaches {largest:.3g}, too large for {convert_to}; choose another dtype.")
    return converted


def _split_into_shards(
    mappings: list[TensorMapping], weights: Weights, convert_to: torch.dtype | None, shard_bytes: float
) -> Iterator[list[TensorMapping]]:
    """The tensors of each file, in order; a new file begins where the next tensor would exceed the limit."""
    shard: list[TensorMapping] = []
    size = 0
    for mapping in mappings:
        source = weights[mapping.names[0]] if mapping.names else next(iter(weights.values()))
        nbytes = torch.Size(mapping.hf_shape).numel() * (convert_to or source.dtype).itemsize
        if shard and size + nbytes > shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append(mapping)
        size += nbytes
    yield shard
