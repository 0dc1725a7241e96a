"""A model in the Hugging Face format imported as a run at step 0.

Names and shapes of all tensors are compared before the first tensor is read. Besides the weights, only one file is mapped
into memory at a time.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from moelm.config import RunConfig, apply_overrides, check_config, read_tree, refuse_overrides
from moelm.console import warn
from moelm.data.special_tokens import BOS
from moelm.data.tokenizer import Tokenizer
from moelm.errors import MoelmError
from moelm.huggingface.architectures import Architecture
from moelm.huggingface.config_json import from_hf_config
from moelm.huggingface.weight_map import TensorMapping, Weights, build_weight_map, weight_shapes
from moelm.runs.directory import RunDirectory
from moelm.runs.load import create_run

IGNORED_SUFFIX = ".rotary_emb.inv_freq"
"""Tensors of old files that repeat what config.json says."""
HF_HEAD = "lm_head.weight"
MAX_LISTED = 4
"""Maximum number of tensors that an error lists."""

TensorFiles = dict[str, Path]
"""The file of each tensor, by the tensor's Hugging Face name."""


def import_model(
    source: Path, name: str, overrides: Sequence[str] = (), config: Path | None = None, tokenizer: Path | None = None
) -> RunDirectory:
    """Make a run from a directory with config.json and safetensors; after an error nothing is left.

    Args:
        source: the directory.
        name: of the run, under `runs/`; or a path.
        overrides: `key=value` settings of the run's config, such as its data and schedule.
        config: a YAML file for the run's settings other than model and tokenizer; default: moelm's builtin corpus.
        tokenizer: a tokenizer.json, if the directory has none.

    Raises:
        MoelmError: another format or architecture; tensors that are unknown, missing or of another shape, with their names.
    """
    run = RunDirectory.new(name)
    architecture, model = read_config(source)
    run_config = _run_config(run, model, config, overrides)
    loaded_tokenizer = load_tokenizer(tokenizer or source / "tokenizer.json", source, run_config)
    weights = WeightReader(source, run_config, architecture).read()
    dtypes = sorted({str(weight.dtype).removeprefix("torch.") for weight in weights.values()})
    origin = {"import of": str(source), "model_type": architecture.model_type, "dtype": ", ".join(dtypes)}
    create_run(run, run_config, loaded_tokenizer, weights, origin)
    return run


class WeightReader:
    """Reads the weights of a directory, all or those of one layer.

    Raises:
        MoelmError: tensors that are unknown, missing or of another shape.
    """

    def __init__(self, source: Path, config: RunConfig, architecture: Architecture) -> None:
        self._files = _without_further_layers(_find_tensors(source), architecture, config.model.num_layers)
        self._mappings = _match_tensors(self._files, config, architecture, source)
        self._shapes = weight_shapes(config.model)
        self._layer_weights: Weights = {}

    def read(self) -> Weights:
        """All weights, in the dtype of their tensors; selection biases of zero where there are none."""
        return self._with_biases("", _read_tensors(self._files, self._mappings, self._shapes))

    def read_layer(self, layer: int) -> Weights:
        """Those of one layer, by their names within it; the next call overwrites them."""
        prefix = f"layers.{layer}."
        files = {name: path for name, path in self._files.items() if name.startswith(f"model.{prefix}")}
        memory = {prefix + name: weight for name, weight in self._layer_weights.items()}
        weights = self._with_biases(prefix, _read_tensors(files, self._mappings, self._shapes, memory))
        self._layer_weights = {name.removeprefix(prefix): weight for name, weight in weights.items()}
        return dict(self._layer_weights)

    def read_root(self) -> Weights:
        """Those outside of the layers."""
        files = {name: path for name, path in self._files.items() if not name.startswith("model.layers.")}
        return _read_tensors(files, self._mappings, self._shapes)

    def _with_biases(self, prefix: str, weights: Weights) -> Weights:
        biases = [name for name in self._shapes if name.startswith(prefix) and name.endswith("router.bias")]
        return {name: torch.zeros(self._shapes[name]) for name in biases} | weights


