"""Weights & Biases: one run for one run, the series it gets, and its failures. The library is replaced by a recorder."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from moelm.runs.checkpoint import list_checkpoints
from moelm.train.metrics import scalar_series
from tests.conftest import metrics_lines, train_here


class Recorder(ModuleType):
    """The functions of wandb that are used; `logged` has the steps of each call of `init`."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.ids: list[str] = []
        self.logged: list[list[int]] = []
        self.resumed_at: int | None = None
        self.fails_at: int | None = None
        self.metrics: list[tuple[str, str]] = []

    def Settings(self, **settings: Any) -> None:
        pass

    def init(self, **options: Any) -> Any:
        self.ids.append(options["id"])
        assert options["resume"] == "allow"
        self.logged.append([])
        return SimpleNamespace(
            resumed=self.resumed_at is not None,
            summary={"step": self.resumed_at},
            define_metric=lambda name, step_metric: self.metrics.append((name, step_metric)),
            log=self._log,
            finish=self._finish,
        )

    def _log(self, series: dict[str, Any]) -> None:
        if series["step"] == self.fails_at:
            raise RuntimeError("the service is gone\nand more")
        self.logged[-1].append(series["step"])

    def _finish(self) -> None:
        if self.fails_at == -1:
            raise RuntimeError("no network")


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, "wandb", recorder)
    return recorder


def test_every_number_of_a_line_is_a_series(trained: Path) -> None:
    line = metrics_lines(trained / "runs/tiny-moe")[-1]
    series = scalar_series(line)
    assert all(isinstance(value, int | float) for value in series.values())
    assert series["val/domains/text.txt/bpb"] == line["val/domains"]["text.txt"]["bpb"]
    for row in line["moe/layers"]:
        for key in ("load_max_over_mean", "entropy", "dead_experts"):
            assert series[f"moe/layers/{row['layer']:02}/{key}"] == row[key]
    assert not [key for key in series if key.endswith(("/load", "/layer"))]


def test_a_resumed_run_has_the_same_id_and_every_step(wandb: Recorder, workplace: Path) -> None:
    settings = ("wandb.mode=offline", "train.checkpoint_every=4")
    run = train_here(workplace, "dense", *settings)
    for path in list_checkpoints(run / "checkpoints")[1:]:  # as if it had been killed after step 4
        (path / "progress.json").write_text("damaged")
    train_here(workplace, "dense", *settings)
    assert wandb.ids == [(run / "wandb-id").read_text().split()[0]] * 2
    assert wandb.logged == [list(range(1, 9))] * 2
    assert set(wandb.metrics) == {("*", "step")}
    run.rename(run.with_name("copy"))
    train_here(workplace, "dense", *settings, "name=copy")
    assert wandb.ids[2] != wandb.ids[0]


@pytest.mark.parametrize(
    ("resumed_at", "expected"), [(6, [7, 8]), (2, [3, 4, 5, 6, 7, 8]), (None, [1, 2, 3, 4, 5, 6, 7, 8])]
)
def test_online_the_steps_that_are_missing_are_logged(
    wandb: Recorder, workplace: Path, resumed_at: int | None, expected: list[int]
) -> None:
    run = train_here(workplace, "dense", "train.checkpoint_every=4")  # without W&B
    for path in list_checkpoints(run / "checkpoints")[1:]:
        (path / "progress.json").write_text("damaged")
    wandb.resumed_at = resumed_at
    train_here(workplace, "dense", "train.checkpoint_every=4", "wandb.mode=online")
    assert wandb.logged == [expected]


@pytest.mark.parametrize(("fails_at", "message"), [(3, "(the service is gone)"), (-1, "(no network)")])
def test_a_failure_of_wandb_does_not_end_the_training(
    wandb: Recorder, workplace: Path, capsys: pytest.CaptureFixture[str], fails_at: int, message: str
) -> None:
    wandb.fails_at = fails_at
    run = train_here(workplace, "dense", "wandb.mode=offline")
    assert len(metrics_lines(run)) == 8
    assert capsys.readouterr().err.count(f"Warning: Weights & Biases has failed {message}") == 1
