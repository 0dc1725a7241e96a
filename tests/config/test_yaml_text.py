"""Which value each YAML scalar has, which documents are refused, and that what is written is read as the same value."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moelm.config.yaml_text import InvalidYaml, dump_yaml, has_comment, parse_yaml

VALUES = {
    "3": 3,
    "-16_000": -16000,
    "0x10": 16,
    "010": "010",
    "1:30": "1:30",
    "0o17": "0o17",
    "1e5": 1e5,
    "3e-4": 3e-4,
    ".5": 0.5,
    "5.": 5.0,
    "1_0.5": 10.5,
    ".inf": math.inf,
    "1e400": math.inf,
    "e5": "e5",
    "true": True,
    "FALSE": False,
    "yes": "yes",
    "no": "no",
    "on": "on",
    "null": None,
    "~": None,
    "": None,
    "2024-01-01": "2024-01-01",
    "=": "=",
    "'3'": "3",
    "!!str 3": "3",
    "[a, 'b #c']": ["a", "b #c"],
    "{a: &x 1, b: *x}": {"a": 1, "b": 1},
    "{<<: {a: 1}, b: 2}": {"a": 1, "b": 2},
}

BOMB = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}' if i else 'x'] * 9)}]" for i in range(9))


@pytest.mark.parametrize("text", VALUES)
def test_scalars(text: str) -> None:
    value = parse_yaml(text)
    assert value == VALUES[text]
    assert type(value) is type(VALUES[text])


@pytest.mark.parametrize(
    ("text", "problem", "where"),
    [
        ("a: 1\nb: {c: 1, c: 2}", "the key c appears twice", " at line 2"),
        ("1: a", "the key 1 is not text", " at line 1"),
        ("? [a, b]\n: c", "the key with several values is not text", " at line 1"),
        ("a: !!set {b}", "the tag !!set is unknown", " at line 1"),
        ("!!python/object/apply:os.getcwd []", "the tag !!python/object/apply:os.getcwd is unknown", " at line 1"),
        ("!!int abc", "the tag !!int is unknown", " at line 1"),
        ("!!float '1'", "the tag !!float is unknown", " at line 1"),
        ("a: b\0", "the character '\\x00' is not allowed", ""),
        ("a:\n\tb: 1", "found character '\\t'", " at line 2"),
        ("*x", "found undefined alias", " at line 1"),
        ("a: 1\n--- \nb: 2", "but found another document", " at line 2"),
        ("a: " + "1" * 5000, "too many digits", ""),
        ("[" * 60 + "]" * 60, "nested more than 50 levels", " at line 1"),
        ("[" * 1000, "nested too deeply", ""),
        ("&x [*x]", "nested more than 50 levels", " at line 1"),
        (
            "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}' if i else 'x'] * 9)}]" for i in range(9)),
            "more than 100,000",
            "",
        ),
    ],
)
def test_what_a_config_cannot_hold_is_refused(text: str, problem: str, where: str) -> None:
    with pytest.raises(InvalidYaml) as caught:
        parse_yaml(text)
    assert problem in str(caught.value)
    assert where in caught.value.where
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "commented"),
    [("a #b", True), ("#b", True), ("[a] # b", True), ("'a #b'", False), ("a#b", False), ("{a: [1, 'x'], b: *y}", False)],
)
def test_comments_are_found(text: str, commented: bool) -> None:
    assert has_comment(text) == commented


PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()


@settings(max_examples=200, deadline=None)
@given(st.recursive(PLAIN, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8))
def test_a_value_is_written_as_it_is_read(value: Any) -> None:
    assert parse_yaml(dump_yaml(value)) == value
    assert parse_yaml(dump_yaml(value, in_one_line=True)) == value


@pytest.mark.parametrize("text", ["1e5", "no", "007", "1:30", "2024-01-01", "", "null", "a #b", "é😀", "\udce9", "a\nb"])
def test_text_stays_text(text: str) -> None:
    assert parse_yaml(dump_yaml({"key": text})) == {"key": text}
    assert parse_yaml(dump_yaml(text, in_one_line=True)) == text
