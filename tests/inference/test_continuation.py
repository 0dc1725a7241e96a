"""Continuations in context: their text against the library's decoding of the whole, for many shapes of tokenizers."""

import random
import time
from collections.abc import Sequence

import pytest

from moelm.data.tokenizer import Tokenizer
from moelm.inference.continuation import INCOMPLETE, Continuation
from tests.tokenizers import SHAPES

TEXTS = [
    "the red 日本語の文章 cat🙂 e\u0301 sleeping",
    "日本語",
    "12 日本",
    " two  spaces",
    "あい\n\nb",
    "🙂👨‍👩‍👧",
    "\ufffd x \ufffd",
]


def generate(tokenizer: Tokenizer, prompt: Sequence[int], new: Sequence[int], *stops: str) -> tuple[str, list[str]]:
    """The text of a continuation, and the pieces that are streamed."""
    pieces: list[str] = []
    continuation = Continuation(tokenizer, prompt, stops, pieces.append)
    for token in new:
        continuation.add(token)
    return continuation.finish(), pieces


@pytest.mark.parametrize("shape", SHAPES)
def test_texts_are_those_of_the_whole_decoded_at_once(shape: str) -> None:
    """Prompts and continuations of texts and of random tokens, cut anywhere."""
    tokenizer = Tokenizer(SHAPES[shape]())
    no_bytes = sorted(tokenizer.text_ids - tokenizer.byte_ids.keys())
    for seed in range(60):
        rng = random.Random(seed)
        pool = [*no_bytes, tokenizer.bos_id]
        prompt = tokenizer.encode_prompt(rng.choice(TEXTS)) + (rng.choices(pool, k=40) if seed % 2 else [])
        new = [token for text in rng.choices(TEXTS, k=3) for token in tokenizer.encode_batch([text])[0]]
        new += rng.choices(pool, k=rng.randint(0, 60))
        before = tokenizer.decode(prompt)
        if INCOMPLETE in before and tokenizer.byte_ids == {} and shape == "byte_level":
            prompt, before = [tokenizer.bos_id], ""  # half a character that may be completed; see the next test
        text, pieces = generate(tokenizer, prompt, new)
        assert text == tokenizer.decode([*prompt, *new])[len(before) :], seed
        assert "".join(pieces) == text


@pytest.mark.parametrize("shape", ["byte_level", "byte_fallback", "unigram_bytes"])
def test_characters_of_several_tokens_are_streamed_whole(shape: str) -> None:
    tokenizer = Tokenizer(SHAPES[shape]())
    text = "語の🙂 文"
    ids = tokenizer.encode_batch([f"日{text}"])[0]
    characters = tokenizer.encode_prompt("日")
    assert ids[: len(characters) - 1] == characters[1:]
    for cut in (0, 1, 2):  # the prompt ends in a character's middle
        prompt, new = characters[: len(characters) - cut], ids[len(characters) - 1 - cut :]
        whole, pieces = generate(tokenizer, prompt, new)
        assert whole == "".join(pieces) == ("日" if cut else "") + text
        assert len(pieces) >= len(text)
        assert INCOMPLETE not in whole


@pytest.mark.parametrize("shape", ["byte_fallback", "unigram_bytes"])
def test_bytes_that_are_no_character_leave_the_others_readable(shape: str) -> None:
    tokenizer = Tokenizer(SHAPES[shape]())
    token = {byte: number for number, byte in tokenizer.byte_ids.items()}
    prompt = tokenizer.encode_prompt("the 日")
    for values, expected in (
        ("語".encode()[:2], INCOMPLETE * 2),
        ("語の".encode()[:-1], f"語{INCOMPLETE * 2}"),
        ("語".encode()[:2] + "の".encode(), f"{INCOMPLETE * 2}の"),
        (b"\x80\xff" + "の".encode() + b"\xe3A", f"{INCOMPLETE * 2}の{INCOMPLETE}A"),
        (b"\xc0\x80", INCOMPLETE * 2),
    ):
        new = [token[value] for value in values]
        text, pieces = generate(tokenizer, prompt, new)
        assert text == "".join(pieces) == expected
        space = tokenizer.raw.token_to_id("\u2581")
        assert generate(tokenizer, prompt, [*new, space])[0] == f"{expected} "
        assert generate(tokenizer, [*prompt, *new], [space])[0].lstrip(INCOMPLETE) == " "


@pytest.mark.parametrize("shape", ["byte_level", "byte_fallback", "unigram_bytes", "metaspace_bpe"])
@pytest.mark.parametrize("stop", ["本", "red cat", ", 日", "d c"])
def test_stop_texts_are_found_across_tokens(shape: str, stop: str) -> None:
    tokenizer = Tokenizer(SHAPES[shape]())
    text, pieces = generate(tokenizer, [tokenizer.bos_id], tokenizer.encode_batch(["the red cat, 日本 birds"])[0], stop)
    assert text == "".join(pieces) == "the red cat, 日本 birds".partition(stop)[0]


def test_each_end_token_ends_the_text() -> None:
    raw = SHAPES["byte_level"]()
    tokenizer = Tokenizer(raw)
    tokenizer.eos_ids = (2, 0)
    ids = tokenizer.encode_batch(["cat"])[0]
    for end in tokenizer.eos_ids:
        continuation = Continuation(tokenizer, [tokenizer.bos_id])
        for token in (*ids, end, *ids):
            continuation.add(token)
        assert (continuation.finish(), continuation.done, continuation.ids) == ("cat", True, ids)


@pytest.mark.parametrize("shape", ["byte_level", "byte_fallback"])
def test_time_grows_with_the_length(shape: str) -> None:
    tokenizer = Tokenizer(SHAPES[shape]())

    def seconds(repeats: int) -> float:
        new = tokenizer.encode_batch(["日本語の文章を書きます" * repeats])[0]
        started = time.perf_counter()
        generate(tokenizer, [tokenizer.bos_id], new, "zzz")
        return time.perf_counter() - started

    assert min(seconds(160) for _ in range(3)) < 8 * min(seconds(40) for _ in range(3))  # 16 times if quadratic
