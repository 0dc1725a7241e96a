"""A directory in the Hugging Face format as a run that has taken no step yet.

Names and shapes of all tensors are compared before the first is read; beside the weights, one file's tensors are mapped
into memory at a time.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from moelm.config import RunConfig, check_config, override, read_tree
from moelm.console import console
from moelm.data.tokenizer import Tokenizer
from moelm.errors import MoelmError
from moelm.interop.architectures import Architecture, Settings
from moelm.interop.places import Place, Weights, find_places, shapes_of
from moelm.interop.reading import read_settings
from moelm.interop.words import OWN, check_words
from moelm.rundir import RunDirectory, create_run

IGNORED = ".rotary_emb.inv_freq"
"""What old files hold and the config says already."""
HEAD = "lm_head.weight"
LISTED = 4
"""Tensors that a refusal names."""

Files = dict[str, Path]
"""Which file holds each tensor."""


def import_model(
    source: Path, name: str, overrides: Sequence[str] = (), config: Path | None = None, tokenizer: Path | None = None
) -> RunDirectory:
    """Turn a directory of config.json and safetensors into a run, all or nothing.

    Args:
        name: of the run, under `runs/`; or a path.
        overrides: `key=value` words for the run's config, for its data and for going on with training.
        config: a YAML file whose settings the run gets, but for its model and tokenizer; else moelm's builtin corpus.
        tokenizer: a tokenizer.json, where the directory has none.

    Raises:
        MoelmError: another format or architecture; tensors unmapped, missing or misshapen, with their names.
    """
    run = RunDirectory.new(name)
    settings = _read_json(source / "config.json")
    architecture, model = read_settings(settings, str(source / "config.json"))
    run_config = _plan_run(run, model, config, overrides)
    words = _load_tokenizer(tokenizer or source / "tokenizer.json", settings, run_config)
    files = _find_files(source)
    places = _match(files, run_config, architecture, source)
    weights = _read(files, places, run_config)
    dtypes = sorted({str(weight.dtype).removeprefix("torch.") for weight in weights.values()})
    origin = {"import of": str(source), "model_type": architecture.name, "dtype": ", ".join(dtypes)}
    create_run(run, run_config, words, weights, origin)
    return run


def _plan_run(run: RunDirectory, model: Settings, config: Path | None, overrides: Sequence[str]) -> RunConfig:
    """The config of the new run, which starts with its own weights under whatever name it is trained."""
    check_words(overrides, free=("model.ffn.balance", "model.ffn.capacity_factor"), own=(*OWN, "data.tokenizer"))
    seq_len = min(1024, model["max_seq_len"])
    tree: dict[str, Any] = {
        "data": {"sources": [{"name": "builtin"}], "seq_len": seq_len},
        "train": {"steps": 1000, "batch_tokens": 8 * seq_len},
        "optim": {"lr": 1e-4},
    }
    if config is not None:
        tree = read_tree(config)
    tree["model"] = model
    override(tree, [*overrides, "data.tokenizer={}"])
    tree["data"]["tokenizer"] = {"kind": "file", "path": str(run.tokenizer)}
    tree |= {"name": run.path.name, "start": {"run": str(run.path), "checkpoint": "0"}}
    return check_config(tree, f"{run.path}/config.yaml")


def _load_tokenizer(path: Path, settings: Settings, config: RunConfig) -> Tokenizer:
    """The tokenizer, whose start and end tokens must be the model's own."""
    if not path.exists():
        raise MoelmError(
            f"There is no {path}; give a tokenizer with --tokenizer (transformers' AutoTokenizer makes one from other "
            "formats and saves it)."
        )
    tokenizer = Tokenizer.load(path)
    if tokenizer.added:
        raise MoelmError(
            f"{path} has no token that moelm takes for the start or the end of a text; {', '.join(tokenizer.added)} "
            "would be new to the model."
        )
    if tokenizer.vocab_size > (config.model.vocab_size or 0):
        raise MoelmError(
            f"The tokenizer {path} has {tokenizer.vocab_size} tokens, but the model {config.model.vocab_size}."
        )
    for key, taken in (("bos_token_id", tokenizer.bos_id), ("eos_token_id", tokenizer.eos_id)):
        told = settings.get(key)
        told = told[0] if isinstance(told, list) and told else told
        if told != taken:
            console.print(
                f"Warning: {key} is {told} in config.json, but moelm takes {taken} ({tokenizer.raw.id_to_token(taken)}).",
                soft_wrap=True,
                markup=False,
            )
    return tokenizer


