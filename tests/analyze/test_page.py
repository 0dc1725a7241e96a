"""routing.html: self-contained, escaped, with the passages' experts in every layer; passages are parts of the text."""

import base64
import contextlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moelm.analyze.collect import sample_rows
from moelm.analyze.page import routing_page, summary_sentences
from moelm.analyze.passages import Passage, sample_passages
from moelm.analyze.report import analyze_run
from moelm.runs.load import open_run

SPECIAL_TEXTS = ["<b>", " &amp;", "\n", "\r", "</script>", '"é🙂', ""]


class Page(HTMLParser):
    """The contents of a page: tags and attributes, classes and texts of the passages' tokens, and the script's data."""

    VOID = ("meta", "img", "source")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.opened: list[tuple[str, dict[str, str | None]]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.passages: list[list[list[str]]] = []
        self.data = ""
        self.feed(text)
        self.close()
        assert self.opened == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.opened.append(self.tags[-1])
        if tag == "div" and self.tags[-1][1].get("class") == "passage":
            self.passages.append([])
        elif self.passages and tag == "span" and ("div", {"class": "passage"}) in self.opened:
            self.passages[-1].append([str(self.tags[-1][1]["class"]), ""])

    def handle_endtag(self, tag: str) -> None:
        assert self.opened.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if self.opened and self.opened[-1] == ("script", {"type": "application/json", "id": "token-experts"}):
            self.data += data
        elif self.opened and self.opened[-1][0] == "span" and ("div", {"class": "passage"}) in self.opened:
            self.passages[-1][-1][1] += data


@pytest.fixture(scope="module")
def report(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with contextlib.chdir(trained):
        result = analyze_run("tiny-moe", tmp_path_factory.mktemp("page") / "out", "val", "last", 10_000, 9, 0)
    assert result is not None
    return result


def passages(num_experts: int = 4) -> list[Passage]:
    def experts(layer: int) -> list[list[int]]:
        return [[(number * (layer + 1)) % num_experts, (number + 1) % num_experts] for number in range(len(SPECIAL_TEXTS))]

    return [
        Passage("<domain>", SPECIAL_TEXTS, {0: experts(0), 1: experts(1)}),
        Passage("<domain>", ["x"], {0: [[3, 2]], 1: [[1, 0]]}),
    ]


@pytest.mark.parametrize("num_experts", [4, 300])
def test_tokens_are_the_passages_in_every_layer(report: dict[str, Any], num_experts: int) -> None:
    given = passages(num_experts)
    page = Page(routing_page({**report, "num_experts": num_experts}, given, ()))
    assert [[text for _, text in shown] for shown in page.passages] == [passage.texts for passage in given]
    assert [layer["value"] for tag, layer in page.tags if tag == "option"] == ["0", "1"]
    data = json.loads(page.data)
    packed = np.frombuffer(base64.b64decode(data["experts"]), dtype="<u2" if data["uint16"] else "u1")
    for experts, layer in zip(packed.reshape(2, -1, data["top_k"]), (0, 1), strict=True):
        assert experts.tolist() == [one for passage in given for one in passage.experts[layer]]
    selected = next(int(str(layer["value"])) for tag, layer in page.tags if tag == "option" and "selected" in layer)
    first = [f"e{one[0]}" for passage in given for one in passage.experts[selected]]
    assert [name for shown in page.passages for name, _ in shown] == first


def test_the_written_page_is_self_contained(trained: Path, tmp_path: Path) -> None:
    with contextlib.chdir(trained):
        analyze_run("tiny-moe", tmp_path / "out", "val", "last", 10_000, 9, 0)
    text = (tmp_path / "out/routing.html").read_text(encoding="utf-8")
    assert "http" not in text
    assert "url(" not in text
    page = Page(text)
    for tag, attributes in page.tags:
        assert "href" not in attributes
        assert tag != "link"
        for name in ("src", "srcset"):
            assert str(attributes.get(name, "data:")).startswith("data:")
    images = [str(about["src"]) for tag, about in page.tags if tag == "img"]
    assert [base64.b64decode(source.partition(",")[2]) for source in images] == [
        (tmp_path / "out" / name).read_bytes() for name in ("shares.png", "repetition.png", "experts.png", "saturation.png")
    ]
    assert all("".join(text for _, text in shown) for shown in page.passages)


def test_text_of_the_run_and_the_data_is_escaped(report: dict[str, Any]) -> None:
    text = routing_page({**report, "run": "<i>run</i>"}, passages(), ())
    assert "<i>" not in text
    assert "<b>" not in text
    assert "<domain>" not in text
    assert text.count("</script>") == 2
    Page(text)


def test_the_answer_comes_first(report: dict[str, Any]) -> None:
    assert summary_sentences(report)[0].startswith("The text has only one domain")

    def answer(p: float) -> str:
        layers = [
            {**layer, "association": {"all": {"cramers_v": strength, "permuted": 0.05, "p": p}}}
            for layer, strength in zip(report["layers"], (0.4, 0.3), strict=True)
        ]
        return summary_sentences({**report, "domains": {"a": {}, "b": {}}, "layers": layers})[0]

    wanted = r"most of all in layer 0: Cramér's V is 0.40, compared with 0.05 for randomly permuted domains \(p = 0.01\)"
    assert re.search(wanted, answer(0.01))
    assert answer(0.3).startswith("Experts do not specialize significantly in the 2 domains, not even in layer 0: ")


def test_passages_are_parts_of_the_sampled_documents(trained: Path) -> None:
    with contextlib.chdir(trained):
        run = open_run("tiny-moe", "last", "val")
        found = sample_passages(run, 200, 0)
        again, other = sample_passages(run, 200, 0), sample_passages(run, 10_000, 1)
        documents = Path("text.txt").read_text().splitlines(keepends=True)
        rows = sample_rows(run.rows, 200, 0)
        batch = run.rows.batch(rows)
    assert found == again
    assert found != other
    assert [passage.domain for passage in found] == [run.rows.split.domains[0]] * 2
    fragments = {}
    for fragment in np.unique(batch.fragments_BT[batch.valid_BT]):
        here = batch.fragments_BT == fragment
        fragments[run.tokenizer.decode(batch.targets_BT[here].tolist())] = batch.tokens_BT[here]
    for passage in found:
        text = "".join(passage.texts)
        assert any(text in document for document in documents)
        tokens = next(tokens for whole, tokens in fragments.items() if whole.startswith(text))
        with torch.no_grad():
            routings = run.model(tokens[None]).routings
        for layer, experts in passage.experts.items():
            seen = routings[layer].experts_NK.tolist()[1 : 1 + len(experts)]
            assert experts[: len(seen)] == seen
