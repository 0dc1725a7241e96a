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
from moelm.data.tokenizer import Tokenizer
from moelm.errors import MoelmError
from moelm.interop.architectures import Architecture, Settings, read_settings
from moelm.interop.places import Place, Weights, find_places, shapes_of
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
    words = _load_tokenizer(source, tokenizer, run_config)
    files = _find_files(source)
    places = _match(files, run_config, architecture, source)
    weights = _read(files, places, run_config)
    dtypes = sorted({str(weight.dtype).removeprefix("torch.") for weight in weights.values()})
    origin = {"import of": str(source.resolve()), "model_type": architecture.name, "dtype": ", ".join(dtypes)}
    create_run(run, run_config, words, weights, origin)
    return run


def _plan_run(run: RunDirectory, model: Settings, config: Path | None, overrides: Sequence[str]) -> RunConfig:
    """The config of the new run, which starts with its own weights under whatever name it is trained."""
    seq_len = min(1024, int(model.get("max_seq_len") or 1024))
    tree: dict[str, Any] = {
        "data": {"sources": [{"name": "builtin"}], "seq_len": seq_len},
        "train": {"steps": 1000, "batch_tokens": 8 * seq_len},
        "optim": {"lr": 1e-4},
    }
    if config is not None:
        tree = read_tree(config)
    tree["model"] = model
    own_tokenizer = json.dumps({"kind": "file", "path": str(run.tokenizer)})
    override(tree, [*overrides, f"data.tokenizer={own_tokenizer}"])
    tree |= {"name": run.path.name, "start": {"run": str(run.path), "checkpoint": "0"}}
    return check_config(tree, f"{run.path}/config.yaml")


def _load_tokenizer(source: Path, given: Path | None, config: RunConfig) -> Tokenizer:
    path = given or source / "tokenizer.json"
    if given is None and not path.exists():
        raise MoelmError(
            f"{source} has no tokenizer.json; give one with --tokenizer (transformers' AutoTokenizer makes it from other "
            "formats and saves it)."
        )
    tokenizer = Tokenizer.load(path)
    rows = config.model.vocab_size or 0
    if tokenizer.vocab_size > rows:
        raise MoelmError(
            f"The tokenizer {path} has {tokenizer.vocab_size} tokens with those that start and end a text, but the model "
            f"has {rows}."
        )
    return tokenizer


def _read_json(path: Path) -> Settings:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise MoelmError(f"There is no {path}; a directory in the Hugging Face format is expected.") from None
    except (OSError, ValueError):
        raise MoelmError(f"{path} cannot be read as JSON.") from None
    if not isinstance(content, dict):
        raise MoelmError(f"{path} holds no settings.")
    return content


def _find_files(source: Path) -> Files:
    """Tensors and their files, from the index or from the single file."""
    index, single = source / "model.safetensors.index.json", source / "model.safetensors"
    if index.exists():
        named = sorted(set(_read_json(index).get("weight_map", {}).values()))
        paths = [source / str(name) for name in named]
    else:
        paths = [single]
    files: Files = {}
    for path in paths:
        if not path.exists():
            raise MoelmError(f"There is no {path}; weights are read from safetensors.")
        with _opened(path) as file:
            files |= dict.fromkeys(file.keys(), path)
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
                for ours in place.ours:
                    if ours not in weights:
                        weights[ours] = torch.empty(shapes.get(ours, place.shape), dtype=tensor.dtype)
                    if weights[ours].dtype != tensor.dtype:
                        raise MoelmError(f"{path}: {name} is {tensor.dtype}, beside experts of {weights[ours].dtype}.")
                place.write(tensor, weights)
    if (head := weights.pop(HEAD, None)) is not None and not torch.equal(head, weights["embedding.weight"]):
        raise MoelmError(f"config.json ties the embeddings, but {HEAD} is another matrix than model.embed_tokens.weight.")
    return weights
