"""routing.html: one file without external links; without JavaScript it shows one layer.

All text of the run and its data is escaped.
"""

import base64
import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moelm import __version__
from moelm.analyze.ablation.page import ablation_sentences, ablation_tables
from moelm.analyze.passages import Passage
from moelm.report.page import ReportFigure, figure_html, html_page, table_html
from moelm.report.palette import expert_colors
from moelm.report.table import NO_VALUE, Table

SIGNIFICANCE = 0.05
"""Largest p at which the page calls experts specialized."""


def routing_page(report: Mapping[str, Any], passages: Sequence[Passage], figures: Sequence[ReportFigure]) -> str:
    """The whole page.

    Args:
        report: the contents of routing.json.
    """
    layer = most_specialized_layer(report)
    title = f"Routing of {report['run']}"
    answer, *details = (html.escape(sentence) for sentence in summary_sentences(report))
    body = [
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="answer">{answer}</p>',
        *(f"<p>{sentence}</p>" for sentence in details),
        *(f"<p>{html.escape(sentence)}</p>" for sentence in _causes(report)),
        *map(figure_html, figures),
        *_passages_html(report, passages, layer["layer"]),
        *_tables_html(report, layer),
        f"<footer>Written by moelm {__version__}.</footer>",
        f"<script>{_SCRIPT}</script>",
    ]
    return html_page(title, "\n".join(body), _CSS + _expert_css(report["num_experts"]))


def _causes(report: Mapping[str, Any]) -> list[str]:
    """What ablations say, or how to measure it."""
    if report["ablation"]:
        return ablation_sentences(report["ablation"])
    return ["These are correlations: moelm analyze --ablate all measures what the loss is without each expert."]


def most_specialized_layer(report: Mapping[str, Any]) -> dict[str, Any]:
    """The layer with the largest Cramér's V over all domains; the last one if there is only one domain."""

    def strength(layer: dict[str, Any]) -> float:
        association = layer["association"].get("all")
        return float(association["cramers_v"]) if association else 0.0

    strongest: dict[str, Any] = max(reversed(report["layers"]), key=strength)
    return strongest


def summary_sentences(report: Mapping[str, Any]) -> list[str]:
    """The answer, then the details."""
    layer, domains = most_specialized_layer(report), len(report["domains"])
    first, association = layer["repetition"]["first"], layer["association"].get("all")
    repeated = NO_VALUE if first["all"] is None else f"{first['all']:.1%}"
    repetition = (
        f"adjacent tokens share their first expert in {repeated} of cases, "
        f"compared with {first['uniform']:.1%} for uniformly random experts"
    )
    if first["shuffled"] is not None:
        repetition += f" and {first['shuffled']:.1%} for random pairs of tokens in the same domain"
    text = f"{report['tokens']:,} tokens in {report['documents']:,} documents of the {report['split']} split"
    basis = f"Based on {text}, at step {report['step']:,}."
    if association is None:
        answer = "The text has only one domain, so specialization in domains cannot be measured"
        return [f"{answer}; in layer {layer['layer']}, {repetition}.", basis]
    effect = (
        f"Cramér's V is {association['cramers_v']:.2f}, compared with {association['permuted']:.2f} "
        f"for randomly permuted domains (p = {association['p']:.2g})"
    )
    if association["p"] <= SIGNIFICANCE:
        finding = f"Experts specialize in the {domains} domains, most of all in layer {layer['layer']}"
    else:
        finding = f"Experts do not specialize significantly in the {domains} domains, not even in layer {layer['layer']}"
    meaning = "V is 0 if all domains are routed alike, and 1 if the expert determines the domain"
    for group in ("real", "synthetic"):
        if part := layer["association"].get(group):
            meaning += f"; for {group} domains alone it is {part['cramers_v']:.2f} (p = {part['p']:.2g})"
    return [f"{finding}: {effect}.", f"{meaning}. In that layer, {repetition}. {basis}"]


def _expert_css(num_experts: int) -> str:
    """A class for each expert. While its number in the legend is selected, the tokens of other experts are faded."""
    others = "body:has(.legend .e{0}:is(:hover, :focus)) .passage span:not(.e{0})"
    return "\n".join(
        f".e{e} {{ --color: {color} }} {others.format(e)} {{ opacity: .15 }}"
        for e, color in enumerate(expert_colors(num_experts))
    )


def _passages_html(report: Mapping[str, Any], passages: Sequence[Passage], selected: int) -> list[str]:
    """The passages in the colors of one layer, and the experts of all layers as data for the script."""
    layers = [layer["layer"] for layer in report["layers"]]
    options = "".join(
        f"<option{' selected' if layer == selected else ''} value={layer}>layer {layer}</option>" for layer in layers
    )
    legend = "".join(f'<span tabindex=0 class="e{e}">{e}</span>' for e in range(report["num_experts"]))
    parts = [
        "<h2>Tokens by their first expert</h2>",
        f'<div class="toolbar"><label>Experts of <select id="layer" disabled>{options}</select></label>',
        f'<span class="legend">{legend}</span> <span id="token-info">Point at a number or a token.</span></div>',
    ]
    for number, passage in enumerate(passages):
        if not number or passages[number - 1].domain != passage.domain:
            parts.append(f"<h3>{html.escape(passage.domain)}</h3>")
        tokens = "".join(
            f'<span class="e{experts[0]}">{_escape_token(text)}</span>'
            for text, experts in zip(passage.texts, passage.experts[selected], strict=True)
        )
        parts.append(f'<div class="passage">{tokens}</div>')
    experts = [[experts for passage in passages for experts in passage.experts[layer]] for layer in layers]
    uint16 = report["num_experts"] > 256
    packed = np.array(experts, dtype="<u2" if uint16 else "u1").tobytes()
    data = {"top_k": report["top_k"], "uint16": uint16, "experts": base64.b64encode(packed).decode("ascii")}
    return [*parts, f'<script type="application/json" id="token-experts">{json.dumps(data)}</script>']


