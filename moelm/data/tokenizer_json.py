"""The content of a tokenizer.json: what it says about its model, and the changes that moelm makes to it.

A `tree` is the parsed JSON. The library numbers added tokens itself and looks up words of the model without regard to
special tokens, so both are arranged here.
"""

import base64
import json
import re
import secrets
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, get_args

from tokenizers import Tokenizer as RawTokenizer
from tokenizers import pre_tokenizers

Tree = dict[str, Any]
UnicodeForm = Literal["NFC", "NFD", "NFKC", "NFKD"]

BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
"""Tokens that stand for a byte in tokenizers with byte fallback."""
CONTROL_TOKEN = re.compile(r"<.+>|\[.+\]", re.DOTALL)
"""The look of tokens that are no text."""
MAX_ID = 2**24
"""Highest accepted id; every id below has a row in the embedding."""
SPACE = "\u2581"
"""What SentencePiece writes for a space."""


def load_raw(text: str, added: Mapping[str, int]) -> RawTokenizer:
    """The tokenizer of a tokenizer.json, with the ids that the file gives to added tokens.

    Args:
        added: ids of further added tokens, by their text.

    Raises:
        ValueError: ids that cannot be given.
        Exception: the library's, for a malformed file.
    """
    content = json.loads(text)
    if isinstance(content, dict):
        _check_charsmaps(content.get("normalizer"))
    raw = RawTokenizer.from_str(text)
    _check_ids(raw)  # before the library writes the vocabulary, which leaves out tokens without an id of their own
    entries: list[Tree] = content.get("added_tokens") or []
    more = {name: token for name, token in added.items() if raw.token_to_id(name) is None}
    if not more and not _misnumbered(raw, entries):
        return raw
    tree: Tree = json.loads(raw.to_str())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    tree["added_tokens"] = [{**flags, **entry} for entry in entries]
    for name, token in more.items():
        add_special(tree, name, token)
    return build_raw(tree)


def _check_charsmaps(normalizer: Any) -> None:
    """Refuse damaged maps of SentencePiece, with which the library would panic."""
    if not isinstance(normalizer, dict):
        return
    for part in normalizer.get("normalizers") or ():
        _check_charsmaps(part)
    if normalizer.get("type") == "Precompiled":
        try:
            data = base64.b64decode(normalizer["precompiled_charsmap"], validate=True)
            size = int.from_bytes(data[:4], "little")
            if not 4 <= size <= len(data) - 4:
                raise ValueError(f"it has {len(data)} bytes, but a trie of {size}")
            data[4 + size :].decode()
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"its precompiled_charsmap is damaged ({error})") from None


def make_deterministic(tree: Tree) -> None:
    """Let the tokenizer encode whole texts, each in one way."""
    tree |= {"truncation": None, "padding": None}
    if tree["model"].get("dropout"):
        tree["model"]["dropout"] = None  # BPE dropout makes encodings random


def outside_vocabulary(tree: Tree) -> str:
    """What can be changed in a tree, in a form to be compared."""
    return json.dumps({**tree, "model": tree["model"].get("dropout")})


def build_raw(tree: Tree) -> RawTokenizer:
    """The library's tokenizer of a tree, with the ids that the tree gives to added tokens.

    Raises:
        ValueError: ids that cannot be given.
    """
    raw = RawTokenizer.from_str(json.dumps(tree))
    vocab = tree["model"].get("vocab")
    if wrong := _misnumbered(raw, tree["added_tokens"]):
        for entry in wrong if isinstance(vocab, dict) else ():
            # The library numbers added tokens by itself, but not those of the model.
            vocab.setdefault(entry["content"], entry["id"])
        raw = RawTokenizer.from_str(json.dumps(tree))
    for entry in _misnumbered(raw, tree["added_tokens"]):
        raise ValueError(
            f"it gives the added token {entry['content']!r} the id {entry['id']}, but the rest of the file "
            f"{raw.token_to_id(entry['content'])}"
        )
    _check_ids(raw)
    return raw


