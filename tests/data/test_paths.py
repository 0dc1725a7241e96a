"""Files that a path names: patterns, literal brackets, links, and what is not a file."""

import os
from pathlib import Path

import pytest

from moelm.data.paths import MissingSource, matching_files
from moelm.errors import MoelmError

TREE = ["t1.txt", "t2.txt", "my texts [2024]/a b.txt", "my texts [2024]/sub/c.txt", "x/y/[z]/d.txt", "x/.hidden.txt"]


@pytest.fixture(autouse=True)
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in TREE:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(name)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("t1.txt", TREE[:1]),
        ("t[12].txt", TREE[:2]),
        ("my texts [2024]/*.txt", TREE[2:3]),
        ("my texts [2024]/**/*.txt", TREE[2:4]),
        ("**/[z]/*.txt", TREE[4:5]),
        ("**/*.txt", sorted(TREE[:5])),
        ("x/**", TREE[4:5]),
        ("x/.h*", TREE[5:]),
    ],
)
def test_patterns_and_literal_names(pattern: str, expected: list[str]) -> None:
    assert list(map(str, matching_files(pattern))) == expected
    assert [str(path) for path in matching_files(f"{Path.cwd()}/{pattern}")] == [f"{Path.cwd()}/{p}" for p in expected]


def test_links_are_followed_and_each_file_is_listed_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    (other / "o.txt").write_text("o")
    os.symlink("..", "x/loop")
    os.symlink("../t1.txt", "x/t1.txt")
    os.symlink(other, "elsewhere")
    assert list(map(str, matching_files("**/*.txt"))) == sorted([*TREE[:5], "elsewhere/o.txt"])


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("nothing.txt", "nothing.txt does not exist."),
        ("n*.txt", "n*.txt matches no file."),
        ("a[b].txt", "matches no file; [...] in a pattern stands for one of these characters"),
        ("?", "matches only directories"),
        ("x", "x is a directory"),
        ("broken", "broken is a link to a file that does not exist"),
        ("p*pe", "pipe is not a regular file"),
        ("/dev/null", "/dev/null is not a regular file"),
    ],
)
def test_what_is_not_a_file_is_named(pattern: str, message: str) -> None:
    os.mkfifo("pipe")
    os.symlink("gone", "broken")
    with pytest.raises(MoelmError) as caught:
        matching_files(pattern)
    assert message in str(caught.value)
    assert isinstance(caught.value, MissingSource) == (pattern not in ("x", "p*pe", "/dev/null"))
