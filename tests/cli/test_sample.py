"""`moelm sample`: streamed text and JSON are the same, and what cannot be a prompt or a setting is refused."""

import io
import json
import sys
from pathlib import Path

import pytest

from moelm.cli.app import main
from moelm.config import check_config
from moelm.data.tokenizer import Tokenizer
from moelm.model import build_model
from moelm.runs.directory import RunDirectory
from moelm.runs.load import create_run
from tests.conftest import tiny_config
from tests.tokenizers import SHAPES


@pytest.fixture(scope="module", params=["byte_fallback", "unigram_bytes", "word_piece"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with random weights, which generates much of a tokenizer's vocabulary."""
    tokenizer = Tokenizer(SHAPES[request.param]())
    tree = tiny_config()
    tree["model"] |= {"vocab_size": tokenizer.vocab_size, "max_seq_len": 200, "init_std": 0.3}  # type: ignore[operator]
    config = check_config(tree, "test")
    directory = RunDirectory(tmp_path_factory.mktemp("run") / "run")
    weights = build_model(config.model, seed=1).state_dict()
    create_run(directory, config, tokenizer, {name: weight.float() for name, weight in weights.items()}, {"import of": "-"})
    return directory.path


def sample(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str, str]:
    """Run the command; returns exit code, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["moelm", "sample", *arguments])
    try:
        main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    return code, *capsys.readouterr()


@pytest.mark.parametrize("options", [[], ["--stop", "a"], ["--stop", "本", "--stop", " t"]])
@pytest.mark.parametrize("seed", ["0", "1", "18446744073709551615"])
def test_streamed_text_and_json_are_the_same(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, options: list[str], seed: str
) -> None:
    prompt = "the red 日本"
    argv = [str(run), "--prompt", prompt, "--max-new-tokens", "60", "--temperature", "2", "--seed", seed, *options]
    _, streamed, _ = sample(capsys, monkeypatch, *argv)
    samples = json.loads(sample(capsys, monkeypatch, *argv, "--json")[1])["samples"]
    assert streamed == prompt + samples[0]["text"] + "\n"
    shown = json.loads(sample(capsys, monkeypatch, *argv, "--json", "--show-experts")[1])["samples"]
    assert shown[0]["text"] == samples[0]["text"] == "".join(token["text"] for token in shown[0]["tokens"])


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        (["--prompt", "caf\udce9"], b"", "The text has the byte 0xe9 after 'caf', which is not UTF-8."),
        ([], b"caf\xe9", "The text has the byte 0xe9 after 'caf', which is not UTF-8."),
        (["--prompt", "a", "--stop", "\udcff"], b"", "The text has the byte 0xff at its beginning, which is not UTF-8."),
        ([], b"", "The prompt is empty; a text to continue is expected."),
        (["--prompt", "a", "--stop", ""], b"", "A stop text is empty; a text at which to stop is expected."),
        (
            ["--prompt", "a", "--seed", str(2**64)],
            b"",
            f"seed is {2**64}; a whole number from -2^63 to 2^64-1 is expected.",
        ),
        (["--prompt", "a", "--temperature", "nan"], b"", "temperature is nan; a number from 0 to 1e+06 is expected."),
        (["--prompt", "a", "--top-p", "1.5"], b"", "top_p is 1.5; a number from 0 to 1 is expected."),
        (["--prompt", "a", "--max-new-tokens", "0"], b"", "max_new_tokens is 0; a whole number from 1 is expected."),
    ],
)
def test_errors_are_one_sentence(
    run: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    stdin: bytes,
    message: str,
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
    assert sample(capsys, monkeypatch, str(run), *arguments) == (2, "", f"moelm: {message}\n")
