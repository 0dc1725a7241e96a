"""The builtin corpus: which documents it contains, and the correctness of its generated answers."""

import csv
import io
import json
import platform
import re
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from importlib import metadata
from itertools import islice, pairwise
from math import gcd
from pathlib import Path

import pytest

from moelm.data.corpus import builtin
from moelm.data.corpus.builtin import MIN_CHARS, builtin_documents, builtin_fingerprint
from moelm.data.corpus.synthetic import SYNTHETIC_DOMAINS, synthetic_documents
from moelm.data.document import Document

REAL_DOMAINS = ("stdlib-code", "stdlib-docs", "package-code", "package-docs", "headers")


def head(count: int) -> list[Document]:
    return list(islice(builtin_documents(), count))


@pytest.fixture(scope="module")
def beginning() -> list[Document]:
    return head(160)


def no_distributions(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> metadata.Distribution:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    monkeypatch.setattr(metadata, "version", missing)


def test_fingerprint_is_stable_and_quick() -> None:
    first = builtin_fingerprint()
    start = time.perf_counter()
    assert builtin_fingerprint() == first
    assert time.perf_counter() - start < 0.2


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        (builtin, "CORPUS_VERSION", -1),
        (builtin, "GENERATOR_VERSION", -1),
        (platform, "python_version", lambda: "4.0.0"),
        (metadata, "version", lambda name: "0.0.0" if name == "numpy" else "1"),
    ],
)
def test_fingerprint_depends_on_versions_and_packages(
    monkeypatch: pytest.MonkeyPatch, owner: object, name: str, value: object
) -> None:
    if name == "version":
        monkeypatch.setattr(metadata, "version", lambda name: "1")
    before = builtin_fingerprint()
    monkeypatch.setattr(owner, name, value)
    assert builtin_fingerprint() != before


def test_the_first_documents_are_deterministic_and_of_all_domains(beginning: list[Document]) -> None:
    assert head(160) == beginning
    assert {document.domain for document in beginning} == {*REAL_DOMAINS, *SYNTHETIC_DOMAINS}


def test_order_does_not_depend_on_the_order_of_directories(
    monkeypatch: pytest.MonkeyPatch, beginning: list[Document]
) -> None:
    walk = Path.rglob

    def backwards(self: Path, pattern: str) -> Iterator[Path]:
        return iter(sorted(walk(self, pattern), reverse=True))

    monkeypatch.setattr(Path, "rglob", backwards)
    assert head(60) == beginning[:60]


def test_short_and_repeated_documents_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["x" * (MIN_CHARS - 1), "y" * MIN_CHARS, "y" * MIN_CHARS, "z" * MIN_CHARS]
    monkeypatch.setattr(builtin, "_topics", lambda: (Document(text, "mine", text) for text in texts))
    monkeypatch.setattr(builtin, "SYNTHETIC_BYTES", 0)
    for name in ("_stdlib_modules", "_package_modules", "_package_texts", "_headers"):
        monkeypatch.setattr(builtin, name, lambda: iter(()))
    assert [document.text for document in builtin_documents()] == [texts[1], texts[3]]


def test_no_tests_installers_or_copies_are_read() -> None:
    banned = {
        "test",
        "tests",
        "testing",
        "idle_test",
        "pip",
        "setuptools",
        "ensurepip",
        "_vendor",
        "site-packages",
    }
    names = [file.name for file in builtin._files_below(Path(sysconfig.get_path("stdlib")), ".py", "stdlib")]
    for package in builtin._PACKAGES:
        files = builtin._package_files(package.distribution, package.modules, (".py",))
        names += [file.name for file in files]
    assert len(names) > 1000
    assert [name for name in names if banned & set(Path(name).parts)] == []


def test_one_missing_distribution_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    find = metadata.distribution

    def without_rich(name: str) -> metadata.Distribution:
        if name == "rich":
            raise metadata.PackageNotFoundError(name)
        return find(name)

    monkeypatch.setattr(builtin, "_PACKAGES", tuple(p for p in builtin._PACKAGES if p.distribution in ("rich", "click")))
    assert {d.origin.split("/")[0] for d in builtin._package_modules()} == {"click", "rich"}
    monkeypatch.setattr(metadata, "distribution", without_rich)
    assert {d.origin.split("/")[0] for d in builtin._package_modules()} == {"click"}


def test_the_standard_library_alone_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    no_distributions(monkeypatch)
    domains = {document.domain for document in head(200)}
    assert {"stdlib-code", "stdlib-docs", *SYNTHETIC_DOMAINS} <= domains
    assert not any(domain.startswith("package") for domain in domains)


