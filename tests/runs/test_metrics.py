"""The writer and the reader of metrics.jsonl."""

import json
from pathlib import Path
from typing import Any

import pytest

from moelm.errors import MoelmError
from moelm.runs.metrics import MetricsFile, evaluation_at, last_evaluation, read_metrics


def line(step: int, **values: Any) -> dict[str, Any]:
    return {"step": step, "tokens": 256 * step, "flops": 1000 * step, "time_s": 0.5 * step, **values}


def write_lines(path: Path, *lines: dict[str, Any] | str) -> Path:
    path.write_text("".join(f"{each if isinstance(each, str) else json.dumps(each)}\n" for each in lines))
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def test_a_step_logged_again_after_a_resume_has_its_last_values(path: Path) -> None:
    first, second = ({"train/loss": loss, "val/loss": loss, "val/bpb": loss} for loss in (3.0, 2.0))
    write_lines(path, line(1), line(2, **first), line(3), "", line(2, **second))
    assert read_metrics(path) == [line(1), line(2, **second), line(3)]


def test_a_step_logged_again_without_an_evaluation_keeps_it(path: Path) -> None:
    evaluation = {"val/loss": 2.0, "val/bpb": 1.0}
    assert read_metrics(write_lines(path, line(1, **evaluation), line(1))) == [line(1, **evaluation)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"step": 2, "to', r"metrics\.jsonl, line 2 is not JSON"),
        ("[]", r"metrics\.jsonl, line 2 is not a JSON object"),
        (json.dumps(line(2) | {"flops": float("nan")}), r"line 2: flops is NaN; a finite number is expected"),
        (json.dumps(line(2) | {"time_s": "long"}), r'line 2: time_s is "long"'),
        ('{"step": 2}', "line 2: tokens is missing"),
        (json.dumps(line(2) | {"val/loss": float("inf"), "val/bpb": 1.0}), "line 2: val/loss is Infinity"),
    ],
)
def test_a_malformed_line_is_named(path: Path, text: str, message: str) -> None:
    with pytest.raises(MoelmError, match=message):
        read_metrics(write_lines(path, line(1), text))


def test_a_missing_file_is_refused(path: Path) -> None:
    with pytest.raises(MoelmError, match=r"has no metrics\.jsonl"):
        read_metrics(path)


def test_the_writer_removes_lines_after_the_checkpoint_and_a_cut_off_last_line(path: Path) -> None:
    write_lines(path, *(line(step) for step in (1, 2, 3)))
    with path.open("a") as file:
        file.write('{"step": 2, "tokens"')
    metrics = MetricsFile(path, resume_step=2)
    metrics.write(line(3, resumed=True))
    metrics.close()
    assert [json.loads(text) for text in path.read_text().splitlines()] == [line(1), line(2), line(3, resumed=True)]


def test_evaluations(path: Path) -> None:
    assert evaluation_at(path, 2) is None
    assert last_evaluation(path) is None
    evaluations = [line(step, **{"val/loss": 3.0 - step / 10, "val/bpb": 1.0}) for step in (2, 4)]
    write_lines(path, line(1), evaluations[0], line(3), evaluations[1], line(5))
    assert evaluation_at(path, 2) == evaluations[0]
    assert evaluation_at(path, 3) is None
    assert last_evaluation(path) == evaluations[1]
