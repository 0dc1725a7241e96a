"""The report on disk and on the terminal, from small runs with known numbers."""

import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from moelm.cli.compare import render_comparison
from moelm.compare.report import compare_runs
from moelm.errors import MoelmError
from tests.compare.linear_runs import MOE, write_run
from tests.conftest import Moelm


@pytest.fixture
def pair(tmp_path: Path) -> list[str]:
    """A dense run that ends at 3.0, and an MoE run that ends at 1.8 at twice the cost per token."""
    dense = write_run(tmp_path / "dense", slope=0.5)
    return [str(dense), str(write_run(tmp_path / "moe", slope=0.8, ffn=MOE, flops=2e9, seconds=0.2))]


def test_all_files_are_written(pair: list[str], tmp_path: Path) -> None:
    out = tmp_path / "deep" / "report"
    compare_runs(pair, out)
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["comparison.png", "load.png", "report.html", "report.json", "report.md"]
    )
    assert [path.name for path in out.parent.iterdir()] == ["report"]
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in ("comparison.png", "load.png"))


@pytest.mark.usefixtures("no_figures")
def test_report_json_keys(pair: list[str], tmp_path: Path) -> None:
    comparison = compare_runs(pair, tmp_path / "report")
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report.keys() == {
        *("schema", "kind", "moelm", "reference", "challenger", "winner", "verdict", "confidence", "efficiency", "sizes"),
        *("seed_std", "scaling", "notes", "forced", "warnings", "variants", "pairs", "config_differences"),
    }
    assert (report["schema"], report["kind"], report["forced"]) == (3, "moelm compare", False)
    assert (report["reference"], report["challenger"], report["winner"]) == ("dense", "moe", None)
    assert report["verdict"] == comparison.verdict.sentence
    moe = report["variants"][1]
    assert moe.keys() == {
        *("name", "path", "runs", "lengths", "parameters", "flops_per_token", "tokens", "flops", "seconds", "dollars"),
        *("val_loss", "val_bpb", "tokens_per_second", "memory_peak_bytes", "domains", "curve", "load", "environment"),
    }
    assert moe["val_loss"] == pytest.approx({"final": 1.8, "best": 1.8, "seed_std": None})
    assert moe["load"] == {"layers": [0, 1], "final_share": [[0.4, 0.3, 0.2, 0.1]] * 2}
    assert report["variants"][0]["load"] is None
    forth = next(pair for pair in report["pairs"] if pair["a"] == "moe")
    reached = forth["cost_to_reach"]["tokens"]
    assert (reached["cost"], reached["other_cost"], reached["ratio"]) == pytest.approx((250_000, 400_000, 1.6))
    assert reached.keys() - {"cost", "other_cost", "ratio"} == {"at_most", "read", "ratio_low", "ratio_high"}
    assert forth["equal_cost"]["tokens"].keys() == {
        *("at", "loss_a", "loss_b", "margin", "gain", "tie"),
        *("read_a", "read_b", "interval", "seeds_ahead", "seeds_shared"),
    }
    back = next(pair for pair in report["pairs"] if pair["a"] == "dense")
    assert back["cost_to_reach"]["flops"]["cost"] is None


