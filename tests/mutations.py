"""Seeded mutations of inputs, and the check that each result is accepted or refused with one sentence."""

import copy
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pytest

from moelm.errors import MoelmError

# fmt: off
NASTY_VALUES = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, 0.0, -0.0, 0.5, 1e-320, 1e308, float("nan"), float("inf"),
    "", " ", "null", "no", "007", "1e5", "1:30", "2024-01-01", "a #b", "[x]", "{", "*", "&a", "!x", "%", "@", "`", "~",
    "é😀", "a\nb", "a\tb", "\x1b[31m", "../..", "a" * 5000,
    [], {}, [[]], [None], {"": None}, {"kind": None}, {"kind": []}, {1: 2},
)
"""Values that are wrong in most places, and surprising in the others."""

NASTY_BYTES = (
    b"\x00", b"\xff", b"\xef\xbb\xbf", b"\r", b"\n", b"\t", b"\x1b", b"\xed\xa0\x80",
    b"#", b'"', b"'", b"{", b"}", b"[", b"]", b":", b"*", b"&", b"\\", b",", b"-", b"9" * 30, b"NaN", b"\\ud800", b"null",
)
# fmt: on


def mutate_tree(rng: random.Random, tree: Any) -> None:
    """Replace, remove, copy or rename one item anywhere in nested dicts and lists, in place."""
    places: list[tuple[Any, Any]] = []
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        items = list(node.items()) if isinstance(node, dict) else list(enumerate(node))
        places += [(node, key) for key, _ in items]
        waiting += [value for _, value in items if isinstance(value, dict | list)]
    if not places:
        return
    node, key = rng.choice(places)
    match rng.randrange(6):
        case 0:
            del node[key]
        case 1:
            other, other_key = rng.choice(places)
            node[key] = copy.deepcopy(other[other_key])
        case 2 if isinstance(node, dict):
            node[rng.choice([f"{key}s", str(key)[:-1], str(key).upper(), "kind"])] = node.pop(key)
        case 3 if isinstance(node, list):
            node.insert(key, copy.deepcopy(rng.choice([node[key], *NASTY_VALUES])))
        case 4 if isinstance(node[key], int):
            node[key] *= rng.choice((-1, 2, 10, 10**6))
        case _:
            node[key] = copy.deepcopy(rng.choice(NASTY_VALUES))


def mutate_bytes(rng: random.Random, content: bytes) -> bytes:
    """Insert, remove, flip, cut off or copy bytes, at one place or several."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at, source = rng.randrange(len(changed) + 1), rng.randrange(len(changed) + 1)
        match rng.randrange(5):
            case 0:
                changed[at:at] = rng.choice(NASTY_BYTES)
            case 1:
                del changed[at : at + rng.choice((1, 1, 3, 50))]
            case 2 if at < len(changed):
                changed[at] ^= 1 << rng.randrange(8)
            case 3:
                del changed[at:]
            case _:
                changed[at:at] = changed[source : source + rng.choice((1, 5, 40))]
    return bytes(changed)


def mutated_files(valid: Sequence[Any], count: int, write: Callable[[Any], bytes]) -> Iterator[bytes]:
    """Files made from valid trees: two thirds with changed values, the others with changed bytes.

    Args:
        write: a tree as a file.
    """
    for number in range(count):
        rng = random.Random(number)
        tree = copy.deepcopy(rng.choice(valid))
        if number % 3:
            for _ in range(rng.choice((1, 1, 1, 2, 3))):
                mutate_tree(rng, tree)
            yield write(tree)
        else:
            yield mutate_bytes(rng, write(tree))


def count_accepted(inputs: Iterable[Any], read: Callable[[Any], object]) -> tuple[int, int]:
    """Read every input; returns how many were accepted and refused. Any error but a sentence fails the test."""
    accepted = refused = 0
    for number, content in enumerate(inputs):
        try:
            read(content)
            accepted += 1
        except MoelmError as error:
            sentence = str(error)
            refused += 1
            if "\n" in sentence:
                pytest.fail(f"input {number}, {content!r}: several lines: {sentence}")
        except Exception as error:
            pytest.fail(f"input {number}, {content!r}: {type(error).__name__}: {error}")
    return accepted, refused
