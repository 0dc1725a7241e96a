"""The vocabulary that counts assume where no tokenizer exists yet."""

from pathlib import Path

import pytest

from moelm.config import load_config
from moelm.model import build_model
from moelm.plan.counts import BYTE_VOCABULARY, assumed_vocab_size, count_model
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


def test_bytes_are_those_of_the_model_in_bfloat16() -> None:
    counts, config = count_model(load_config(CONFIG, ["model.ffn.first_dense=1", "model.ffn.first_dense_dim=9000"]))
    model = build_model(config.model, 0, "meta")
    layers = [2 * sum(weight.numel() for weight in block.parameters()) for block in model.blocks]
    assert counts["largest_layer_bytes_bf16"] == max(layers) == layers[0]
    assert counts["weight_bytes_bf16"] == 2 * sum(weight.numel() for weight in model.parameters())