def _misnumbered(raw: RawTokenizer, entries: Sequence[Tree]) -> list[Tree]:
    return [entry for entry in entries if raw.token_to_id(entry["content"]) != entry["id"]]


def _check_ids(raw: RawTokenizer) -> None:
    ids = raw.get_vocab(with_added_tokens=True)
    if len(set(ids.values())) < len(ids):
        raise ValueError("two of its tokens have the same id")
    if max(ids.values(), default=0) > MAX_ID:
        raise ValueError(f"its highest id is {max(ids.values())}; at most {MAX_ID} is accepted")


def model_pieces(tree: Tree) -> Collection[str]:
    """The tokens of the model, without added ones."""
    vocab = tree["model"]["vocab"]
    return vocab if isinstance(vocab, dict) else {piece for piece, _ in vocab}


def unknown_token(tree: Tree) -> str | None:
    """The text of the token that stands for what the model does not know; it may be missing from the vocabulary."""
    model = tree["model"]
    if model["type"] != "Unigram":
        token: str | None = model.get("unk_token")
        return token
    return None if model.get("unk_id") is None else str(model["vocab"][model["unk_id"]][0])


def add_special(tree: Tree, content: str, token_id: int) -> bool:
    """Make a token special, and an added one if it is not; returns whether that changed anything."""
    for entry in tree["added_tokens"]:
        if entry["content"] == content:
            changed = not entry["special"]
            entry["special"] = True
            return changed
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tree["added_tokens"].append({"id": token_id, "content": content, **flags, "special": True})
    tree["added_tokens"].sort(key=lambda entry: entry["id"])
    return True


def recorded_tokens(tree: Tree) -> tuple[int, tuple[int, ...]] | None:
    """The start token and the end tokens that `record_tokens` wrote."""
    special = (tree["post_processor"] or {}).get("special_tokens", {})
    if not isinstance(special, dict) or special.keys() != {"bos", "eos"}:
        return None
    return special["bos"]["ids"][0], tuple(special["eos"]["ids"])


def record_tokens(tree: Tree, bos: tuple[int, str], eos: Sequence[tuple[int, str]]) -> None:
    """Write the start token and the end tokens, which a tokenizer.json has no place for, into its template of a text.

    Args:
        bos: the id and the text of the start token.
        eos: those of each end token.
    """

    def entry(role: str, tokens: Sequence[tuple[int, str]]) -> Tree:
        return {"id": role, "ids": [token for token, _ in tokens], "tokens": [name for _, name in tokens]}

    start = {"SpecialToken": {"id": "bos", "type_id": 0}}
    single, second = [start, {"Sequence": {"id": "A", "type_id": 0}}], [start, {"Sequence": {"id": "B", "type_id": 0}}]
    special = {"bos": entry("bos", [bos]), "eos": entry("eos", eos)}
    template = {"type": "TemplateProcessing", "single": single, "pair": single + second, "special_tokens": special}
    tree["post_processor"] = template


def is_control(tree: Tree, content: str) -> bool:
    """Whether a token is no part of ordinary text: it is an added token, or looks like a control token."""
    if len(content) == 1 or BYTE_TOKEN.fullmatch(content):
        return False
    return CONTROL_TOKEN.fullmatch(content) is not None or any(
        entry["content"] == content for entry in tree["added_tokens"]
    )


def byte_tokens(tree: Tree) -> dict[int, int]:
    """The byte of each token that the decoder joins, as bytes, with their neighbors; empty without byte fallback."""
    if not any(decoder["type"] == "ByteFallback" for decoder in _steps(tree["decoder"], "decoders")):
        return {}
    vocab = tree["model"]["vocab"]
    pairs = vocab.items() if isinstance(vocab, dict) else ((piece, number) for number, (piece, _) in enumerate(vocab))
    return {number: int(piece[3:5], 16) for piece, number in pairs if BYTE_TOKEN.fullmatch(piece)}


