"""Numbers, times and lists as text."""

import pytest

from moelm.formats import byte_size, clock, count_noun, join_names, quantity


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (850, "850"), (999.6, "1.0K"), (4_940_000, "4.9M"), (99_960_000, "100M"), (181e6, "181M"), (2e15, "2000T")],
)
def test_quantity(number: float, text: str) -> None:
    assert quantity(number) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(999, "999 B"), (1000, "1 kB"), (999_700, "1 MB"), (36_512_345, "36.5 MB"), (2.1e9, "2.1 GB"), (3e12, "3 TB")],
)
def test_byte_size(number: float, text: str) -> None:
    assert byte_size(number) == text


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (123, "2:03"), (3723, "1:02:03")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_join_names() -> None:
    assert [join_names(names) for names in (["a"], ["a", "b"], ["a", "b", "c"])] == ["a", "a and b", "a, b and c"]


def test_count_noun() -> None:
    assert [count_noun(number, "seed") for number in (0, 1, 1200)] == ["0 seeds", "1 seed", "1,200 seeds"]