def test_the_generator_alone_is_enough(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    no_distributions(monkeypatch)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "nothing"))
    monkeypatch.setattr(builtin, "SYNTHETIC_BYTES", 50_000)
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert {document.domain for document in builtin_documents()} == set(SYNTHETIC_DOMAINS)


def test_unreadable_files_and_tables_are_left_out(tmp_path: Path) -> None:
    cases = {"latin.py": b"name = '\xe9'\n", "table.py": b"0x1f, 0x2e, " * 99, "long.py": b"pass\n" * 99_999}
    for name, data in {**cases, "windows.py": b"one = two\r\n"}.items():
        (tmp_path / name).write_bytes(data)
    assert [builtin._read_text_file(tmp_path / name) for name in [*cases, "absent.py"]] == [None] * 4
    assert builtin._read_text_file(tmp_path / "windows.py") == "one = two\n"


@pytest.mark.parametrize(("body", "domain"), [("value = other_value\n" * 60, "x-code"), ("", "x-docs")])
def test_a_module_is_code_or_its_docstrings_never_both(tmp_path: Path, body: str, domain: str) -> None:
    source = '"""About it."""\nclass A:\n    """What A is."""\n    def b(self):\n        """What b does."""\n' + body
    (tmp_path / "m.py").write_text(source)
    (document,) = builtin._module_document(builtin._File(tmp_path / "m.py", "m.py"), "x")
    docs = "About it.\n\n\nA\n\nWhat A is.\n\n\nA.b\n\nWhat b does.\n"
    assert (document.domain, document.text) == (domain, source if body else docs)


@pytest.mark.parametrize("domain", SYNTHETIC_DOMAINS)
def test_synthetic_size_determinism_and_variety(domain: str) -> None:
    documents = list(synthetic_documents(domain, 300_000))
    sizes = [len(document.text.encode()) for document in documents]
    assert 300_000 <= sum(sizes) < 300_000 + max(sizes)
    assert all(100 < size < 6_000 for size in sizes)
    assert len({document.text for document in documents}) == len(documents)
    assert list(synthetic_documents(domain, 10_000)) == documents[: len(list(synthetic_documents(domain, 10_000)))]
    assert next(synthetic_documents(domain, 1, seed=1)).text != documents[0].text


def value(expression: str) -> Fraction | None:
    """The exact value of plain arithmetic, or None for other text."""
    text = expression.strip()
    if not re.fullmatch(r"[-+*/(). \d]+", text) or not re.search(r"\d", text):
        return None
    return eval(re.sub(r"\d+(\.\d+)?", r"Fraction('\g<0>')", text), {"Fraction": Fraction})  # type: ignore[no-any-return]


LABEL = re.compile(r"(\d+\.|Problem \d+:|Q\d+\)|Exercise \d+\.) ")


def worksheet_blocks() -> Iterator[tuple[str, list[str], str]]:
    for document in synthetic_documents("synthetic-arithmetic", 250_000):
        for block in document.text.strip().split("\n\n")[1:]:
            question, *steps, answer = block.split("\n")
            steps = [step.strip().removeprefix("- ") for step in steps]
            yield LABEL.sub("", question, count=1), steps, answer.removeprefix("Answer: ")


def test_every_step_of_the_arithmetic_is_true() -> None:
    checked = 0
    for _, steps, _ in worksheet_blocks():
        for step in steps:
            for equation in re.split(r"[:,]", step):
                values = [value(side) for side in equation.split("=")]
                for left, right in pairwise(values):
                    if left is not None and right is not None:
                        assert left == right, step
                        checked += 1
    assert checked > 5_000


def euclid(a: str, b: str) -> str:
    return str(gcd(int(a), int(b)))


def solve(a: str, b: str, c: str) -> str:
    return str(Fraction(int(c) - int(b), int(a)))


def next_term(terms: str) -> str:
    numbers = [int(term) for term in terms.split(", ")]
    return str(2 * numbers[-1] - numbers[-2])


def shop(question: str) -> str:
    n, price, paid = sorted(map(int, re.findall(r"\d+", question)))
    return str(paid - n * price)


ORACLES: dict[str, Callable[..., str]] = {
    r"What is ([-+*/ \d]+)\?": lambda expression: str(value(expression)),
    r"Compute (.+)\.$": lambda expression: str(value(expression)),
    r"Divide (\d+) by (\d+)": lambda a, b: f"{int(a) // int(b)} remainder {int(a) % int(b)}",
    r"Solve (\d+)x \+ (\d+) = (-?\d+)": solve,
    r"What is (\d+)% of (\d+)": lambda p, base: str(Fraction(int(p) * int(base), 100)),
    r"common divisor of (\d+) and (\d+)": euclid,
    r"Write (\d+) in binary": lambda n: format(int(n), "b"),
    r"Continue: (.+), \.\.\.": next_term,
    r"(.*coin.*)": shop,
}


