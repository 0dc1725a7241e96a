"""Start and end tokens: their usual names, and what settings and the files beside a tokenizer.json say about them."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moelm.console import warn
from moelm.errors import MoelmError

BOS, EOS, UNKNOWN = "<|bos|>", "<|eos|>", "<|unknown|>"
BOS_NAMES = (BOS, "<s>", "<|begin_of_text|>", "<|startoftext|>", "<bos>", "<｜begin▁of▁sentence｜>", "<|endoftext|>")
EOS_NAMES = (EOS, "</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>", "<｜end▁of▁sentence｜>")

USER = "data.tokenizer"
"""Origin of tokens that the user sets."""
CONFIG_FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
"""Files of the Hugging Face format that say which tokens start and end texts; the first has precedence."""

Reference = int | str
"""A token, by its id or its text."""


class Declaration(NamedTuple):
    """The start token and the end tokens according to one origin."""

    origin: str
    bos: Reference | None
    eos: tuple[Reference, ...]


class ResolvedTokens(NamedTuple):
    """Ids of the start token and of the end tokens, as far as an origin names them."""

    bos: int | None
    eos: tuple[int, ...]


def declared_by_user(bos: Reference | None, eos: Reference | Sequence[Reference] | None) -> Declaration:
    """The start and end tokens of `data.tokenizer`."""
    return Declaration(USER, bos, _as_tuple(eos))


def declared_by_files(folder: Path) -> list[Declaration]:
    """What the files of a folder say, in order of precedence.

    Raises:
        MoelmError: a file that is not JSON, or a token that is neither an id nor a text.
    """
    declarations = []
    for name in CONFIG_FILES:
        content = read_json_object(folder / name) if (folder / name).is_file() else {}
        tokens: dict[str, tuple[Reference, ...]] = {}
        for role in ("bos", "eos"):
            key, kind = (f"{role}_token_id", int) if name in CONFIG_FILES[:2] else (f"{role}_token", str)
            tokens[role] = _references(content.get(key), kind, f"{folder / name}: {key}")
        if any(tokens.values()):
            declarations.append(Declaration(str(folder / name), next(iter(tokens["bos"]), None), tokens["eos"]))
    return declarations


def tokens_added_by_files(folder: Path) -> dict[str, int]:
    """Ids of the tokens that tokenizer_config.json adds to the tokenizer, by their text."""
    path = folder / "tokenizer_config.json"
    entries = read_json_object(path).get("added_tokens_decoder") if path.is_file() else None
    added: dict[str, int] = {}
    for key, entry in entries.items() if isinstance(entries, dict) else ():
        content = entry.get("content") if isinstance(entry, dict) else None
        if not key.isdecimal() or not isinstance(content, str) or not content:
            raise MoelmError(f"{path}: added_tokens_decoder has {key!r}: {entry!r}; an id and a token are expected.")
        added[content] = int(key)
    return added


def read_json_object(path: Path) -> dict[str, Any]:
    """The content of a JSON file that holds an object.

    Raises:
        MoelmError: it cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        raise MoelmError(f"{path} cannot be read as JSON.") from None
    if not isinstance(content, dict):
        raise MoelmError(f"{path} is not a JSON object.")
    return content


def resolve(declarations: Sequence[Declaration], find: Callable[[Reference], int | None]) -> ResolvedTokens:
    """The ids of declared tokens.

    The user's tokens win. Otherwise the start token is the first one that is declared, and the end tokens are all of them.
    Contradictions are reported as warnings.

    Args:
        find: the id of a token; None if the tokenizer does not have it.

    Raises:
        MoelmError: the tokenizer does not have a token that the user names.
    """
    bos: dict[str, tuple[int, ...]] = {}
    eos: dict[str, tuple[int, ...]] = {}
    for origin, bos_reference, eos_references in declarations:
        if bos_reference is not None:
            bos[origin] = _found(origin, "bos", (bos_reference,), find)
        eos[origin] = _found(origin, "eos", eos_references, find)
    _warn_of_contradictions(bos, "start")
    _warn_of_contradictions(eos, "end")
    all_eos = [eos[USER]] if eos.get(USER) else list(eos.values())
    first_bos = next((ids[0] for ids in bos.values() if ids), None)
    return ResolvedTokens(first_bos, tuple(dict.fromkeys(token for ids in all_eos for token in ids)))


def _found(
    origin: str, role: str, references: tuple[Reference, ...], find: Callable[[Reference], int | None]
) -> tuple[int, ...]:
    """The ids of tokens; those that the tokenizer does not have are left out with a warning, or refused if the user's."""
    ids = []
    for reference in references:
        token = find(reference)
        if token is not None:
            ids.append(token)
        elif origin == USER:
            raise MoelmError(f"{USER}.{role} is {reference!r}, which is not a token of the tokenizer.")
        else:
            warn(f"{origin} has {reference!r} as {role} token, which is not a token of the tokenizer; it is ignored.")
    return tuple(ids)


def _warn_of_contradictions(found: dict[str, tuple[int, ...]], what: str) -> None:
    declared = {origin: ids for origin, ids in found.items() if ids}
    if not declared:
        return
    used, *others = declared
    for other in others:
        if not set(declared[other]) & set(declared[used]):
            ids, other_ids = (", ".join(map(str, declared[origin])) for origin in (used, other))
            also = "" if what == "start" or used == USER else ", and generation stops at both"
            warn(f"The {what} token is {ids} in {used}, but {other_ids} in {other}; {ids} is used{also}.")


def _references(value: object, kind: type[Reference], where: str) -> tuple[Reference, ...]:
    """The tokens of a setting: an id or a text, a mapping with the text, null, or a list of these."""
    references: list[Reference] = []
    for item in _as_tuple(value):
        token = item.get("content") if isinstance(item, dict) else item
        if type(token) is not kind:
            what = "an id or a list of ids" if kind is int else "the text of a token"
            raise MoelmError(f"{where} is {value!r}; {what} is expected.")
        references.append(token)
    return tuple(references)


def _as_tuple(value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (value,)
