"""`moelm sample --show-experts`: texts of tokens, colors of experts, and the list that is printed without colors."""

import io
import json
import os
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, normalizers

from moelm.analyze.layers import layer_number
from moelm.analyze.token_experts import SampleWithExperts, TokenExperts, sample_with_experts, token_name, token_texts
from moelm.cli.sample import print_samples
from moelm.config import ModelConfig, TokenizerConfig
from moelm.data.tokenizer import Tokenizer, build_tokenizer
from moelm.errors import MoelmError
from moelm.inference.generate import Sampling
from moelm.model import KVCache, build_model
from moelm.report.palette import expert_colors, text_color_on
from tests.conftest import Moelm
from tests.tokenizers import SHAPES

BYTES = build_tokenizer(TokenizerConfig(kind="byte"), ())
SAMPLING = Sampling(max_new_tokens=40, temperature=1.5, seed=3)
SAMPLE = SampleWithExperts("the", " cat\n", 1, [TokenExperts(7, " c", [2, 0]), TokenExperts(8, "at\n", [0, 3])])


def model_config(num_layers: int = 4, **ffn: object) -> ModelConfig:
    sizes = {"dim": 16, "num_layers": num_layers, "num_heads": 2, "vocab_size": 258, "init_std": 0.3}
    moe = {"kind": "moe", "hidden_dim": 16, "num_experts": 4, "top_k": 2}
    return ModelConfig.model_validate({**sizes, "ffn": {**moe, **ffn}})


@pytest.mark.parametrize("text", ["plain", "hé🙂llo", "🙂"])
def test_token_texts_add_up_and_a_character_belongs_to_its_last_byte(text: str) -> None:
    ids = BYTES.encode_prompt(text)[1:]
    parts = token_texts(BYTES, [BYTES.bos_id], ids, text)
    assert "".join(parts) == text
    assert [len(part.encode()) for part in parts if part] == [len(character.encode()) for character in text]
    ends = [len(text[: i + 1].encode()) - 1 for i in range(len(text))]
    assert [number for number, part in enumerate(parts) if part] == ends


def test_an_incomplete_character_and_a_truncated_text() -> None:
    ids = BYTES.encode_prompt("ab🙂")[1:-1]
    text = BYTES.decode(ids)
    assert text.startswith("ab\ufffd")
    assert "".join(token_texts(BYTES, [BYTES.bos_id], ids, text)) == text
    assert token_texts(BYTES, [BYTES.bos_id], ids, "a") == ["a", "", "", "", ""]
    assert "".join(token_texts(BYTES, [BYTES.bos_id], BYTES.encode_prompt("a\ufffdb")[1:], "a\ufffdb")) == "a\ufffdb"
    assert token_texts(BYTES, [BYTES.bos_id], [], "") == []


def test_words_that_begin_with_a_space_keep_it() -> None:
    raw = RawTokenizer(models.BPE(vocab={"<s>": 0, "</s>": 1, "\u2581": 2, "a": 3, "\u2581a": 4}, merges=[("\u2581", "a")]))
    raw.add_special_tokens(["<s>", "</s>"])
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    raw.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    assert token_texts(Tokenizer(raw), [4], [4, 3, 4], " aa a") == [" a", "a", " a"]


@pytest.mark.parametrize("shape", SHAPES)
def test_token_texts_add_up_for_each_shape(shape: str) -> None:
    tokenizer = Tokenizer(SHAPES[shape]())
    context, ids = tokenizer.encode_prompt("the red 日本"), tokenizer.encode_batch(["a cat sees 日本 birds"])[0]
    text = tokenizer.decode([*context, *ids])[len(tokenizer.decode(context)) :]
    parts = token_texts(tokenizer, context, ids, text)
    assert "".join(parts) == text
    assert not any("\ufffd" in part for part in parts)


@pytest.mark.parametrize(
    ("shape", "piece", "name"),
    [
        ("byte_fallback", "<0xE6>", "<0xE6>"),
        ("byte_fallback", "\u2581", " "),
        ("byte_level", "Ġa", " a"),
        ("unigram", "\u2581", " "),
        ("word_piece", "##e", "e"),
        ("word_level", "cat", " cat"),
        ("byte_level", "</s>", "</s>"),
    ],
)
def test_names_of_tokens(shape: str, piece: str, name: str) -> None:
    tokenizer = Tokenizer(SHAPES[shape]())
    assert token_name(tokenizer, tokenizer.raw.token_to_id(piece)) == name
    assert token_name(tokenizer, 10**6) == "#1000000"