def _escape_token(text: str) -> str:
    """HTML of a token's text; browsers would turn a plain carriage return into a line feed."""
    return html.escape(text, quote=False).replace("\r", "&#13;")


def _tables_html(report: Mapping[str, Any], selected: Mapping[str, Any]) -> list[str]:
    layers, domains = report["layers"], list(report["domains"])
    steps = [f"as at step {checkpoint['step']:,}" for checkpoint in layers[0]["saturation"]["checkpoints"]]
    head = ("layer", "max / mean load", "dead", "V", "p", "same first", "shuffled", "uniform", "entropy", *steps)
    repetition = tuple(
        (str(layer["layer"]), *(_share(layer["repetition"]["first"]["domains"][domain]) for domain in domains))
        for layer in layers
    )
    vocabulary = tuple(
        (str(expert), " · ".join(json.dumps(token["text"], ensure_ascii=False) for token in tokens) or NO_VALUE)
        for expert, tokens in enumerate(selected["vocabulary_specialization"]["by_input"])
    )
    title = f"Most specific input tokens, by expert of layer {selected['layer']}"
    ablation = ablation_tables(report["ablation"]) if report["ablation"] else []
    return [
        *(line for table in ablation for line in table_html(table)),
        *table_html(Table("Layers", head, tuple(map(_layer_row, layers)))),
        *table_html(Table("Adjacent tokens with the same first expert, by domain", ("layer", *domains), repetition)),
        '<div class="vocabulary">',
        *table_html(Table(title, ("expert", "tokens"), vocabulary, left=2)),
        "</div>",
    ]


def _layer_row(layer: Mapping[str, Any]) -> tuple[str, ...]:
    first, association = layer["repetition"]["first"], layer["association"].get("all")
    return (
        str(layer["layer"]),
        f"{layer['load_max_over_mean']:.2f}",
        str(len(layer["dead_experts"])),
        *((f"{association['cramers_v']:.3f}", f"{association['p']:.3g}") if association else (NO_VALUE, NO_VALUE)),
        *(_share(first[key]) for key in ("all", "shuffled", "uniform")),
        f"{layer['entropy']['all']:.3f}",
        *(f"{checkpoint['experts']:.3f}" for checkpoint in layer["saturation"]["checkpoints"]),
    )


def _share(value: float | None) -> str:
    return NO_VALUE if value is None else f"{value:.3f}"


_CSS = """
h3 { margin: 1.4rem 0 .4rem; font-size: .9rem; font-weight: 600; color: var(--quiet); break-after: avoid }
.toolbar { position: sticky; top: 0; z-index: 1; padding: .5rem 0; background: var(--paper);
  border-bottom: 1px solid var(--line); color: var(--quiet); font-size: .9rem }
.toolbar select { font: inherit; color: inherit; background: var(--paper); border: 1px solid var(--line);
  border-radius: .3rem; padding: .1rem .3rem }
.legend { display: inline-flex; flex-wrap: wrap; gap: .2rem; max-height: 5.6rem; overflow-y: auto; margin: 0 .5rem;
  vertical-align: middle }
.legend span { min-width: 1.9em; text-align: center; cursor: default }
#token-info { white-space: pre-wrap; overflow-wrap: anywhere }
.passage { margin: 0 0 .8rem; padding: .7rem .8rem; border: 1px solid var(--line); border-radius: .5rem;
  white-space: break-spaces; overflow-wrap: anywhere; font: .8rem/1.75 ui-monospace, monospace }
.passage span, .legend span { background: color-mix(in srgb, var(--color) 42%, var(--paper));
  border-bottom: 2px solid var(--color); color: var(--ink); print-color-adjust: exact; -webkit-print-color-adjust: exact }
.passage span { box-shadow: inset -1px 0 var(--paper) }
.vocabulary td { white-space: normal; vertical-align: top }
.vocabulary td + td { font: .8rem/1.6 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere }
@media print { .toolbar { position: static } #token-info { display: none } }
"""

_SCRIPT = """
const data = JSON.parse(document.getElementById('token-experts').textContent)
const bytes = Uint8Array.from(atob(data.experts), char => char.charCodeAt(0))
const experts = data.uint16 ? new Uint16Array(bytes.buffer) : bytes
const tokens = [...document.querySelectorAll('.passage span')]
const layer = document.getElementById('layer'), info = document.getElementById('token-info')
const expertsOf = index => {
  const start = (layer.selectedIndex * tokens.length + index) * data.top_k
  return experts.slice(start, start + data.top_k)
}
const updateColors = () => tokens.forEach((token, index) => token.className = 'e' + expertsOf(index)[0])
const showExperts = event => {
  const index = tokens.indexOf(event.target)
  if (index >= 0) info.textContent = JSON.stringify(event.target.textContent) + ' → ' + [...expertsOf(index)].join(', ')
}
layer.disabled = false
layer.addEventListener('change', updateColors)
for (const kind of ['mouseover', 'click']) document.addEventListener(kind, showExperts)
updateColors()
"""
