"""Streaming: the pieces add up to the text, nothing is streamed twice, and nothing is streamed that may still change."""

import pytest
import torch

from moelm.config import ModelConfig, TokenizerConfig
from moelm.data.tokenizer import build_tokenizer
from moelm.errors import MoelmError
from moelm.inference.continuation import Continuation
from moelm.inference.generate import Sampling, generate_text
from moelm.model import KVCache, build_model

TOKENIZER = build_tokenizer(TokenizerConfig(kind="byte"), ())


def stream(text: str, stop: tuple[str, ...] = (), missing: int = 0) -> tuple[str, list[str]]:
    """Add the bytes of a text, except the last `missing`, to a Continuation one by one; returns its text and the pieces."""
    pieces: list[str] = []
    continuation = Continuation(TOKENIZER, [TOKENIZER.bos_id], stop, pieces.append)
    ids = TOKENIZER.encode_prompt(text)[1:]
    assert len(ids) == len(text.encode())
    for number in ids[: len(ids) - missing]:
        continuation.add(number)
    return continuation.finish(), pieces


@pytest.mark.parametrize("text", ["plain", "é€🙂", "a🙂b€", "tail🙂"])
def test_pieces_add_up_and_have_no_incomplete_character(text: str) -> None:
    whole, pieces = stream(text)
    assert whole == text == "".join(pieces)
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("stop", [(), ("zzz",)])
def test_an_incomplete_last_character_is_streamed_once(stop: tuple[str, ...]) -> None:
    whole, pieces = stream("ab🙂", stop, missing=2)
    assert whole == "".join(pieces) == "ab\ufffd"


def test_a_stop_text_is_not_found_in_an_incomplete_character() -> None:
    assert stream("a🙂b", stop=("\ufffd",)) == ("a🙂b", ["a", "🙂", "b"])
    assert stream("a🙂", stop=("\ufffd",), missing=1)[0] == "a"


def test_a_possible_beginning_of_a_stop_text_is_not_streamed() -> None:
    whole, pieces = stream("one\n\nUser: two", stop=("\n\nUser:", "END"))
    assert whole == "one" == "".join(pieces)
    whole, pieces = stream("one\n\nUse", stop=("\n\nUser:",))
    assert whole == "one\n\nUse" == "".join(pieces)


def test_the_earliest_of_several_stop_texts_ends_the_text() -> None:
    assert stream("abcdef", stop=("de", "cdef"))[0] == "abc"


@pytest.mark.parametrize("window", [None, 5])
def test_cached_logits_equal_a_full_forward_pass(window: int | None) -> None:
    ffn = {"kind": "moe", "hidden_dim": 16, "num_experts": 4, "top_k": 2}
    shape = {"dim": 16, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 50, "window": window}
    model = build_model(ModelConfig.model_validate({**shape, "ffn": ffn, "init_std": 0.3}), seed=0).eval()
    tokens = torch.randint(50, (2, 20), generator=torch.Generator().manual_seed(0))
    cache = KVCache(model.config, 2, 20, torch.device("cpu"))
    with torch.no_grad():
        parts = [model(part, cache=cache).logits for part in tokens.split([9, 4, *[1] * 7], dim=1)]
        expected = model(tokens).logits
        torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=0, atol=2e-5 * float(expected.std()))


def test_unknown_characters_and_empty_prompts_are_refused() -> None:
    tokenizer = build_tokenizer(TokenizerConfig(kind="char"), ["hello world"])
    ffn = {"kind": "dense", "hidden_dim": 16}
    shape = {"dim": 16, "num_layers": 1, "num_heads": 2, "vocab_size": tokenizer.vocab_size, "ffn": ffn}
    model = build_model(ModelConfig.model_validate(shape), seed=0).eval()
    with pytest.raises(MoelmError, match="'é', '🙂'"):
        generate_text(model, tokenizer, ["hé🙂llo"], Sampling())
    with pytest.raises(MoelmError, match="empty"):
        generate_text(model, tokenizer, [""], Sampling())
