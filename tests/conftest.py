"""Fixtures: a small text, configs of models that train in a second, trained runs and the command line."""

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.processes import run_moelm

if TYPE_CHECKING:
    from xdist.scheduler import LoadScopeScheduling

    from moelm.config import RunConfig
    from moelm.data.loader import PreparedData

# The models of the tests are so small that a second thread makes them slower; torch reads this when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

VOCABULARY = [
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

ON_ONE_WORKER = {
    f"tests/{name}.py"
    for name in ("data/test_holdout", "data/test_corpus", "compare/ladder/test_comparison", "analyze/test_page")
}
"""Files with a fixture that takes many seconds and is for the whole file."""

Moelm = Callable[..., subprocess.CompletedProcess[str]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the longest tests first, so that no worker is left alone with one at the end."""
    slow = {item: item.get_closest_marker("slow") for item in items}
    items.sort(key=lambda item: -slow[item].kwargs.get("seconds", 0) if slow[item] else 0)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> "LoadScopeScheduling | None":
    """One test after another for each worker, but the tests of `ON_ONE_WORKER` as files.

    That is `--dist loadgroup`, whose marks have no effect with pytest 9.2, where ids of tests cannot be changed.
    """
    from xdist.scheduler import LoadScopeScheduling

    if config.getvalue("dist") != "load":
        return None
    assert all((config.rootpath / file).exists() for file in ON_ONE_WORKER)

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return file if file in ON_ONE_WORKER else nodeid

    return Scheduling(config, log)


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Names of parametrized tests without bytes: a compressed file holds its time, and all workers must agree on names."""
    return argname if isinstance(val, bytes) else None


def tiny_config(name: str = "tiny", kind: str = "moe") -> dict[str, object]:
    """The config of a minimal model as a mapping."""
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
    """Write a text and the configs of a dense and a sparse run into a folder."""
    rng = random.Random(0)
    lines = [" ".join(rng.choices(VOCABULARY, k=12)) for _ in range(200)]
    (folder / "text.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for kind in ("moe", "dense"):
        (folder / f"{kind}.yaml").write_text(yaml.safe_dump(tiny_config(f"tiny-{kind}", kind)))
    return folder


@pytest.fixture(scope="session")
def cpp_compiler() -> None:
    """Skips tests without g++, which torch's compiler needs on CPUs; in CI they fail, because nothing may be left out."""
    if shutil.which("g++") is None:
        missing = "This test needs g++, which is not installed."
        if "CI" in os.environ:
            pytest.fail(missing)
        pytest.skip(missing)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep what is measured here out of the user's cache directory."""
    os.environ["MOELM_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports whose figures are not drawn, which takes a second for each: for tests of other parts."""
    from matplotlib.figure import Figure

    monkeypatch.setattr("moelm.report.figures._render", lambda *_, **__: (b"\x89PNG", Figure()))


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A folder with a text and the configs of a dense and a sparse run."""
    return fill(tmp_path)


def train_here(folder: Path, kind: str, *overrides: str) -> Path:
    """Train in this process, which is faster than the command line; returns the run's directory."""
    from moelm.config import load_config
    from moelm.runs.directory import RunDirectory
    from moelm.train.setup import train

    with contextlib.chdir(folder):
        config = load_config(f"{kind}.yaml", overrides)
        train(config, RunDirectory(Path("runs") / config.name))
    return folder / "runs" / config.name


def open_data(config: "RunConfig") -> "PreparedData":
    """The prepared data of a config."""
    from moelm.data.identity import folder_to_read
    from moelm.data.loader import open_folder

    return open_folder(config, folder_to_read(config.data))


def metrics_lines(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl as they are in the file."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def losses_by_step(run: Path) -> list[tuple[int, float]]:
    """Step and training loss of every line of a run's metrics.jsonl."""
    return [(line["step"], line["train/loss"]) for line in metrics_lines(run)]


TRAJECTORY = ("train/loss", "val/loss", "train/grad_norm")
TRAJECTORY += tuple(f"moe/{name}" for name in ("aux_loss", "z_loss", "load_cv", "importance_cv", "entropy"))


def largest_deviation(run: Path, reference: Path) -> float:
    """The largest relative difference of a metric of the trajectory at any step; metrics near 0 are relative to 1e-3."""
    pairs = list(zip(metrics_lines(run), metrics_lines(reference), strict=True))
    return max(abs(a[key] - b[key]) / max(abs(b[key]), 1e-3) for a, b in pairs for key in TRAJECTORY if key in b)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished dense and a finished sparse run; tests must not change it."""
    folder = fill(tmp_path_factory.mktemp("trained"))
    for kind in ("moe", "dense"):
        train_here(folder, kind)
    return folder


@pytest.fixture
def moelm(workplace: Path) -> Moelm:
    """Run the command line in the folder `workplace`: with `cwd`, `input` or options of `subprocess.run`.

    With other options than `cwd` and `input`, Python is started anew, which takes seconds.
    """

    def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        if options.keys() <= {"cwd", "input"}:
            return run_moelm(arguments, options.get("cwd", workplace), options.get("input", ""))
        stdin = {} if "input" in options else {"stdin": subprocess.DEVNULL}
        return subprocess.run(  # type: ignore[no-any-return]
            [sys.executable, "-m", "moelm", *arguments],
            **{"cwd": workplace, "capture_output": True, "text": True, "timeout": 300, **stdin, **options},
        )

    return run
