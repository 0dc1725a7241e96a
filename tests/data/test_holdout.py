"""The whole builtin corpus: the sizes of its domains; and its validation documents: their number, lengths, domains, and no
near duplicates of other text."""

import random
from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pytest

from moelm.data.corpus.builtin import builtin_documents
from moelm.data.corpus.holdout import MAX_SHARED, excerpt, hold_out, near_duplicates
from moelm.data.corpus.synthetic import SYNTHETIC_DOMAINS
from moelm.data.document import Document
from moelm.data.effective_documents import effective_documents

FRACTION = 0.01


@pytest.fixture(scope="module")
def corpus() -> list[Document]:
    return list(builtin_documents())


@pytest.fixture(scope="module")
def split(corpus: list[Document]) -> list[Document]:
    return list(hold_out(corpus, FRACTION, 0, generated="synthetic-"))


def sizes_by_domain(documents: list[Document]) -> dict[str, int]:
    sizes: dict[str, int] = defaultdict(int)
    for document in documents:
        sizes[document.domain] += len(document.text)
    return sizes


def words(rng: random.Random, count: int) -> list[str]:
    return [f"w{rng.randrange(10**6)}" for _ in range(count)]


def test_the_domains_are_balanced(corpus: list[Document]) -> None:
    sizes: Counter[str] = Counter()
    for document in corpus:
        sizes[document.domain] += len(document.text.encode())
    assert 40e6 < sizes.total() < 65e6
    assert max(sizes.values()) < 0.4 * sizes.total()
    assert 0.13 < sum(sizes[domain] for domain in SYNTHETIC_DOMAINS) / sizes.total() < 0.25


def test_at_least_400_documents_weigh_as_much_as_200_and_none_more_than_half_a_percent(split: list[Document]) -> None:
    for name, least in (("val", 400), ("train", 1000)):
        lengths = np.array([len(document.text) for document in split if document.split == name])
        assert len(lengths) >= least
        assert effective_documents(lengths.tolist()) >= 200
        assert lengths.max() <= 0.005 * lengths.sum()


def test_every_domain_is_on_both_sides_in_proportion(corpus: list[Document], split: list[Document]) -> None:
    whole = sizes_by_domain(corpus)
    val = sizes_by_domain([document for document in split if document.split == "val"])
    total, val_total = sum(whole.values()), sum(val.values())
    assert val_total == pytest.approx(FRACTION * total, rel=0.02)
    for domain, size in whole.items():
        assert val[domain] / val_total == pytest.approx(size / total, rel=0.1)


def test_nothing_is_changed_but_what_is_left_out_of_excerpts(corpus: list[Document], split: list[Document]) -> None:
    assert len(split) == len(corpus)
    for before, after in zip(corpus, split, strict=True):
        assert after.text in before.text
        assert after.left_out == before.left_out + len(before.text) - len(after.text)
        if after.split == "train":
            assert after.text == before.text


def test_the_split_does_not_depend_on_other_domains_and_differs_by_seed(corpus: list[Document]) -> None:
    some = [document for document in corpus if document.domain.startswith(("synthetic", "stdlib"))]
    chosen = [
        {document.origin for document in hold_out(some, 0.02, seed, generated="synthetic-") if document.split == "val"}
        for seed in (0, 0, 1)
    ]
    assert chosen[0] == chosen[1]
    assert len(chosen[0] & chosen[2]) < 0.4 * len(chosen[0])


def test_excerpts_are_whole_lines_where_there_are_lines() -> None:
    lines = [f"{number} " + "x" * (number % 17) for number in range(200)]
    text = "\n".join(lines) + "\n"
    for digest in (0, 1, 12345, 10**15):
        part = excerpt(text, 100, digest)
        assert 50 < len(part) <= 100
        assert part in text
        assert set(part.splitlines()) <= set(lines)
    starts = Counter(excerpt(text, 100, random.Random(seed).getrandbits(64)) for seed in range(50))
    assert len(starts) > 30
    assert excerpt("y" * 1000, 100, 7) == "y" * 100


@pytest.mark.parametrize(("kept", "found"), [(120, True), (80, True), (40, False), (0, False)])
def test_near_duplicates_are_found_by_the_words_they_share(kept: int, found: bool) -> None:
    """Of 120 words the first `kept` are in another document, in other lines and with other spaces."""
    rng = random.Random(kept)
    own = words(rng, 120)
    other = "\n".join(words(rng, 300)) + "\n  " + "\n".join(own[:kept]) + "\n" + " ".join(words(rng, 300))
    texts = [" ".join(own), other, " ".join(words(rng, 500))]
    assert near_duplicates(texts, {0: texts[0]}) == ({0} if found else set())


def test_near_duplicates_agree_with_sets_of_word_sequences() -> None:
    rng = random.Random(5)
    pool = [words(rng, 30) for _ in range(12)]
    texts = [" ".join(word for part in rng.sample(pool, 4) for word in part) for _ in range(30)]
    texts += [" ".join(words(rng, 60)) for _ in range(5)]
    grams = [{tuple(text.split()[i : i + 8]) for i in range(len(text.split()) - 7)} for text in texts]
    expected = set()
    for index, own in enumerate(grams):
        others = set().union(*(other for number, other in enumerate(grams) if number != index))
        sequence = [tuple(texts[index].split()[i : i + 8]) for i in range(len(texts[index].split()) - 7)]
        if sum(gram in others for gram in sequence) > MAX_SHARED * len(sequence):
            expected.add(index)
        assert len(own) == len(sequence)
    assert near_duplicates(texts, dict(enumerate(texts))) == expected
    assert 0 < len(expected) < len(texts)


def test_a_license_in_many_files_is_never_held_out() -> None:
    rng = random.Random(0)
    terms = " ".join(words(rng, 200))
    licenses = [Document(f"{owner}\n{terms}\n", "docs", owner) for owner in "abcdefgh"]
    others = [Document(" ".join(words(rng, 200)), "docs", str(number)) for number in range(40)]
    split = list(hold_out([*licenses, *others], 0.2, 0, generated="synthetic-"))
    held_out = [document.origin for document in split if document.split == "val"]
    assert len(held_out) > 3
    assert not set(held_out) & set("abcdefgh")


def test_documents_alternate_between_domains_as_before(corpus: list[Document], split: list[Document]) -> None:
    assert [document.origin for document in split] == [document.origin for document in corpus]
    assert sum(a.domain != b.domain for a, b in pairwise(split)) > 5000
