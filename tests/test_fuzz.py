"""Mutated inputs: every one is refused with one sentence, or read as what it says. All mutations are seeded."""

import copy
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from moelm.config import check_config, describe_ineffective, dump_config, flatten, load_config
from moelm.errors import MoelmError
from tests.conftest import tiny_config

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
    b"#", b'"', b"'", b"{", b"[", b":", b"*", b"&", b"\\", b",", b"-", b"9" * 30,
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
    """Flip a bit, cut off, remove, repeat or insert bytes somewhere."""
    at = rng.randrange(len(content) + 1)
    end = min(len(content), at + rng.randrange(1, 20))
    match rng.randrange(6):
        case 0:
            return content[:at]
        case 1:
            return content[:at] + content[end:]
        case 2:
            return content[:end] + content[at:]
        case 3 if at < len(content):
            return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
        case _:
            return content[:at] + rng.choice(NASTY_BYTES) + content[at:]


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


@pytest.fixture
def read_config(tmp_path: Path) -> Callable[..., None]:
    """A function that loads a config, and loads what it is written as."""
    path, again = tmp_path / "config.yaml", tmp_path / "again.yaml"

    def read(content: bytes, overrides: Sequence[str] = ()) -> None:
        path.write_bytes(content)
        config = load_config(path, overrides)
        again.write_text(dump_config(config), encoding="utf-8")
        reloaded = load_config(again)
        assert reloaded == config
        assert describe_ineffective(reloaded) == describe_ineffective(config)

    return read


def write_yaml(tree: Any) -> bytes:
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).encode("utf-8")


def test_configs(read_config: Callable[..., None]) -> None:
    required = [tiny_config(kind=kind) for kind in ("moe", "dense")]
    complete = [yaml.safe_load(dump_config(check_config(tree, "tiny"))) for tree in required]
    accepted, refused = count_accepted(mutated_files([*required, *complete], 1200, write_yaml), read_config)
    assert accepted > 50
    assert refused > 500


def test_overrides(read_config: Callable[..., None]) -> None:
    tree = tiny_config()
    keys = [*flatten(check_config(tree, "tiny")), "model.ffn", "data", "data.sources", "wandb.project", "", "model..x"]
    rng = random.Random(0)
    texts = [*map(str, NASTY_VALUES), "4", "64", "1e-3", "true"]
    inputs = [[f"{rng.choice(keys)}={rng.choice(texts)}" for _ in range(rng.choice((1, 1, 2)))] for _ in range(800)]
    content = write_yaml(tree)
    accepted, refused = count_accepted(inputs, lambda overrides: read_config(content, overrides))
    assert accepted > 50
    assert refused > 200
