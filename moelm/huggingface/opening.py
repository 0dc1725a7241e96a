"""A directory in the Hugging Face format opened as it is, without a run, in the dtype of its weights; all of them, or those
of one layer at a time."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moelm.config import RunConfig, apply_overrides, check_config, read_tree
from moelm.data.loader import open_folder
from moelm.data.prepare import prepare
from moelm.data.tokenizer import Tokenizer
from moelm.errors import MoelmError
from moelm.hardware import keep_memory, pick_device
from moelm.huggingface.importing import WeightReader, default_settings, load_tokenizer, read_config
from moelm.model.init import assign_weights, build_from_weights
from moelm.model.transformer import Block, Transformer
from moelm.runs.load import OpenedRun, load_run, open_run


def is_hf_directory(name: str) -> bool:
    """Whether a name is that of a directory in the Hugging Face format, and not of a run."""
    return (Path(name) / "config.json").is_file() and not (Path(name) / "config.yaml").exists()


def open_model(name: str, checkpoint: str, split: str, data: Path | None = None, stream_layers: bool = False) -> OpenedRun:
    """Open a run, or a directory in the Hugging Face format, with a split of its data.

    Args:
        name: a run's directory, its name under `runs/`, or a directory in the Hugging Face format.
        checkpoint: of a run.
        split: `val` or `train`.
        data: a config, whose data section a model in the Hugging Face format reads; default: moelm's builtin corpus. The
            data is prepared with the model's tokenizer if it is not yet.
        stream_layers: whether the weights of one layer at a time are in memory; each forward pass reads them anew.

    Raises:
        MoelmError: what `open_run` and `import_model` raise, or a config for the data of a run.
    """
    if not is_hf_directory(name):
        if data is not None:
            raise MoelmError(f"--data is {data}, but {name} is not in the Hugging Face format; a run has its own data.")
        if stream_layers:
            raise MoelmError(f"--stream-layers reads directories in the Hugging Face format, but {name} is none.")
        return open_run(name, checkpoint, split)
    _refuse_checkpoint(name, checkpoint)
    return _open_hf_directory(Path(name), split, data, stream_layers)


def load_model(name: str, checkpoint: str, device: torch.device) -> tuple[Transformer, Tokenizer, RunConfig]:
    """Load a run, or a directory in the Hugging Face format, with its tokenizer and config, without data.

    Raises:
        MoelmError: what `load_run` and `import_model` raise.
    """
    if not is_hf_directory(name):
        return load_run(name, checkpoint, device)
    _refuse_checkpoint(name, checkpoint)
    source = Path(name)
    config, tokenizer, reader = _read(source, None)
    return build_from_weights(config.model, reader.read()).to(device).eval(), tokenizer, config


def _refuse_checkpoint(name: str, checkpoint: str) -> None:
    if checkpoint != "last":
        raise MoelmError(f"--checkpoint is {checkpoint}, but {name} is in the Hugging Face format, without checkpoints.")


def _read(source: Path, data: Path | None) -> tuple[RunConfig, Tokenizer, WeightReader]:
    """The config of a directory with the data of another config, its tokenizer, and a reader of its weights."""
    architecture, model = read_config(source)
    config = _config_of(source, model, data)
    tokenizer = load_tokenizer(source / "tokenizer.json", source, config)
    # The data must begin with the token that the model's texts begin with, which may be its end token.
    tokenizer_config = config.data.tokenizer.model_copy(update={"bos": tokenizer.bos_id})
    config = config.model_copy(update={"data": config.data.model_copy(update={"tokenizer": tokenizer_config})})
    return config, tokenizer, WeightReader(source, config, architecture)


@torch.no_grad()
def _open_hf_directory(source: Path, split: str, data: Path | None, stream_layers: bool) -> OpenedRun:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise MoelmError(f"{source} is in the Hugging Face format, which one process reads; moelm import makes it a run.")
    keep_memory()
    config, tokenizer, reader = _read(source, data)
    device = pick_device()
    if stream_layers:
        model = build_from_weights(config.model, reader.read_root(), strict=False)
        _stream_layers(model, reader, device)
        for outer in (model.embedding, model.norm, model.head):
            if outer is not None:
                outer.to(device)
    else:
        model = build_from_weights(config.model, reader.read()).to(device)
    folder, _ = prepare(config.data)
    opened = open_folder(config, folder)
    if opened.tokenizer.bos_id != tokenizer.bos_id or opened.tokenizer.vocab_size != tokenizer.vocab_size:
        raise MoelmError(f"The data in {folder} was prepared with another tokenizer than {source / 'tokenizer.json'}.")
    weight_dtype = model.embedding.weight.dtype
    dtype = weight_dtype if weight_dtype in (torch.bfloat16, torch.float16) else torch.float32
    rows = opened.val if split == "val" else opened.train
    return OpenedRun(model.eval(), tokenizer, config, rows, opened.lossy, device, dtype)


def _config_of(source: Path, model: dict[str, Any], data: Path | None) -> RunConfig:
    """A config with this model and its tokenizer, and the data section of another config."""
    tree = {**default_settings(model), "name": "model", "model": model}
    seq_len = tree["data"]["seq_len"]
    if data is not None:
        tree["data"] = read_tree(data).get("data")
    asked = tree["data"].get("tokenizer") if isinstance(tree["data"], dict) else None
    special = {key: asked[key] for key in ("bos", "eos") if asked.get(key) is not None} if isinstance(asked, dict) else {}
    apply_overrides(tree, ["data.tokenizer={}"])
    tree["data"]["tokenizer"] = {"kind": "file", "path": str(source / "tokenizer.json"), **special}
    tree["train"]["batch_tokens"] = tree["data"].setdefault("seq_len", seq_len)
    return check_config(tree, str(data or source))


def _stream_layers(model: Transformer, reader: WeightReader, device: torch.device) -> None:
    """Let each block read its weights before a forward pass, and drop them afterwards."""
    numbers = {block: layer for layer, block in enumerate(model.blocks)}
    without_values = {block: block.state_dict() for block in numbers}

    def read(block: nn.Module, *_: object) -> None:
        assert isinstance(block, Block)
        assign_weights(block, reader.read_layer(numbers[block]))
        block.to(device)

    def drop(block: nn.Module, *_: object) -> None:
        assert isinstance(block, Block)
        block.load_state_dict(without_values[block], assign=True)

    @contextmanager
    def resident(block: Block) -> Iterator[None]:
        read(block)
        try:
            yield
        finally:
            drop(block)

    for block in numbers:
        block.register_forward_pre_hook(read)
        block.register_forward_hook(drop)
    model.resident = resident
