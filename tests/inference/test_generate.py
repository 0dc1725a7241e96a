"""Text generation: batches of prompts, sampling settings, stop texts, streaming, contexts."""

import re

import pytest
import torch
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, normalizers

from moelm.config import ModelConfig, TokenizerConfig
from moelm.data.tokenizer import Tokenizer, build_tokenizer
from moelm.errors import MoelmError
from moelm.inference.continuation import Continuation
from moelm.inference.generate import Sampling, encode_prompts, generate_rows, generate_text, sample_token
from moelm.model import Transformer, build_model
from tests.tokenizers import SHAPES

TOKENIZER = build_tokenizer(TokenizerConfig(kind="byte"), ())


@pytest.fixture(scope="module")
def model() -> Transformer:
    return build_small_model()


def build_small_model(window: int | None = None) -> Transformer:
    ffn = {"kind": "moe", "hidden_dim": 16, "num_experts": 4, "top_k": 2}
    shape = {"dim": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 258, "max_seq_len": 48, "init_std": 0.3}
    return build_model(ModelConfig.model_validate({**shape, "window": window, "ffn": ffn}), seed=0).eval()


GREEDY = Sampling(max_new_tokens=12, temperature=0)


def test_batched_prompts_continue_as_single_ones(model: Transformer) -> None:
    prompts = ["a", "hello there", "xyz"]
    batched = generate_text(model, TOKENIZER, prompts, GREEDY)
    assert batched == [generate_text(model, TOKENIZER, [prompt], GREEDY)[0] for prompt in prompts]


def test_cached_generation_equals_full_forward_passes(model: Transformer) -> None:
    ids = TOKENIZER.encode_prompt("hello")
    for _ in range(12):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == TOKENIZER.eos_id:
            break
    expected = TOKENIZER.decode(ids[6:])
    assert generate_text(model, TOKENIZER, ["hello"], GREEDY) == [expected]


@pytest.mark.parametrize("limit", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
def test_the_strictest_limits_are_greedy(model: Transformer, limit: dict[str, float]) -> None:
    sampled = generate_text(model, TOKENIZER, ["hello"], GREEDY._replace(temperature=1.5, **limit))
    assert sampled == generate_text(model, TOKENIZER, ["hello"], GREEDY)


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-20, 1e-9])
def test_tiny_temperatures_are_greedy(model: Transformer, temperature: float) -> None:
    sampled = generate_text(model, TOKENIZER, ["hello"], GREEDY._replace(temperature=temperature))
    assert sampled == generate_text(model, TOKENIZER, ["hello"], GREEDY)


@pytest.mark.parametrize(
    "setting",
    [
        *({"temperature": value} for value in (-1.0, float("nan"), float("inf"), 1e300)),
        *({name: value} for name in ("top_p", "min_p") for value in (-0.1, 1.1, float("nan"))),
        *({"repetition_penalty": value} for value in (0.0, -1.0, 1e300, float("nan"))),
        *({"seed": value} for value in (-(2**63) - 1, 2**64)),
        {"top_k": 0},
        {"max_new_tokens": 0},
    ],
)
def test_settings_out_of_range_are_refused(model: Transformer, setting: dict[str, float]) -> None:
    name, value = next(iter(setting.items()))
    with pytest.raises(MoelmError, match=rf"{name} is {re.escape(str(value))}; a .*number .* is expected"):
        generate_text(model, TOKENIZER, ["hello"], Sampling(**setting))  # type: ignore[arg-type]


def test_an_empty_stop_text_is_refused(model: Transformer) -> None:
    with pytest.raises(MoelmError, match="A stop text is empty"):
        generate_text(model, TOKENIZER, ["hello"], GREEDY._replace(stop=("x", "")))


@pytest.mark.parametrize(
    "setting",
    [
        {"seed": -(2**63)},
        {"seed": 2**64 - 1},
        {"top_p": 0.0},
        {"min_p": 1.0},
        {"top_k": 2**70},
        {"temperature": 1e6},
        {"temperature": 1e6, "repetition_penalty": 100.0},
        {"temperature": 1e-11, "repetition_penalty": 0.01},
    ],
)
def test_settings_at_the_edge_of_their_range_give_tokens(model: Transformer, setting: dict[str, float]) -> None:
    sampling = Sampling(max_new_tokens=3, **setting)  # type: ignore[arg-type]
    assert len(generate_rows(model, TOKENIZER, [TOKENIZER.encode_prompt("hello")], sampling)[0].ids) > 0