def read_config(source: Path) -> tuple[Architecture, dict[str, Any]]:
    """The architecture of a directory, and the `model` section of a moelm config.

    Raises:
        MoelmError: no config.json, or one that moelm does not support.
    """
    return from_hf_config(_read_json(source / "config.json"), str(source / "config.json"))


def _without_further_layers(files: TensorFiles, architecture: Architecture, num_layers: int) -> TensorFiles:
    """The tensors without those of layers that predict further tokens, which generation does not use."""
    if architecture.model_type != "glm4_moe":
        return files
    prefix = f"model.layers.{num_layers}."
    kept = {name: path for name, path in files.items() if not name.startswith(prefix)}
    if len(kept) < len(files):
        warn(f"{len(files) - len(kept)} tensors of the layer that predicts the token after the next are left out.")
    return kept


def default_settings(model: dict[str, Any]) -> dict[str, Any]:
    """The settings of a config other than its model, if no file gives them: moelm's builtin corpus, in rows of 1,024 tokens
    at most."""
    seq_len = min(1024, model["max_seq_len"])
    return {
        "data": {"sources": [{"name": "builtin"}], "seq_len": seq_len},
        "train": {"steps": 1000, "batch_tokens": 8 * seq_len},
        "optim": {"lr": 1e-4},
    }


def _run_config(run: RunDirectory, model: dict[str, Any], config: Path | None, overrides: Sequence[str]) -> RunConfig:
    """The config of the new run; `init_from` names the run itself, so that a copy trained under another name finds it."""
    refuse_overrides(
        overrides,
        allowed=("model.ffn.balance", "model.ffn.capacity_factor", "data.tokenizer.bos", "data.tokenizer.eos"),
        fixed=("name", "init_from", "model", "data.tokenizer"),
    )
    tree = read_tree(config) if config is not None else default_settings(model)
    tree["model"] = model
    apply_overrides(tree, ["data.tokenizer={}", *overrides])
    tree["data"]["tokenizer"] |= {"kind": "file", "path": str(run.tokenizer)}
    tree |= {"name": run.path.name, "init_from": {"run": str(run.path), "checkpoint": "0"}}
    return check_config(tree, f"{run.path}/config.yaml")


def load_tokenizer(path: Path, source: Path, config: RunConfig) -> Tokenizer:
    """The tokenizer; its start and end tokens must be among the model's tokens."""
    if not path.exists():
        raise MoelmError(
            f"There is no {path}; give a tokenizer with --tokenizer (transformers' AutoTokenizer converts other formats "
            "and saves a tokenizer.json)."
        )
    asked = config.data.tokenizer
    tokenizer = Tokenizer.load(path, asked.bos, asked.eos, source)
    if tokenizer.added == [BOS]:  # models without a start token separate texts by the end token
        eos = tokenizer.raw.id_to_token(tokenizer.eos_id)
        warn(f"{source} has no start token; moelm begins texts with {eos} ({tokenizer.eos_id}), which ends them.")
        tokenizer = Tokenizer.load(path, tokenizer.eos_id, asked.eos, source)
    if tokenizer.added:
        raise MoelmError(
            f"{path} has no start or end token that moelm knows, and no file beside it names them; "
            f"{', '.join(tokenizer.added)} would be new to the model; name its own with data.tokenizer.bos=... and "
            "data.tokenizer.eos=..., by text or id."
        )
    if tokenizer.vocab_size > (config.model.vocab_size or 0):
        raise MoelmError(
            f"The tokenizer {path} has {tokenizer.vocab_size} tokens, but the model {config.model.vocab_size}."
        )
    return tokenizer


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise MoelmError(f"There is no {path}; a directory in the Hugging Face format is expected.") from None
    except (OSError, ValueError, RecursionError):
        raise MoelmError(f"{path} cannot be read as JSON.") from None
    if not isinstance(content, dict):
        raise MoelmError(f"{path} is not a JSON object.")
    return content