@pytest.mark.usefixtures("no_figures")
def test_markdown_has_aligned_tables(pair: list[str], tmp_path: Path) -> None:
    compare_runs(pair, tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    assert "| dense | 20.0K | 20.0K | 120K | 400K | 3.000 | 3.000 | 1.500 | 1.500 | 10.0K | 1.00 GiB |" in text
    assert "| dense | moe at 1.800 | not reached | not reached | not reached |" in text
    assert "| moe | dense at 3.000 | 250K (1.60×) | 5.0e11 (0.80×) | 50.0 s (0.80×) |" in text
    assert (
        "| moe against dense | equal FLOPs | 4.0e11 FLOPs | 3.400 | 3.000 | -0.400 | – | 0 of 1 | in mid-schedule / end"
        in text
    )
    real, synthetic = text.index("## Final loss by domain"), text.index("## Final loss by synthetic domain")
    assert real < text.index("| code | 3.500 | 2.300 |") < synthetic
    assert synthetic < text.index("| synthetic-sums | 2.500 | 1.300 |")
    assert "| model.ffn.num_experts | – | 4 |" in text
    assert "![" in text


class _Page(HTMLParser):
    """Collects the sources that a page loads, and checks that its tags are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for key, value in attrs if key in ("src", "srcset", "href")]
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_begins_with_the_verdict_and_is_self_contained(pair: list[str], tmp_path: Path) -> None:
    comparison = compare_runs(pair, tmp_path / "report")
    text = (tmp_path / "report" / "report.html").read_text()
    page = _Page()
    page.feed(text)
    assert page.open == []
    assert len(page.sources) == 4
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert "prefers-color-scheme: dark" in text
    verdict = comparison.verdict.sentence.replace("'", "&#x27;")
    assert text.index(verdict) < text.index("<figure>") < text.index("<table>")
    assert not re.search(r"https?://", text)


COMMAND = "<script>a|b</script> caf\udce9"
"""With a byte that is not UTF-8."""


def test_page_escapes_text_from_runs(tmp_path: Path) -> None:
    runs = [str(write_run(tmp_path / name, slope=0.5, environment={"command": COMMAND})) for name in "ab"]
    compare_runs(runs, tmp_path / "report")
    assert "<script>" not in (tmp_path / "report" / "report.html").read_text()
    assert r"<script>a|b</script> caf\udce9" in (tmp_path / "report" / "report.md").read_text()
    assert not (tmp_path / "report" / "load.png").exists()


@pytest.mark.usefixtures("no_figures")
def test_forced_report_has_its_warning(tmp_path: Path) -> None:
    runs = [str(write_run(tmp_path / name, slope=0.5, environment={"data_fingerprint": name})) for name in "ab"]
    with pytest.raises(MoelmError, match="were trained on different data"):
        compare_runs(runs, tmp_path / "report")
    assert not (tmp_path / "report").exists()
    comparison = compare_runs(runs, tmp_path / "report", force=True)
    warning = comparison.warnings[0]
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert (report["forced"], report["warnings"]) == (True, [warning])
    assert all(warning in (tmp_path / "report" / name).read_text() for name in ("report.md", "report.html"))
    assert "Warning: a and b were trained on different data" in _printed(runs, tmp_path / "report", force=True)


@pytest.mark.usefixtures("no_figures")
def test_an_earlier_report_is_replaced(pair: list[str], tmp_path: Path) -> None:
    out = tmp_path / "report"
    compare_runs(pair, out)
    third = str(write_run(tmp_path / "third", slope=0.4))
    compare_runs([pair[0], third], out)
    assert json.loads((out / "report.json").read_text())["challenger"] == "third"
    assert not (out / "load.png").exists()  # a file of the first report
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "moe", "report", "third"]


@pytest.mark.usefixtures("no_figures")
def test_a_report_of_schema_1_is_replaced(pair: list[str], tmp_path: Path) -> None:
    out = tmp_path / "report"
    compare_runs(pair, out)
    report = json.loads((out / "report.json").read_text())
    (out / "report.json").write_text(json.dumps(report | {"schema": 1}))
    (out / "trend.png").write_bytes(b"")
    compare_runs(pair, out)
    assert json.loads((out / "report.json").read_text())["schema"] == 3
    assert not (out / "trend.png").exists()


@pytest.mark.usefixtures("no_figures")
def test_an_empty_directory_is_accepted(pair: list[str], tmp_path: Path) -> None:
    (tmp_path / "report").mkdir()
    compare_runs(pair, tmp_path / "report")
    assert (tmp_path / "report" / "report.json").exists()


@pytest.mark.parametrize("text", ["{}", "not json", '{"schema": 1}', "[]", None])
def test_other_files_are_not_replaced(pair: list[str], tmp_path: Path, text: str | None) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / ("thesis.tex" if text is None else "report.json")).write_text(text or "text")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(MoelmError, match="out is not empty and holds no earlier report"):
        compare_runs(pair, out)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


@pytest.mark.usefixtures("no_figures")
def test_a_file_beside_an_earlier_report_is_not_replaced(pair: list[str], tmp_path: Path) -> None:
    compare_runs(pair, tmp_path / "report")
    (tmp_path / "report" / "remarks.txt").write_text("mine")
    with pytest.raises(MoelmError, match=r"holds remarks\.txt beside an earlier report"):
        compare_runs(pair, tmp_path / "report")
    assert (tmp_path / "report" / "remarks.txt").read_text() == "mine"


def test_a_file_as_out_is_refused(pair: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MoelmError, match="file is a file"):
        compare_runs(pair, tmp_path / "file")
    with pytest.raises(MoelmError, match="cannot be written"):
        compare_runs(pair, tmp_path / "file" / "below")


@pytest.mark.usefixtures("no_figures")
def test_a_failed_write_leaves_the_earlier_report(pair: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "report"
    compare_runs(pair, out)
    before = (out / "report.json").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(MoelmError, match="report cannot be written: No space left on device"):
        compare_runs(pair[::-1], out)
    assert (out / "report.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "moe", "report"]


@pytest.mark.usefixtures("no_figures")
def test_terminal_fits_eighty_columns(pair: list[str], tmp_path: Path) -> None:
    printed = _printed(pair, tmp_path / "report")
    assert max(map(len, printed.splitlines())) <= 80
    assert re.search(r"val loss final +3\.000 +1\.800", printed)
    assert "Split result: against dense" in printed
    assert "not reached" in printed


def _printed(runs: list[str], out: Path, force: bool = False) -> str:
    console = Console(file=io.StringIO(), width=80)
    render_comparison(console, compare_runs(runs, out, force))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_command_with_groups_and_prices(moelm: Moelm, workplace: Path) -> None:
    for seed in (0, 1):
        write_run(workplace / f"runs/dense-{seed}", slope=0.5 + seed / 100, seed=seed)
        write_run(workplace / f"runs/moe-{seed}", slope=0.8 + seed / 100, seed=seed, ffn=MOE)
    names = ["dense-0", "moe-1", "dense-1", "moe-0"]
    done = moelm("compare", *names, "--group", "--price", "2", "--price", "4", "--json", "--out", "out")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [(run["name"], len(run["runs"])) for run in report["variants"]] == [("dense", 2), ("moe", 2)]
    assert report["variants"][1]["dollars"] == pytest.approx(2 * report["variants"][0]["dollars"])
    assert "moelm compare dense-0 moe-1 dense-1 moe-0 --group" in (workplace / "out/report.md").read_text()


def test_comparison_does_not_import_torch() -> None:
    code = "import sys, moelm.compare.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(("documents", "few"), [(9, True), (10, False)])
def test_few_evaluation_documents_are_warned_of_first(tmp_path: Path, documents: int, few: bool) -> None:
    losses = [1 + number / 10 for number in range(documents)]
    runs = [str(write_run(tmp_path / name, slope=0.1, documents=losses)) for name in "ab"]
    comparison = compare_runs(runs, tmp_path / "out")
    lines = (tmp_path / "out/report.md").read_text().split("\n\n")
    warning = "Warning:** The 9 evaluation documents weigh as much as 9.0 of equal length, so an interval over them means"
    assert (warning in lines[1]) == few
    assert (len(comparison.warnings) == 1) == few
    assert json.loads((tmp_path / "out/report.json").read_text())["forced"] is False
