"""A tiny run for the tests: a small text, a byte tokenizer, a model that trains in a second."""

import contextlib
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

# The models here are so small that a second thread costs more than it brings; torch reads this at its import.
os.environ.setdefault("OMP_NUM_THREADS", "1")

WORDS = [
    "the",
    "a",
    "red",
    "green",
    "old",
    "new",
    "cat",
    "dog",
    "bird",
    "sees",
    "hears",
    "likes",
    "stone",
    "river",
    "house",
    "and",
    "or",
    "but",
    "runs",
    "sleeps",
]

Moelm = Callable[..., subprocess.CompletedProcess[str]]


def tiny_config(name: str = "tiny", kind: str = "moe") -> dict[str, object]:
    """A config as a mapping; everything is as small as it can be."""
    moe = {"kind": "moe", "hidden_dim": 16, "num_experts": 4, "top_k": 2}
    return {
        "name": name,
        "model": {
            "dim": 16,
            "num_layers": 2,
            "num_heads": 2,
            "ffn": moe if kind == "moe" else {"kind": "dense", "hidden_dim": 32},
        },
        "data": {
            "sources": [{"path": "text.txt", "documents": "line"}],
            "tokenizer": {"kind": "byte"},
            "seq_len": 32,
            "val_fraction": 0.1,
        },
        "train": {"steps": 8, "batch_tokens": 256, "eval_every": 4, "checkpoint_every": 2, "precision": "fp32"},
        "optim": {"lr": 0.01, "warmup_steps": 2},
    }


def fill(folder: Path) -> Path:
    """Put a text and a config for a dense and a sparse run in a folder."""
    random_words = random.Random(0)
    lines = [" ".join(random_words.choices(WORDS, k=12)) for _ in range(200)]
    (folder / "text.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for kind in ("moe", "dense"):
        (folder / f"{kind}.yaml").write_text(yaml.safe_dump(tiny_config(f"tiny-{kind}", kind)))
    return folder


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A folder with a text and a config for a dense and a sparse run."""
    return fill(tmp_path)


def train_here(folder: Path, kind: str, *overrides: str) -> Path:
    """Train in this process, which is quicker than the command line; returns the run's directory."""
    from moelm.config import load_config
    from moelm.runs.directory import RunDirectory
    from moelm.train.setup import train

    with contextlib.chdir(folder):
        config = load_config(f"{kind}.yaml", overrides)
        train(config, RunDirectory(Path("runs") / config.name))
    return folder / "runs" / config.name


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished dense and a finished sparse run; look, do not touch."""
    folder = fill(tmp_path_factory.mktemp("trained"))
    for kind in ("moe", "dense"):
        train_here(folder, kind)
    return folder


@pytest.fixture
def moelm(workplace: Path) -> Moelm:
    """Run the real command line in the folder."""

    def run(*words: str, **options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(  # type: ignore[call-overload, no-any-return]
            [sys.executable, "-m", "moelm", *words],
            cwd=options.pop("cwd", workplace),
            capture_output=True,
            text=True,
            timeout=300,
            **{"stdin": subprocess.DEVNULL, **options} if "input" not in options else options,
        )

    return run