def _find_tensors(source: Path) -> TensorFiles:
    """All tensors of the files that the index lists, or of the single file if there is no index."""
    index_path, single = source / "model.safetensors.index.json", source / "model.safetensors"
    indexed: TensorFiles | None = None
    if index_path.exists():
        weight_map = _read_json(index_path).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise MoelmError(f"{index_path} has no weight_map from tensors to files.")
        indexed = {tensor: source / name for tensor, name in weight_map.items()}
    files: TensorFiles = {}
    for path in sorted(set(indexed.values())) if indexed is not None else [single]:
        if not path.exists():
            raise MoelmError(f"There is no {path}; weights are read from safetensors.")
        for tensor in _read_shapes(path):
            if tensor in files:
                raise MoelmError(f"{tensor} is in {files[tensor]} and in {path}.")
            files[tensor] = path
    if indexed is not None and indexed != files:
        tensor = next(name for name in sorted(indexed.keys() | files.keys()) if indexed.get(name) != files.get(name))
        raise MoelmError(f"{index_path} has {tensor} in {indexed.get(tensor)}, but it is in {files.get(tensor)}.")
    return {name: path for name, path in files.items() if not name.endswith(IGNORED_SUFFIX)}


@contextmanager
def _open_safetensors(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise MoelmError(f"{path} cannot be read as safetensors: {error}.") from None


def _read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    with _open_safetensors(path) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  not a dict


def _match_tensors(
    files: TensorFiles, config: RunConfig, architecture: Architecture, source: Path
) -> dict[str, TensorMapping]:
    """The mapping of every tensor, by its Hugging Face name.

    Raises:
        MoelmError: tensors that the model does not have, tensors that are missing, or other shapes.
    """
    fused = any(name.endswith("experts.gate_up_proj") for name in files)
    mappings = {mapping.hf_name: mapping for mapping in build_weight_map(config.model, architecture, fused)}
    if config.model.tie_embeddings and HF_HEAD in files:
        # Read as a weight of its own, to be compared with the embedding.
        mappings[HF_HEAD] = TensorMapping(HF_HEAD, mappings["model.embed_tokens.weight"].hf_shape, (HF_HEAD,))
    mismatches = {
        "unknown to the model": sorted(files.keys() - mappings.keys()),
        "missing from the files": sorted(mappings.keys() - files.keys()),
        "of another shape": [
            f"{name} ({'x'.join(map(str, shape))}; {'x'.join(map(str, mappings[name].hf_shape))} expected)"
            for path in sorted(set(files.values()))
            for name, shape in _read_shapes(path).items()
            if name in mappings and shape != mappings[name].hf_shape
        ],
    }
    descriptions = []
    for mismatch, names in mismatches.items():
        if names:
            more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
            descriptions.append(f"{mismatch}: {', '.join(names[:MAX_LISTED])}{more}")
    if descriptions:
        raise MoelmError(
            f"{source} does not match its own config.json as {architecture.model_type}; tensors {'; '.join(descriptions)}."
        )
    return mappings


def _read_tensors(
    files: TensorFiles,
    mappings: dict[str, TensorMapping],
    shapes: dict[str, tuple[int, ...]],
    memory: Weights | None = None,
) -> Weights:
    """moelm's weights in the dtype of the tensors, read file by file.

    Args:
        memory: weights that are overwritten where their shape and dtype fit.
    """
    weights: Weights = {}
    for path in sorted(set(files.values())):
        with _open_safetensors(path) as file:
            for hf_name in (hf_name for hf_name, holder in files.items() if holder == path):
                mapping, tensor = mappings[hf_name], file.get_tensor(hf_name)
                if not tensor.is_floating_point():
                    raise MoelmError(f"{path}: {hf_name} is {tensor.dtype}; floating-point weights are expected.")
                for name in mapping.names:
                    if name not in weights:
                        shape, weight = shapes.get(name, mapping.hf_shape), (memory or {}).get(name)
                        if weight is None or (weight.shape, weight.dtype) != (shape, tensor.dtype):
                            weight = torch.empty(shape, dtype=tensor.dtype)
                        weights[name] = weight
                    if weights[name].dtype != tensor.dtype:
                        raise MoelmError(
                            f"{path}: {hf_name} is {tensor.dtype}, but other experts are {weights[name].dtype}."
                        )
                mapping.from_hf(tensor, weights)
    if (head := weights.pop(HF_HEAD, None)) is not None and not torch.equal(head, weights["embedding.weight"]):
        raise MoelmError(f"config.json ties the embeddings, but {HF_HEAD} differs from model.embed_tokens.weight.")
    return weights