def _read_json(path: Path) -> Settings:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise MoelmError(f"There is no {path}; a directory in the Hugging Face format is expected.") from None
    except (OSError, ValueError, RecursionError):
        raise MoelmError(f"{path} cannot be read as JSON.") from None
    if not isinstance(content, dict):
        raise MoelmError(f"{path} holds no settings.")
    return content


def _find_files(source: Path) -> Files:
    """Tensors and their files, from the index or from the single file."""
    index, single = source / "model.safetensors.index.json", source / "model.safetensors"
    named: dict[str, Path] | None = None
    if index.exists():
        listed = _read_json(index).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
            raise MoelmError(f"{index} has no weight_map from tensors to files.")
        named = {tensor: source / name for tensor, name in listed.items()}
    files: Files = {}
    for path in sorted(set(named.values())) if named is not None else [single]:
        if not path.exists():
            raise MoelmError(f"There is no {path}; weights are read from safetensors.")
        with _opened(path) as file:
            for tensor in file.keys():  # noqa: SIM118  not a dict
                if tensor in files:
                    raise MoelmError(f"{tensor} is in {files[tensor]} and in {path}.")
                files[tensor] = path
    if named is not None and named != files:
        tensor = next(name for name in sorted(named.keys() | files.keys()) if named.get(name) != files.get(name))
        raise MoelmError(f"{index} has {tensor} in {named.get(tensor)}, but it is in {files.get(tensor)}.")
    return {name: path for name, path in files.items() if not name.endswith(IGNORED)}


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise MoelmError(f"{path} cannot be read as safetensors: {error}.") from None


def _match(files: Files, config: RunConfig, architecture: Architecture, source: Path) -> dict[str, Place]:
    """A place for every tensor, and a tensor for every place."""
    fused = any(name.endswith("experts.gate_up_proj") for name in files)
    places = {place.theirs: place for place in find_places(config.model, architecture, fused)}
    if config.model.tie_embeddings and HEAD in files:
        embedding = places["model.embed_tokens.weight"]
        places[HEAD] = Place(HEAD, embedding.shape, (HEAD,))  # read beside ours, to be compared
    faults = {
        "no place in the model": sorted(files.keys() - places.keys()),
        "no tensor in the files": sorted(places.keys() - files.keys()),
    }
    faults["another shape"] = [
        f"{name} ({'x'.join(map(str, found))} in place of {'x'.join(map(str, places[name].shape))})"
        for path in sorted(set(files.values()))
        for name, found in _shapes(path).items()
        if name in places and found != places[name].shape
    ]
    told = []
    for fault, names in faults.items():
        if names:
            more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
            told.append(f"{fault}: {', '.join(names[:LISTED])}{more}")
    if told:
        raise MoelmError(f"{source} does not fit its own config.json as a {architecture.name}: {'; '.join(told)}.")
    return places


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    with _opened(path) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  not a dict


def _read(files: Files, places: dict[str, Place], config: RunConfig) -> Weights:
    """Our weights in the dtype of theirs, file by file."""
    shapes = shapes_of(config.model)
    weights: Weights = {}
    for path in sorted(set(files.values())):
        with _opened(path) as file:
            for name in (name for name, holder in files.items() if holder == path):
                place, tensor = places[name], file.get_tensor(name)
                if not tensor.is_floating_point():
                    raise MoelmError(f"{path}: {name} is {tensor.dtype}; floating-point weights are expected.")
                for ours in place.ours:
                    if ours not in weights:
                        weights[ours] = torch.empty(shapes.get(ours, place.shape), dtype=tensor.dtype)
                    if weights[ours].dtype != tensor.dtype:
                        raise MoelmError(f"{path}: {name} is {tensor.dtype}, beside experts of {weights[ours].dtype}.")
                place.write(tensor, weights)
    if (head := weights.pop(HEAD, None)) is not None and not torch.equal(head, weights["embedding.weight"]):
        raise MoelmError(f"config.json ties the embeddings, but {HEAD} is another matrix than model.embed_tokens.weight.")
    return weights
