"""The command line: fast help, one JSON object, one sentence for each error."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from moelm import __version__
from tests.conftest import Moelm

COMMANDS = [
    "config",
    "prepare",
    "train",
    "eval",
    "sample",
    "compare",
    "sweep",
    "analyze",
    "plan",
    "bench",
    "export",
    "import",
    "upcycle",
    "lm-eval",
]


@pytest.mark.parametrize("command", [[], *[[name] for name in COMMANDS]])
def test_help_imports_no_heavy_package(command: list[str]) -> None:
    program = (
        "import sys\nfrom moelm.cli.app import app\n"
        f"try: app({[*command, '--help']!r})\nexcept SystemExit as end: code = end.code\n"
        "heavy = {'torch', 'datasets', 'numpy'} & sys.modules.keys()\n"
        "sys.exit(code or len(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


def test_version(moelm: Moelm) -> None:
    assert moelm("--version").stdout.strip() == f"moelm {__version__}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "none.yaml"], "no config file"),
        (["train", "moe.yaml", "model.dimm=4"], "did you mean dim"),
        (["eval", "unknown"], "no run unknown"),
        (["prepare", "moe.yaml", "data.sources.0.path=nothing-*.txt"], "matches no file"),
    ],
)
def test_an_error_is_one_line_and_exit_code_2(moelm: Moelm, workplace: Path, arguments: list[str], message: str) -> None:
    before = sorted(workplace.iterdir())
    done = moelm(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
    assert [path for path in sorted(workplace.iterdir()) if path.name != "data"] == before


@pytest.mark.slow
def test_every_step_from_text_to_comparison(moelm: Moelm, workplace: Path) -> None:
    for kind in ("dense", "moe"):
        assert moelm("train", f"{kind}.yaml", "train.eval_every=2").returncode == 0

    for arguments in (
        ["prepare", "moe.yaml", "optim.warmup_steps=3", "--json"],
        ["plan", "moe.yaml", "--json"],
        ["eval", "tiny-moe", "--json"],
        ["sample", "tiny-moe", "--prompt", "the cat", "--max-new-tokens", "5", "--json"],
        ["compare", "tiny-dense", "tiny-moe", "--out", "report", "--json"],
    ):
        done = moelm(*arguments)
        assert done.returncode == 0, done.stderr
        assert isinstance(json.loads(done.stdout), dict)
    assert {path.name for path in (workplace / "report").iterdir()} >= {"report.html", "report.md", "report.json"}

    for options, message in (
        (["--prompt", ""], "prompt is empty"),
        (["--prompt", "cat", "--max-new-tokens", "500"], "context of 32"),
        (["--prompt", "cat", "--checkpoint", "7"], "no checkpoint '7'"),
    ):
        done = moelm("sample", "tiny-moe", *options)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert message in done.stderr
    piped = moelm("sample", "tiny-moe", "--max-new-tokens", "3", input="the cat")
    assert piped.stdout.startswith("the cat")


def test_load_gives_a_model_that_scores_tokens(moelm: Moelm, workplace: Path) -> None:
    import torch

    import moelm as package

    done = moelm("train", "moe.yaml", "train.steps=2", "optim.warmup_steps=3")
    assert done.returncode == 0
    assert done.stderr.count("Warning: optim.warmup_steps is 3 and train.steps is 2") == 1
    model, tokenizer, config = package.load(workplace / "runs/tiny-moe")
    tokens = torch.tensor([tokenizer.encode_prompt("the cat")])
    assert model(tokens).logits.shape == (1, tokens.shape[1], config.model.vocab_size)
