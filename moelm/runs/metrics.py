"""metrics.jsonl: one JSON object per logged step, its writer and its reader. Nothing here imports torch."""

import json
import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from moelm.atomic import atomic_file
from moelm.errors import MoelmError

Line = dict[str, Any]

TOTALS = ("step", "tokens", "flops", "time_s")
"""Cumulative values of every line."""


class MetricsFile:
    """The writer.

    Args:
        resume_step: last step of the checkpoint that a run resumes from; later lines are removed.
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        try:
            if path.exists():
                copy_metrics(path, path, resume_step)
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise _unwritable(path, error) from error

    def write(self, line: Line) -> None:
        """Append one line and flush it, so that a killed process loses none.

        Raises:
            MoelmError: the disk is full.
        """
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as error:
            raise _unwritable(Path(self._file.name), error) from error

    def close(self) -> None:
        """Close the file; write errors have been raised before."""
        with suppress(OSError):
            self._file.close()


def copy_metrics(source: Path, target: Path, last_step: int) -> None:
    """Copy the complete lines of `source` up to a step to `target`, which may be the same file.

    Raises:
        MoelmError: a line that is not JSON.
        OSError: the file cannot be written.
    """
    # A kill can cut off the last line.
    complete = [(number, text) for number, text in _lines(source) if text.endswith("}\n")]
    lines = [text for number, text in complete if _parse(source, number, text)["step"] <= last_step]
    with atomic_file(target) as work:
        work.write_text("".join(lines), encoding="utf-8")


def read_metrics(path: Path) -> list[Line]:
    """The lines in step order; of a step that was logged again after a resume, the last values.

    Raises:
        MoelmError: no such file, or a line without finite totals.
    """
    steps: dict[int, Line] = {}
    for number, text in _lines(path):
        line = _parse(path, number, text)
        if not isinstance(line, dict):
            raise MoelmError(f"{path}, line {number} is not a JSON object.")
        for key in (*TOTALS, "val/loss", "val/bpb") if "val/loss" in line else TOTALS:
            if not is_finite(line.get(key)):
                value = json.dumps(line[key]) if key in line else "missing"
                raise MoelmError(f"{path}, line {number}: {key} is {value}; a finite number is expected.")
        steps[line["step"]] = steps.get(line["step"], {}) | line
    return [steps[step] for step in sorted(steps)]


def evaluation_at(path: Path, step: int) -> Line | None:
    """The line of an evaluation at this step; None if there is none."""
    return next((line for line in _evaluations(path) if line["step"] == step), None)


def last_evaluation(path: Path) -> Line | None:
    """The line of the last evaluation; None if there is none."""
    return max(_evaluations(path), key=lambda line: int(line["step"]), default=None)


def is_finite(value: Any) -> bool:
    """Whether a JSON value is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def _evaluations(path: Path) -> list[Line]:
    """The lines with a validation loss; a line that a kill has cut off is ignored, because its step will be repeated."""
    if not path.exists():
        return []
    lines = [(number, text) for number, text in _lines(path) if '"val/loss"' in text and text.rstrip().endswith("}")]
    return [_parse(path, number, text) for number, text in lines]


def _parse(path: Path, number: int, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise MoelmError(f"{path}, line {number} is not JSON: {error.msg}.") from None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines that are not blank, with their line ends."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise MoelmError(f"{path.parent} has no metrics.jsonl; has it been trained?") from None
    except OSError as error:
        raise MoelmError(f"{path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise MoelmError(f"{path} is not a text file.") from None
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        if line.strip():
            yield number, line


def _unwritable(path: Path, error: OSError) -> MoelmError:
    return MoelmError(
        f"{path} cannot be written ({error.strerror}); once that is fixed, run the same command again to continue from the "
        "last checkpoint."
    )
