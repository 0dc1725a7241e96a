"""The table that `moelm eval` prints."""

from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest

from moelm.cli.eval_ import evaluate
from moelm.evaluation import losses
from moelm.evaluation.losses import Evaluation, Score
from moelm.huggingface import opening
from moelm.runs.document_losses import DocumentLosses


def test_a_domain_with_the_name_of_the_first_row_has_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    none: Any = np.zeros(0)
    domains = {"all": Score(3.0, 1.0, 10, 30), "x": Score(1.0, 2.0, 10, 30)}
    evaluation = Evaluation(Score(2.0, 1.5, 20, 60), domains, DocumentLosses(*[none] * len(DocumentLosses._fields)))
    monkeypatch.setattr(opening, "open_model", MagicMock(return_value=MagicMock(lossy=False)))
    monkeypatch.setattr(losses, "evaluate", MagicMock(return_value=evaluation))
    evaluate("run")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [(row[0], row[1], row[4]) for row in rows] == [
        ("all", "2.0000", "20"),
        ("all", "3.0000", "10"),
        ("x", "1.0000", "10"),
    ]