@pytest.mark.parametrize("stop", [(), ("e",)])
def test_experts_are_those_of_the_generation(stop: tuple[str, ...]) -> None:
    model = build_model(model_config(), seed=0).eval()
    prompts = ["a", "hello there"]
    for sample in sample_with_experts(model, BYTES, prompts, SAMPLING._replace(stop=stop), "middle"):
        assert "".join(token.text for token in sample.tokens) == sample.text
        assert sample.layer == 2
        assert len({token.experts[0] for token in sample.tokens}) > 1
        cache = KVCache(model.config, 1, 80, torch.device("cpu"))
        row = BYTES.encode_prompt(sample.prompt)
        with torch.inference_mode():
            model(torch.tensor([row]), cache=cache)
            for token in sample.tokens:
                routing = model(torch.tensor([[token.id]]), cache=cache).routings[2]
                assert routing.experts_NK.tolist() == [token.experts]


def test_layers_have_names_and_numbers() -> None:
    config = model_config(num_layers=6, every=2)
    assert [layer_number(config, asked) for asked in ("first", "middle", "last", "3")] == [1, 3, 5, 3]
    for asked in ("2", "6", "-1", "best", "²"):
        with pytest.raises(MoelmError, match=r"first, middle, last or one of 1, 3, 5 is expected"):
            layer_number(config, asked)
    with pytest.raises(MoelmError, match="experts choose"):
        layer_number(model_config(router={"kind": "expert_choice"}), "last")


def printed(**options: object) -> str:
    file = io.StringIO()
    console = Console(file=file, width=20, highlight=False, **options)  # type: ignore[arg-type]
    print_samples(console, [SAMPLE], num_experts=4)
    return file.getvalue()


def test_colors_follow_the_first_experts() -> None:
    output = printed(force_terminal=True, color_system="truecolor", _environ={})
    assert re.sub(r"\x1b\[[\d;]*m", "", output).startswith("the cat\n")
    for text, expert in ((" c", 2), ("at", 0), (" 2 ", 2), (" 0 ", 0)):
        color = expert_colors(4)[expert]
        background = ";".join(str(int(color[at : at + 2], 16)) for at in (1, 3, 5))
        assert re.search(rf"48;2;{background}m{text}", output), text


def test_eight_experts_have_different_ansi_colors() -> None:
    sample = SAMPLE._replace(tokens=[TokenExperts(7, "x", [expert]) for expert in range(8)])
    file = io.StringIO()
    print_samples(Console(file=file, force_terminal=True, color_system="standard", _environ={}), [sample], 8)
    assert len(set(re.findall(r"\x1b\[30;([\d;]+)mx", file.getvalue()))) == 8


@pytest.mark.parametrize("options", [{}, {"force_terminal": True, "color_system": "truecolor", "no_color": True}])
def test_without_colors_there_is_a_list(options: dict[str, object]) -> None:
    text, heading, *lines = printed(**options, _environ={}).replace("\n\n", "\n").splitlines()
    assert text == "the cat"
    assert heading.startswith("--- experts in layer 1")
    assert [(line.split("\t")[0], json.loads(line.split("\t")[1])) for line in lines] == [("2 0", " c"), ("0 3", "at\n")]


@pytest.mark.parametrize("num_experts", [1, 8, 9, 64, 256])
def test_every_expert_has_its_own_color_with_readable_text(num_experts: int) -> None:
    colors = expert_colors(num_experts)
    assert len(set(colors)) == num_experts

    def luminance(color: str) -> float:
        parts = (int(color[at : at + 2], 16) / 255 for at in (1, 3, 5))
        r, g, b = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    for color in colors:
        dark, light = sorted((luminance(color), luminance(text_color_on(color))))
        assert (light + 0.05) / (dark + 0.05) >= 4.5


def test_the_command_line(moelm: Moelm, trained: Path) -> None:
    argv = ["sample", "tiny-moe", "--prompt", "the cat", "--prompt", "a", "--max-new-tokens", "8"]
    done = moelm(*argv, "--show-experts", "--json", cwd=trained)
    assert done.returncode == 0, done.stderr
    samples = json.loads(done.stdout)["samples"]
    assert [sample["prompt"] for sample in samples] == ["the cat", "a"]
    for sample in samples:
        assert sample["layer"] == 1
        assert "".join(token["text"] for token in sample["tokens"]) == sample["text"]
        assert all(len(set(token["experts"])) == 2 for token in sample["tokens"])
    environment = {name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "TTY_COMPATIBLE")}
    piped = moelm(*argv, "--show-experts=first", cwd=trained, env=environment)
    assert "\x1b" not in piped.stdout
    assert piped.stdout.count("--- experts in layer 0") == 2
    assert f"--- 1\na{samples[1]['text']}\n---" in piped.stdout


@pytest.mark.parametrize(
    ("run", "option", "message"),
    [
        ("tiny-dense", "--show-experts", "The model is dense"),
        ("tiny-moe", "--show-experts=7", "first, middle, last or one of 0, 1 is expected"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(moelm: Moelm, trained: Path, run: str, option: str, message: str) -> None:
    done = moelm("sample", run, "--prompt", "the cat", option, cwd=trained)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert message in done.stderr
