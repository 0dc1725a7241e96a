"""`moelm config`: a config with all it means, and the schema."""

import json
from pathlib import Path

import pytest

from moelm.cli.config import config
from moelm.config import config_schema, load_config
from tests.conftest import Moelm

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("name", ["demo-moe", "grok1", "shakespeare-char"])
def test_the_output_is_the_same_config(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    overrides = ["seed=7", "data.dir=notes #1 [x]"]
    config(CONFIGS / f"{name}.yaml", overrides)
    printed = capsys.readouterr()
    (tmp_path / "config.yaml").write_text(printed.out)
    loaded = load_config(CONFIGS / f"{name}.yaml", overrides)
    assert load_config(tmp_path / "config.yaml") == loaded
    assert printed.err == ""
    config(CONFIGS / f"{name}.yaml", overrides, as_json=True)
    assert json.loads(capsys.readouterr().out) == loaded.model_dump(mode="json", exclude_none=True)


def test_the_schema(capsys: pytest.CaptureFixture[str]) -> None:
    config(schema=True)
    assert json.loads(capsys.readouterr().out) == config_schema()


def test_a_setting_without_effect_is_told_once(moelm: Moelm) -> None:
    done = moelm("config", "moe.yaml", "optim.warmup_steps=9")
    assert done.returncode == 0
    assert done.stderr.startswith("Warning: optim.warmup_steps is 9 and train.steps is 8, so")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "A CONFIG is expected"), (["moe.yaml", "--schema"], "leave CONFIG out"), (["."], "Is a directory")],
)
def test_what_cannot_be_printed(moelm: Moelm, arguments: list[str], message: str) -> None:
    done = moelm("config", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
