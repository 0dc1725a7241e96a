"""A run as a directory that Hugging Face's library, and whatever reads its format, loads."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import processors
from torch import Tensor

from moelm.checkpoint import read_progress, read_weights
from moelm.config import RunConfig, load_config
from moelm.data.tokenizer import UNKNOWN, Tokenizer
from moelm.errors import MoelmError
from moelm.folders import free_folder, whole_folder
from moelm.interop.architectures import Settings, architecture_for, write_settings
from moelm.interop.card import write_card
from moelm.interop.places import Place, Weights, find_places
from moelm.rundir import RunDirectory

Precision = Literal["stored", "float32", "bf16", "float16"]
_DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "float16": torch.float16}
_KEPT_WHOLE = "e_score_correction_bias"
"""A bias of sigmoid routers that the library keeps in float32 beside weights of any dtype."""


def export_run(
    name: str | Path, out: Path, checkpoint: str = "last", precision: Precision = "stored", shard_gb: float = 5.0
) -> str:
    """Write a checkpoint of a run as config, weights, tokenizer and model card, all or nothing.

    Args:
        name: the run's directory, or its name under `runs/`.
        out: a directory that does not exist yet, or is empty.
        checkpoint: `last`, `best` or a step number.
        precision: what the weights are stored in; `stored` leaves every bit as it is in the run.
        shard_gb: most gigabytes in one file of weights.

    Returns:
        The `model_type` it became.

    Raises:
        MoelmError: a setting that the format cannot express, a directory that is not empty, a full disk.
    """
    run = RunDirectory.find(name)
    config = load_config(run.config)
    architecture = architecture_for(config.model)
    folder = free_folder(out)
    path = run.checkpoint(checkpoint)
    tokenizer = Tokenizer.load(run.tokenizer)
    weights = read_weights(path)
    places = find_places(config.model, architecture)
    dtype = _DTYPES.get(precision, weights["embedding.weight"].dtype)
    try:
        with whole_folder(folder) as work:
            _write_json(work / "config.json", _settings(config, tokenizer, dtype))
            _write_json(work / "generation_config.json", _special_ids(tokenizer))
            _write_tokenizer(work, tokenizer, config)
            _write_weights(work, places, weights, None if precision == "stored" else dtype, shard_gb * 1e9)
            card = write_card(run, config, read_progress(path), architecture, str(dtype).removeprefix("torch."))
            (work / "README.md").write_text(card, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise MoelmError(f"{out} cannot be written: {getattr(error, 'strerror', None) or error}.") from error
    return architecture.name


def _settings(config: RunConfig, tokenizer: Tokenizer, dtype: torch.dtype) -> Settings:
    name = str(dtype).removeprefix("torch.")
    return {**write_settings(config.model), **_special_ids(tokenizer), "dtype": name, "torch_dtype": name}


def _special_ids(tokenizer: Tokenizer) -> Settings:
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    return {**ids, "pad_token_id": tokenizer.eos_id}


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, config: RunConfig) -> None:
    """The tokenizer with a template that opens every text with the start token, as moelm opens documents and prompts."""
    raw = tokenizer.raw
    bos, eos = raw.id_to_token(tokenizer.bos_id), raw.id_to_token(tokenizer.eos_id)
    if raw.encode("a").ids != [tokenizer.bos_id, *tokenizer.encode_batch(["a"])[0]]:
        template = processors.TemplateProcessing(f"{bos} $A", f"{bos} $A {bos} $B", [(bos, tokenizer.bos_id)])
        raw.post_processor = template
    tokenizer.save(folder / "tokenizer.json")
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": bos,
            "eos_token": eos,
            "pad_token": eos,
            **({"unk_token": UNKNOWN} if raw.token_to_id(UNKNOWN) is not None else {}),
            "add_bos_token": True,
            "add_eos_token": False,
            "split_special_tokens": True,  # text that spells a special token stays text
            "clean_up_tokenization_spaces": False,
            "model_max_length": config.max_seq_len,
        },
    )


def _write_weights(folder: Path, places: list[Place], weights: Weights, dtype: torch.dtype | None, limit: float) -> None:
    """One file, or several with an index; only one file's tensors are held beside the weights."""
    shards = list(_shards(places, weights, dtype, limit))
    index: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        tensors = {place.theirs: _ready(place, weights, dtype) for place in shard}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        (folder / name).chmod((folder / "config.json").stat().st_mode)  # the library writes for its user alone
        total += sum(tensor.nbytes for tensor in tensors.values())
        index |= dict.fromkeys(tensors, name)
    if len(shards) > 1:
        _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})


def _ready(place: Place, weights: Weights, dtype: torch.dtype | None) -> Tensor:
    """A tensor of its own, in the dtype asked for.

    Raises:
        MoelmError: a number that is too large for it.
    """
    tensor = place.read(weights)
    if dtype is None or place.theirs.endswith(_KEPT_WHOLE):
        return tensor.clone(memory_format=torch.contiguous_format)
    ready = tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)
    if not ready.isfinite().all() and tensor.isfinite().all():
        raise MoelmError(f"{place.theirs} reaches {float(tensor.abs().max()):.3g}, too large for {dtype}; choose another.")
    return ready


def _shards(places: list[Place], weights: Weights, dtype: torch.dtype | None, limit: float) -> Iterator[list[Place]]:
    """Cut the list of tensors where the next one would pass the limit."""
    shard: list[Place] = []
    held = 0
    for place in places:
        like = weights[place.ours[0]] if place.ours else next(iter(weights.values()))
        size = torch.Size(place.shape).numel() * (dtype or like.dtype).itemsize
        if shard and held + size > limit:
            yield shard
            shard, held = [], 0
        shard.append(place)
        held += size
    yield shard