def test_the_answers_of_the_arithmetic_are_right() -> None:
    covered = set()
    for question, _, answer in worksheet_blocks():
        pattern, found = next((p, m) for p in ORACLES if (m := re.search(p, question)))
        covered.add(pattern)
        assert answer == ORACLES[pattern](*found.groups()), question
    assert covered == set(ORACLES)


def result(question: str, steps: list[str]) -> str:
    """The answer that the steps alone give, by the method of the question."""
    if re.fullmatch(r"What is \d+ \+ \d+\?", question):
        digits = [step.split("write ")[1][0] for step in steps]
        return (steps[-1].partition("carry ")[2] + "".join(reversed(digits))).lstrip("0")
    if "binary" in question:
        return "".join(step[-1] for step in reversed(steps[:-1]))
    if "divisor" in question:
        return steps[-1].split("* ")[1].split(" ")[0]
    if match := re.fullmatch(r"Divide \d+ by (\d+)\.", question):
        return re.sub(rf"Check: (\d+) \* {match[1]} \+ (\d+) = .*", r"\1 remainder \2", steps[-1])
    return steps[-1].split("= ")[-1].removesuffix("/1")


def test_the_steps_of_the_arithmetic_give_the_answer() -> None:
    for question, steps, answer in worksheet_blocks():
        assert result(question, steps) == answer, (question, steps)


def test_the_answers_about_stories_are_right() -> None:
    checked = 0
    for document in synthetic_documents("synthetic-stories", 300_000):
        story, _, questions = document.text.rstrip("\n").rpartition("\n\n")
        holder = {}
        events = r"(\w+) (?:found|picked up|discovered) a (\w+ \w+) |the (\w+ \w+) to (\w+)\."
        for finder, found, given, receiver in re.findall(events, story):
            holder[found or given] = finder or receiver
        for item, name in re.findall(r"Who has the (\w+ \w+) at the end\? (\w+)\.", questions):
            assert holder[item] == name, document.text
            checked += 1
        for name, items in re.findall(r"What does (\w+) hold at the end\? (.+)\.", questions):
            held = {item for item, owner in holder.items() if owner == name}
            assert set(re.findall(r"[Tt]he (\w+ \w+)", items)) == held, document.text
    assert checked > 100


def tables() -> Iterator[tuple[list[dict[str, str]], list[str]]]:
    """Rows and questions of the documents in JSON and CSV, with all cells as text."""
    for document in synthetic_documents("synthetic-data", 250_000):
        table, questions = document.text.split("\n\n", 1)[1].split("\n\nQuestions\n\n")
        if table.startswith('{\n  "'):
            (rows,) = json.loads(table).values()
        elif re.match(r"\w+(,\w+)+\n", table):
            rows = list(csv.DictReader(io.StringIO(table)))
        else:
            continue
        yield [{key: str(cell) for key, cell in row.items()} for row in rows], questions.strip().split("\n")


Oracles = dict[str, Callable[..., str]]


def record_oracles(rows: list[dict[str, str]]) -> Oracles:
    key, _, number = list(rows[0])[:3]
    top = max(rows, key=lambda row: int(row[number]))

    def total(column: str, by: str = key, group: str | None = None) -> str:
        return str(sum(int(row[column]) for row in rows if group in (None, row[by])))

    return {
        r"How many rows have (\w+) (\w+)": lambda c, v: str(sum(row[c] == v for row in rows)),
        r"How many rows have (\w+) above (\d+)": lambda c, v: str(sum(int(row[c]) > int(v) for row in rows)),
        r"What is the total (\w+)": total,
        r"What is the total (\w+) where (\w+) is (\w+)": total,
        r"What is the largest (\w+)": lambda c: top[c],
        r"Which (\w+) has the largest \w+": lambda c: top[c],
        r"What is the (\w+) of (.+)": lambda c, v: next(row[c] for row in rows if row[key] == v),
        r"Which (\w+) values occur": lambda c: ", ".join(sorted({row[c] for row in rows})),
    }


def test_the_answers_about_records_are_right() -> None:
    covered = set()
    for rows, questions in tables():
        oracles = record_oracles(rows)
        for line in questions:
            question, answer = line.split("? ")
            ((pattern, found),) = [(p, m) for p in oracles if (m := re.fullmatch(p, question))]
            covered.add(pattern)
            assert answer == oracles[pattern](*found.groups()), line
    assert len(covered) == 8
