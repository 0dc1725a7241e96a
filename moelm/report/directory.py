"""The directory of a report: report.json, report.md, report.html and figures, written as a whole or not at all."""

import json
from pathlib import Path
from typing import Any

from moelm.atomic import atomic_directory
from moelm.errors import MoelmError
from moelm.report.page import Report, report_html, report_markdown

_TEXTS = ("report.json", "report.md", "report.html")
_FILES = {
    "moelm compare": (*_TEXTS, "comparison.png", "scaling.png", "load.png", "trend.png"),
    "moelm ladder": (*_TEXTS, "ladder.png", "multiplier.png"),
}
"""The files that reports of each kind have, or had in earlier versions; the key `kind` of report.json says which it is."""


def check_report_directory(out: Path) -> None:
    """Require a path that does not exist, an empty directory, or an earlier report and nothing else.

    Raises:
        MoelmError: it is something else.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise MoelmError(f"{out} is a file; --out is the directory of the report.")
    present = sorted(path.name for path in out.iterdir())
    known = _files_of_report(out / "report.json")
    if present and known is None:
        raise MoelmError(f"{out} is not empty and holds no earlier report; choose another --out.")
    foreign = [name for name in present if name not in (known or ())]
    if foreign:
        raise MoelmError(f"{out} holds {foreign[0]} beside an earlier report; move it or choose another --out.")


def write_report_directory(out: Path, report: Report, content: dict[str, Any]) -> None:
    """Write a report; an earlier one is replaced only when the new one is complete.

    Args:
        content: of report.json, with the key `kind`.

    Raises:
        MoelmError: `out` holds something other than an earlier report, or cannot be written.
    """
    check_report_directory(out)
    out = out.resolve()
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    texts = {"report.json": text + "\n", "report.md": report_markdown(report), "report.html": report_html(report)}
    try:
        with atomic_directory(out, replace=True) as directory:
            for name, text in texts.items():
                (directory / name).write_text(text, encoding="utf-8", errors="backslashreplace")
            for figure in report.figures:
                (directory / figure.name).write_bytes(figure.light)
    except OSError as error:
        raise MoelmError(f"{out} cannot be written: {error.strerror}.") from None


def _files_of_report(path: Path) -> tuple[str, ...] | None:
    """The files that belong to the report with this report.json; None if it is none."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(report, dict) or not isinstance(report.get("schema"), int):
        return None
    return _FILES.get(str(report.get("kind")))
