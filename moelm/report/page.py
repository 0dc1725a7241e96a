"""A report as Markdown, and as a self-contained HTML page with a light and a dark theme."""

import base64
import html
from dataclasses import dataclass

from moelm import __version__
from moelm.console import printable_line
from moelm.report.table import Table


@dataclass(frozen=True)
class ReportFigure:
    """A figure of a report."""

    name: str
    """File name of the light version."""
    caption: str
    light: bytes
    """PNG with a white background."""
    dark: bytes
    """PNG with a dark background; only the HTML page contains it."""


@dataclass(frozen=True)
class Report:
    """The contents of a report, in reading order."""

    title: str
    warnings: tuple[str, ...]
    answer: str
    details: tuple[str, ...]
    """Sentences after the answer."""
    notes: tuple[str, ...]
    figures: tuple[ReportFigure, ...]
    tables: tuple[Table, ...]
    commands: tuple[str, ...]
    """Command lines that made the runs and the report."""


def report_markdown(report: Report) -> str:
    """A report as Markdown; its figures are separate files in the same directory."""
    parts = [f"# {report.title}", *(f"> **Warning:** {text}" for text in report.warnings)]
    parts += [f"**{report.answer}**", *report.details]
    parts += ["\n".join(f"- {note}" for note in report.notes)] if report.notes else []
    parts += [f"![{figure.caption}]({figure.name})" for figure in report.figures]
    for table in report.tables:
        rule = ("---" if i < table.left else "---:" for i in range(len(table.head)))
        cells = ((printable_line(cell).replace("|", "\\|") for cell in row) for row in (table.head, rule, *table.rows))
        parts += [f"## {table.title}", "\n".join(f"| {' | '.join(row)} |" for row in cells)]
    if report.commands:
        parts += ["## Commands", "```\n" + "\n".join(report.commands) + "\n```"]
    return "\n\n".join(parts) + "\n"


def report_html(report: Report) -> str:
    """A report as one HTML file: figures are data URIs, the style is inline, and there are no external links."""
    escape = html.escape
    body = [f"<h1>{escape(report.title)}</h1>"]
    body += [f'<p class="warning">Warning: {escape(text)}</p>' for text in report.warnings]
    body += [f'<p class="answer">{escape(report.answer)}</p>']
    body += [f"<p>{escape(text)}</p>" for text in report.details]
    if report.notes:
        body += ["<ul>", *(f"<li>{escape(note)}</li>" for note in report.notes), "</ul>"]
    body += [figure_html(figure) for figure in report.figures]
    for table in report.tables:
        body += table_html(table)
    if report.commands:
        body += ["<h2>Commands</h2>", f"<pre>{escape(chr(10).join(report.commands))}</pre>"]
    body += [f"<footer>Written by moelm {__version__}. Losses in nats per token.</footer>"]
    return html_page(report.title, "\n".join(body))


def html_page(title: str, body: str, style: str = "") -> str:
    """An HTML page in the style of moelm's reports.

    Args:
        body: HTML.
        style: additional CSS.
    """
    return _PAGE.format(title=html.escape(title), style=_CSS + style, body=body)


def figure_html(figure: ReportFigure) -> str:
    """A figure as HTML; the browser picks the light or the dark version."""
    caption = html.escape(figure.caption)
    dark = f'<source media="screen and (prefers-color-scheme: dark)" srcset="{_data_uri(figure.dark)}">'
    return f'<figure><picture>{dark}<img alt="{caption}" src="{_data_uri(figure.light)}"></picture></figure>'


def table_html(table: Table) -> list[str]:
    """The lines of a table and its heading as HTML."""
    head, *rows = (
        "".join(_cell(tag, cell, left=i < table.left) for i, cell in enumerate(row))
        for tag, row in [("th", table.head), *(("td", row) for row in table.rows)]
    )
    parts = [f"<h2>{html.escape(table.title)}</h2>", '<div class="table"><table>', f"<thead><tr>{head}</tr></thead>"]
    return [*parts, "<tbody>", *(f"<tr>{row}</tr>" for row in rows), "</tbody></table></div>"]


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def _cell(tag: str, text: str, left: bool) -> str:
    return f"<{tag}{'' if left else ' class=n'}>{html.escape(text)}</{tag}>"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
_CSS = """
:root { --paper: #fff; --ink: #1f2933; --quiet: #616e7c; --line: #e4e7eb; --warn: #fff4d6; --alarm: #7a4b00 }
@media screen and (prefers-color-scheme: dark) { :root {
  --paper: #15191e; --ink: #e4e7eb; --quiet: #9aa5b1; --line: #323f4b; --warn: #3d2f0c; --alarm: #ffd97a } }
body { margin: 0 auto; max-width: 64rem; padding: 1.5rem 1rem 3rem; background: var(--paper);
  color: var(--ink); font: 16px/1.55 system-ui, sans-serif }
h1 { margin: 0 0 1rem; font-size: 1.1rem; font-weight: 600; color: var(--quiet); overflow-wrap: anywhere }
h2 { margin: 2.2rem 0 .5rem; font-size: 1.05rem; break-after: avoid }
.answer { margin: 0 0 1rem; font-size: 1.4rem; line-height: 1.35; font-weight: 600; text-wrap: pretty }
.warning { padding: .6rem .9rem; border-radius: .4rem; background: var(--warn); color: var(--alarm) }
p, li { overflow-wrap: anywhere }
ul { padding-left: 1.2rem; color: var(--quiet) }
figure { margin: 1.5rem 0; break-inside: avoid }
img { display: block; width: 100%; height: auto }
.table { overflow-x: auto }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
tr { break-inside: avoid }
th, td { padding: .35rem .8rem .35rem 0; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: bottom }
th { font-weight: 500; color: var(--quiet) }
td { white-space: nowrap }
.n { padding: .35rem 0 .35rem .8rem; text-align: right }
pre { overflow-x: auto; padding: .8rem; border: 1px solid var(--line); border-radius: .4rem; font-size: .85rem }
footer { margin-top: 2.5rem; font-size: .85rem; color: var(--quiet) }
@media (max-width: 40rem) { .answer { font-size: 1.15rem } figure { overflow-x: auto } img { min-width: 40rem } }
@media print { body { max-width: none; padding: 0; font-size: 10pt } .answer { font-size: 14pt }
  .table { overflow: visible } table { font-size: 8pt } td { white-space: normal } pre { white-space: pre-wrap } }
"""
