"""Tokenizers: special tokens and text that spells them, ids, losses of text, start and end tokens."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import models, normalizers, pre_tokenizers

from moelm.config import TokenizerConfig
from moelm.data.tokenizer import Tokenizer, build_tokenizer, tokenizer_fingerprint
from moelm.errors import MoelmError
from tests.tokenizers import SHAPES, SPECIAL

TRAPS = ["the red </s> cat", "</s>", "<s><s>", "a<unk>b", "\u2581</s>", "cat </s></s>dog <s> the", "<pad> </S> [CLS]"]
Tree = dict[str, Any]


def tree_of(shape: str) -> Tree:
    """The tokenizer.json of a shape."""
    return json.loads(SHAPES[shape]().to_str())  # type: ignore[no-any-return]


def load(folder: Path, tree: Tree, **beside: Tree) -> Tokenizer:
    """Load a tokenizer.json, with JSON files beside it."""
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    for name, content in beside.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return Tokenizer.load(folder / "tokenizer.json")


def unchanged(tree: Tree) -> None:
    pass


def not_special(tree: Tree) -> None:
    for entry in tree["added_tokens"]:
        entry["special"] = False


def not_added(tree: Tree) -> None:
    tree["added_tokens"] = []


def greedy_neighbors(tree: Tree) -> None:
    for entry in tree["added_tokens"]:
        entry |= {"special": False, "lstrip": True, "rstrip": True, "normalized": True}


def lower_case(tree: Tree) -> None:
    tree["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, *filter(None, [tree["normalizer"]])]}


def whole_words(tree: Tree) -> None:
    if tree["model"]["type"] == "BPE":
        tree["model"]["ignore_merges"] = True
        tree["pre_tokenizer"] = {"type": "WhitespaceSplit"}


def merged(tree: Tree) -> None:
    """A BPE model whose merges lead to the end token."""
    if tree["model"]["type"] == "BPE":
        vocab = tree["model"]["vocab"]
        for piece in ("<", "/", "s", ">", "</", "s>"):
            vocab.setdefault(piece, max(vocab.values()) + 1)
        tree["model"]["merges"] = [["<", "/"], ["s", ">"], ["</", "s>"], *tree["model"]["merges"]]


KEEP_ALL_TEXT = ("byte_level", "byte_fallback", "unigram_bytes")
CHANGE_TEXT = (greedy_neighbors, lower_case, whole_words)


@pytest.mark.parametrize("change", [unchanged, not_special, not_added, greedy_neighbors, lower_case, whole_words, merged])
@pytest.mark.parametrize("shape", SHAPES)
def test_text_that_spells_special_tokens_stays_text(shape: str, change: Callable[[Tree], None], tmp_path: Path) -> None:
    tree = tree_of(shape)
    change(tree)
    tokenizer = load(tmp_path, tree)
    vocab = tokenizer.raw.get_vocab()
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (vocab["<s>"], (vocab["</s>"],))
    for text, ids in zip(TRAPS, tokenizer.encode_batch(TRAPS), strict=True):
        assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)
        if shape in KEEP_ALL_TEXT and change not in CHANGE_TEXT and "\u2581" not in text:
            assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("shape", SHAPES)
def test_other_text_is_encoded_as_by_the_library(shape: str) -> None:
    raw = SHAPES[shape]()
    texts = ["the red cat sees a green stone", "sleeping birds, 日本", "newer\n\nthe  the", "Zebra 🙂"]
    expected = [raw.encode(text, add_special_tokens=False).ids for text in texts]
    assert Tokenizer(raw).encode_batch(texts) == expected


@pytest.mark.parametrize("shape", SHAPES)
def test_losses_of_each_shape(shape: str) -> None:
    """Texts with known characters only, and then with unknown ones."""
    tokenizer = Tokenizer(SHAPES[shape]())

    def losses(*texts: str) -> tuple[int, int, int]:
        return tokenizer.count_losses(list(texts), tokenizer.encode_batch(list(texts)))

    assert losses("the red cat", "a stone and the birds") == (0, 0, 0)
    expected = {
        "metaspace_bpe": (0, 0, 2),  # dropped
        "unigram": (1, 2, 0),  # one unknown token for two characters
        "word_piece": (1, 2, 0),
        "word_level": (1, 2, 0),
        "character": (2, 2, 0),
    }
    assert losses("the ψ☃ cat", "the cat") == expected.get(shape, (0, 0, 0))


@pytest.mark.parametrize(
    ("normalizer", "text", "lost"),
    [
        (normalizers.Lowercase(), "The Red cat", 2),
        (normalizers.NFKC(), "ﬁne", 1),
        (normalizers.NFC(), "e\u0301", 2),
        (normalizers.NFC(), "é the", 0),
        (normalizers.StripAccents(), "the e\u0301", 1),
        (normalizers.Replace("cat", ""), "the cat!", 3),
        (normalizers.Strip(), "  the ", 3),
    ],
)
def test_characters_that_a_normalizer_changes_are_lost(normalizer: Any, text: str, lost: int) -> None:
    raw = RawTokenizer.from_str(SHAPES["byte_level"]().to_str())
    raw.normalizer = normalizer
    tokenizer = Tokenizer(raw)
    assert tokenizer.count_losses([text, "the"], tokenizer.encode_batch([text, "the"])) == (0, 0, lost)


def test_a_space_that_stands_for_the_start_of_a_word_is_no_loss() -> None:
    raw = RawTokenizer.from_str(SHAPES["byte_level"]().to_str())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer = Tokenizer(raw)
    assert tokenizer.decode(tokenizer.encode_batch(["the cat"])[0]) == " the cat"
    assert tokenizer.count_losses(["the cat"], tokenizer.encode_batch(["the cat"])) == (0, 0, 0)
    llama = Tokenizer(SHAPES["byte_fallback"]())
    assert llama.count_losses(["a\u2581b"], llama.encode_batch(["a\u2581b"])) == (0, 0, 1)  # becomes a space


@pytest.mark.parametrize("shape", ["byte_level", "byte_fallback", "metaspace_bpe", "word_piece", "word_level"])
def test_ids_may_have_holes(shape: str, tmp_path: Path) -> None:
    tree = tree_of(shape)
    vocab = tree["model"]["vocab"]
    last = max(vocab, key=vocab.__getitem__)
    vocab[last] = 70_000
    tree["added_tokens"].append({**tree["added_tokens"][0], "id": 70_100, "content": "<new>"})
    tokenizer = load(tmp_path, tree)
    assert tokenizer.vocab_size == 70_101
    assert tokenizer.raw.token_to_id(last) == 70_000
    assert tokenizer.raw.token_to_id("<new>") == 70_100
    tokenizer.save(tmp_path / "saved.json")
    assert Tokenizer.load(tmp_path / "saved.json").content == tokenizer.content


def test_new_tokens_do_not_take_ids_that_are_in_use(tmp_path: Path) -> None:
    raw = RawTokenizer(models.WordLevel({"a": 0, "b": 2, "c": 3, "<unk>": 4}, unk_token="<unk>"))
    tokenizer = load(tmp_path, json.loads(raw.to_str()))
    assert (tokenizer.added, tokenizer.bos_id, tokenizer.eos_id) == (["<|bos|>", "<|eos|>"], 5, 6)
    assert tokenizer.encode_batch(["c"]) == [[3]]


def repeated_id(tree: Tree) -> None:
    tree["model"]["vocab"]["twin"] = 10


def other_id(tree: Tree) -> None:
    tree["added_tokens"][1]["id"] = 5


def far_id(tree: Tree) -> None:
    tree["model"]["vocab"]["far"] = 2**32 - 1


def damaged_map(tree: Tree) -> None:
    tree["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}


def no_model(tree: Tree) -> None:
    del tree["model"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (repeated_id, "two of its tokens have the same id"),
        (other_id, "the added token '<s>' the id 5, but the rest of the file 1"),
        (far_id, "its highest id is 4294967295"),
        (no_model, "Model missing"),
        (damaged_map, "its precompiled_charsmap is damaged"),
    ],
)
def test_contradictory_files_are_refused(change: Callable[[Tree], None], message: str, tmp_path: Path) -> None:
    tree = tree_of("word_level")
    change(tree)
    with pytest.raises(MoelmError, match=f"tokenizer.json is not a tokenizer.json that can be used: .*{message}"):
        load(tmp_path, tree)


def test_a_missing_unknown_token_and_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    raw = RawTokenizer(models.WordLevel({"the": 0, "cat": 1}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = load(tmp_path, json.loads(raw.to_str()))
    with pytest.raises(MoelmError, match=r"tokenizer.json cannot encode 'dog' in the text 'the dog'"):
        tokenizer.encode_batch(["the cat", "the dog"])
    for text, what in (("caf\udce9", "the byte 0xe9 after 'caf'"), ("\ud800", "half a surrogate pair at its beginning")):
        with pytest.raises(MoelmError, match=what):
            tokenizer.encode_batch(["the", text])


@pytest.mark.parametrize(("eos", "good", "bad"), [(0, "the cat", "the x"), ("cat", "the dogs", "a cat"), ("?", "the", "?")])
def test_text_that_is_read_as_an_end_token_is_refused(eos: int | str, good: str, bad: str, tmp_path: Path) -> None:
    """The unknown token, a word, and a special token of one character, which looks like text."""
    tree = tree_of("word_level")
    tree["added_tokens"].append({**tree["added_tokens"][0], "content": "?", "id": 200})
    tree["model"]["vocab"]["?"] = 200
    load(tmp_path, tree)
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json", eos=eos)
    assert tokenizer.encode_batch([good])
    with pytest.raises(
        MoelmError, match=f"A part of the text '{re.escape(bad)}' is read as .*, which starts or ends texts"
    ):
        tokenizer.encode_batch([good, bad])
    assert tokenizer.encode_prompt(bad)[-1] == tokenizer.eos_id


def test_dropout_is_not_applied(tmp_path: Path) -> None:
    tree = tree_of("byte_level")
    tree["model"]["dropout"] = 0.9
    tokenizer = load(tmp_path, tree)
    assert (
        tokenizer.encode_batch(["the red cat"] * 20)
        == [Tokenizer(SHAPES["byte_level"]()).encode_batch(["the red cat"])[0]] * 20
    )


def renamed(tree: Tree) -> Tree:
    """The same tokenizer with unusual names of the start and end tokens."""
    return json.loads(json.dumps(tree).replace('"<s>"', '"[S]"').replace('"</s>"', '"[E]"'))  # type: ignore[no-any-return]


@pytest.mark.parametrize("shape", SHAPES)
def test_start_and_end_tokens_of_files_beside_are_kept_by_a_copy(shape: str, tmp_path: Path) -> None:
    tree = renamed(tree_of(shape))
    vocab = Tokenizer(SHAPES[shape]()).raw.get_vocab()
    bos, eos, other = vocab["<s>"], vocab["</s>"], max(vocab.values())
    plain = tokenizer_fingerprint(tmp_path / "tokenizer.json") if load(tmp_path, tree) else ""
    tokenizer = load(tmp_path, tree, config={"bos_token_id": bos}, generation_config={"eos_token_id": [eos, other]})
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eos_ids) == (bos, eos, (eos, other))
    assert tokenizer_fingerprint(tmp_path / "tokenizer.json") != plain
    ids = tokenizer.encode_batch(["[S] the [E] cat"])[0]
    assert not {bos, eos} & set(ids)
    (tmp_path / "copy").mkdir()
    tokenizer.save(tmp_path / "copy" / "tokenizer.json")
    copy = Tokenizer.load(tmp_path / "copy" / "tokenizer.json")
    assert (copy.bos_id, copy.eos_id, copy.eos_ids) == (bos, eos, (eos, other))
    assert copy.content == tokenizer.content
    by_user = Tokenizer.load(tmp_path / "tokenizer.json", "[S]", ["[E]"])
    assert (by_user.bos_id, by_user.eos_ids) == (bos, (eos,))


def test_names_beside_the_file_and_null(tmp_path: Path) -> None:
    tree = renamed(tree_of("byte_level"))
    settings = {"bos_token": None, "eos_token": {"content": "[E]", "lstrip": False}}
    tokenizer = load(tmp_path, tree, tokenizer_config=settings, config={"eos_token_id": []})
    assert (tokenizer.added, tokenizer.eos_ids) == (["<|bos|>"], (2,))
    for wrong in ("2", True, 2.5, [[2]], {"content": "</s>"}):
        with pytest.raises(MoelmError, match=r"config.json: eos_token_id is .*; an id or a list of ids is expected"):
            load(tmp_path, tree, config={"eos_token_id": wrong})
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(MoelmError, match=r"config.json cannot be read as JSON"):
        Tokenizer.load(tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "bpe", "bos": 0}, "bos and eos name tokens of kind: file"),
        ({"kind": "file", "path": "x", "eos": []}, "the text of a token or an id from 0"),
        ({"kind": "file", "path": "x", "eos": [1, -2]}, "the text of a token or an id from 0"),
        ({"kind": "file", "path": "x", "bos": ""}, "the text of a token or an id from 0"),
    ],
)
def test_settings_of_start_and_end_tokens(settings: Tree, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenizerConfig.model_validate(settings)


def test_the_config_names_the_tokens(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(json.dumps(renamed(tree_of("unigram"))))
    config = TokenizerConfig(kind="file", path=str(tmp_path / "t.json"), bos="[S]", eos=[2, "<unk>"])
    tokenizer = build_tokenizer(config, ())
    assert (tokenizer.bos_id, tokenizer.eos_ids, SPECIAL[0]) == (1, (2, 0), "<unk>")
    with pytest.raises(MoelmError, match=r"data.tokenizer.eos is 'x', which is not a token of the tokenizer"):
        build_tokenizer(config.model_copy(update={"eos": "x"}), ())
