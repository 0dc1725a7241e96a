"""The vocabulary that counts assume where no tokenizer exists yet."""

from pathlib import Path

import pytest

from moelm.config import load_config
from moelm.plan.counts import BYTE_VOCABULARY, assumed_vocab_size
from tests.conftest import Moelm

CONFIG = Path(__file__).parents[1] / "configs/moe.yaml"


@pytest.mark.parametrize(
    ("overrides", "size"),
    [
        ([], 4096),
        (["data.tokenizer.kind=byte"], BYTE_VOCABULARY),
        (["data.tokenizer.kind=byte", "model.vocab_size=300"], 300),
    ],
)
def test_the_vocabulary_is_the_tokenizers(overrides: list[str], size: int) -> None:
    assert assumed_vocab_size(load_config(CONFIG, overrides)) == size


def test_a_byte_vocabulary_is_that_of_the_tokenizer() -> None:
    from moelm.data.tokenizer import build_tokenizer

    tokenizer = load_config(CONFIG, ["data.tokenizer.kind=byte"]).data.tokenizer
    assert build_tokenizer(tokenizer, []).vocab_size == BYTE_VOCABULARY


def test_an_assumed_vocabulary_is_told(moelm: Moelm) -> None:
    done = moelm("plan", "moe.yaml", "data.tokenizer.kind=char", "--json")
    assert done.returncode == 0
    assert "Warning: the vocabulary of a tokenizer of kind char is not known from the config; 4,096 tokens" in done.stderr
