"""Names of runs and domains in reports: shown as they are, whatever characters they have."""

import warnings

from matplotlib.figure import Figure

from moelm.report.figures import legend_label, render_light_and_dark
from moelm.report.page import Report, report_html, report_markdown
from moelm.report.table import Table

NAME = "a|b\n<b>$x_1$"


def test_a_table_keeps_its_columns() -> None:
    table = Table("t", ("domain", "loss"), ((NAME, "1"),))
    report = Report(NAME, (), NAME, (), (), (), (table,), ())
    rows = [line for line in report_markdown(report).splitlines() if line.startswith("| ")]
    assert rows[-1] == r"| a\|b\n<b>$x_1$ | 1 |"
    page = report_html(report)
    assert "<b>" not in page
    assert page.count("a|b\n&lt;b&gt;$x_1$") == 4


def test_every_line_of_a_figure_is_in_its_legend() -> None:
    drawn: list[Figure] = []

    def draw() -> Figure:
        figure = Figure()
        axes = figure.subplots()
        for name in ("_hidden", "$x_1$", "$\\frac{$"):
            axes.plot([1], [1], label=legend_label(name))
        figure.legend()
        drawn.append(figure)
        return figure

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        render_light_and_dark(draw)
    assert [text.get_text().lstrip("\u200b") for text in drawn[0].legends[0].texts] == ["_hidden", "$x_1$", "$\\frac{$"]