def text_encoder(tree: Tree, special: Collection[str]) -> RawTokenizer | None:
    """A tokenizer with the same ids that never encodes text as one of these special tokens.

    In it they have names that no text contains. The library itself passes over special tokens only where it looks for added
    tokens, but not in the model's vocabulary.

    Returns:
        None if the model cannot reach the special tokens anyway.
    """
    model = tree["model"]
    hidden = {name for name in special if len(name) > 1 and not BYTE_TOKEN.fullmatch(name)} & set(model_pieces(tree))
    if not hidden:
        return None
    merges: list[list[str]] = model.get("merges") or []
    prefix = model.get("continuing_subword_prefix") or ""

    def reaches(left: str, right: str) -> bool:
        return not hidden.isdisjoint((left, right, left + right.removeprefix(prefix)))

    if model["type"] == "BPE" and not model.get("ignore_merges") and not any(reaches(*merge) for merge in merges):
        return None
    unreadable = secrets.token_hex(16)
    names = {name: f"{unreadable}{number}" for number, name in enumerate(sorted(hidden))}
    model = dict(model)
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(piece, piece): number for piece, number in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    if "merges" in model:
        model["merges"] = [merge for merge in merges if not reaches(*merge)]
    if model.get("unk_token") is not None:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    added = [{**entry, "content": names.get(entry["content"], entry["content"])} for entry in tree["added_tokens"]]
    return build_raw({**tree, "model": model, "added_tokens": added, "post_processor": None, "decoder": None})


def lossless_forms(tree: Tree) -> tuple[UnicodeForm, ...] | None:
    """The Unicode normal forms in which a tokenizer represents every text exactly; None if it may not.

    It knows byte-level BPE, as of GPT-2, and byte-fallback BPE, as of Llama 2.
    """
    model = tree["model"]
    if model["type"] != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return None
    if any(not entry["special"] and (entry["lstrip"] or entry["rstrip"]) for entry in tree["added_tokens"]):
        return None
    before = _steps(tree["normalizer"], "normalizers")
    splits = _steps(tree["pre_tokenizer"], "pretokenizers")
    after = _steps(tree["decoder"], "decoders")
    if [step["type"] for step in after] == ["ByteLevel"]:
        known_splits = all(
            step["type"] in ("ByteLevel", "Digits") or (step["type"] == "Split" and step["behavior"] != "Removed")
            for step in splits
        )
        byte_level = [step for step in splits if step["type"] == "ByteLevel"]
        forms = tuple(step["type"] for step in before)
        complete = all(character in model["vocab"] for character in pre_tokenizers.ByteLevel.alphabet())
        exact = known_splits and len(byte_level) == 1 and not byte_level[0]["add_prefix_space"]
        return forms if complete and exact and set(forms) <= set(get_args(UnicodeForm)) else None
    if model.get("byte_fallback") and not model.get("ignore_merges") and not splits:
        spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
        back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
        bytes_and_text = [{"type": "ByteFallback"}, {"type": "Fuse"}]
        llama = [{"type": "Prepend", "prepend": SPACE}, spaces], [back, *bytes_and_text, {**_STRIP, "start": 1}]
        gemma = [spaces], [back, *bytes_and_text]
        complete = all(f"<0x{byte:02X}>" in model["vocab"] for byte in range(256)) and SPACE in model["vocab"]
        return () if complete and (before, after) in (llama, gemma) else None
    return None


_STRIP = {"type": "Strip", "content": " ", "stop": 0}


def _steps(component: Tree | None, key: str) -> list[Tree]:
    """The steps of a normalizer, pre-tokenizer or decoder that may be a sequence of others."""
    if component is None:
        return []
    if component["type"] != "Sequence":
        return [component]
    return [step for part in component[key] for step in _steps(part, key)]
