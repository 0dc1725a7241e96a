"""What commands share: one JSON object, literal tables, finite numbers, warnings of the main process."""

import json
import math

import pytest
import typer

from moelm.cli.options import finite, finite_each, plain_table, print_json, stdout_console, warn_if_ineffective
from moelm.config import check_config
from tests.conftest import tiny_config


def test_json_has_no_numbers_that_json_does_not_have(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": math.nan, "b": [math.inf, 1.5, {"c": (-math.inf, "é\udce9", None)}]})
    printed = capsys.readouterr().out
    assert printed.isascii()
    assert printed.count("\n") == 1
    assert json.loads(printed) == {"a": None, "b": [None, 1.5, {"c": [None, "é\udce9", None]}]}


def test_tables_show_names_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    table = plain_table("[b]name", ":smile:")
    table.add_row("letters [/x] [red]", "\x1b[31m")
    stdout_console().print(table)
    head, row = capsys.readouterr().out.splitlines()
    assert head.split() == ["[b]name", ":smile:"]
    assert row.split() == ["letters", "[/x]", "[red]", "\\x1b[31m"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_options_are_finite(value: float) -> None:
    with pytest.raises(typer.BadParameter, match="is not a finite number"):
        finite(value)
    with pytest.raises(typer.BadParameter, match="is not a finite number"):
        finite_each([1.0, value])


@pytest.mark.parametrize(("rank", "lines"), [(None, 1), ("0", 1), ("1", 0)])
def test_the_main_process_alone_warns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, rank: str | None, lines: int
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    tree = tiny_config()
    warn_if_ineffective(check_config(tree | {"optim": {"lr": 0.1, "warmup_steps": 9}}, "tiny"))
    assert capsys.readouterr().err.count("\n") == lines