def test_the_seed_determines_the_text(model: Transformer) -> None:
    sampling = Sampling(max_new_tokens=30, temperature=1.0, seed=1)
    first = generate_text(model, TOKENIZER, ["hello"], sampling)
    assert first == generate_text(model, TOKENIZER, ["hello"], sampling)
    assert first != generate_text(model, TOKENIZER, ["hello"], sampling._replace(seed=2))


def test_samples_follow_the_truncated_distribution() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()
    generator = torch.Generator().manual_seed(0)
    seen = torch.zeros(1, 4, dtype=torch.bool)
    sampling = Sampling(temperature=1.0, top_p=0.7)
    tokens = [int(sample_token(logits.clone(), seen, sampling, generator)) for _ in range(3000)]
    assert set(tokens) == {0, 1}
    standard_error = (2 / 3 * 1 / 3 / 3000) ** 0.5
    assert abs(tokens.count(0) / 3000 - 2 / 3) < 4 * standard_error


def test_the_repetition_penalty_applies_to_seen_tokens() -> None:
    logits = torch.tensor([[2.0, 1.5, -1.0]])
    seen = torch.tensor([[True, False, False]])
    sampling = Sampling(temperature=0, repetition_penalty=2.0)
    assert int(sample_token(logits, seen, sampling, torch.Generator())) == 1


def test_generation_stops_at_each_end_token(model: Transformer) -> None:
    tokenizer = build_tokenizer(TokenizerConfig(kind="byte"), ())
    whole = generate_rows(model, tokenizer, [[0, 9], [0, 30]], GREEDY)
    first, second = whole[0].ids[2], whole[1].ids[3]
    tokenizer.eos_ids = (tokenizer.eos_id, first, second)
    for continuation, old in zip(generate_rows(model, tokenizer, [[0, 9], [0, 30]], GREEDY), whole, strict=True):
        end = min(old.ids.index(token) for token in (first, second) if token in old.ids)
        assert continuation.ids == old.ids[:end]


def test_what_the_tokenizer_cannot_read_of_a_prompt_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = Tokenizer(SHAPES["metaspace_bpe"]())
    assert encode_prompts(tokenizer, ["the cat"]) == [tokenizer.encode_prompt("the cat")]
    assert capsys.readouterr().err == ""
    encode_prompts(tokenizer, ["the ☃ cat"])
    assert "0 characters of the prompt as unknown, and drops or changes 1" in capsys.readouterr().err


def test_a_word_that_begins_with_a_space_keeps_it() -> None:
    raw = RawTokenizer(models.BPE(vocab={"<s>": 0, "</s>": 1, "\u2581": 2, "a": 3, "\u2581a": 4}, merges=[("\u2581", "a")]))
    raw.add_special_tokens(["<s>", "</s>"])
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    raw.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = Tokenizer(raw)
    prompt = tokenizer.encode_prompt("a a")
    assert prompt == [0, 4, 4]
    continuation = Continuation(tokenizer, prompt)
    for token in (4, 3, 4):
        continuation.add(token)
    assert "a a" + continuation.finish() == "a a aa a"
    from_start = Continuation(tokenizer, [tokenizer.bos_id])
    from_start.add(4)
    assert from_start.finish() == "a"


def test_a_stop_text_ends_the_text_and_the_stream_equals_the_text(model: Transformer) -> None:
    sampling = Sampling(max_new_tokens=40, temperature=1.0, seed=3)
    pieces: list[str] = []
    whole = generate_text(model, TOKENIZER, ["hello"], sampling, pieces.append)[0]
    assert "".join(pieces) == whole
    stop = whole[6:8]
    pieces.clear()
    stopped = generate_text(model, TOKENIZER, ["hello"], sampling._replace(stop=(stop,)), pieces.append)[0]
    assert stopped == whole[: whole.index(stop)] == "".join(pieces)


def test_a_text_longer_than_the_context_needs_a_window(model: Transformer) -> None:
    long = Sampling(max_new_tokens=60, temperature=0)
    with pytest.raises(MoelmError, match="context of 48"):
        generate_text(model, TOKENIZER, ["hello"], long)
    assert generate_text(build_small_model(window=8), TOKENIZER, ["hello"], long)
