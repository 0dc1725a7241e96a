"""routing.html: one file that needs no network, no other file and, but for the choice of a layer, no JavaScript.

Its parts are strings of HTML; what comes from the run or its text is escaped where it enters them.
"""

import base64
import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moelm import __version__
from moelm.analysis.page import Picture, figure_html, table_html, whole_page
from moelm.analysis.routing.palette import expert_colours
from moelm.analysis.routing.passages import Passage
from moelm.analysis.routing.style import CSS, SCRIPT
from moelm.analysis.tables import NONE, Table

SURE = 0.05
"""p up to which experts are said to tell domains apart."""


def routing_page(told: Mapping[str, Any], passages: Sequence[Passage], pictures: Sequence[Picture]) -> str:
    """The whole page.

    Args:
        told: what routing.json holds.
    """
    shown = strongest(told)
    title = f"Routing of {told['run']}"
    answer, *further = (html.escape(sentence) for sentence in sentences(told))
    body = [
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="answer">{answer}</p>',
        *(f"<p>{sentence}</p>" for sentence in further),
        *map(figure_html, pictures),
        *_texts(told, passages, shown),
        *_tables(told, shown),
        f"<footer>Written by moelm {__version__}.</footer>",
        f"<script>{SCRIPT}</script>",
    ]
    return whole_page(title, "\n".join(body), CSS + _colours(told["num_experts"]))


def strongest(told: Mapping[str, Any]) -> dict[str, Any]:
    """The layer whose experts tell domains apart best; the last one where there is one domain only."""

    def strength(layer: dict[str, Any]) -> float:
        found = layer["association"].get("all")
        return float(found["cramers_v"]) if found else 0.0

    best: dict[str, Any] = max(reversed(told["layers"]), key=strength)
    return best


def sentences(told: Mapping[str, Any]) -> list[str]:
    """The answer, and what it rests on."""
    best, count = strongest(told), len(told["domains"])
    first, found = best["repetition"]["first"], best["association"].get("all")
    repeated = NONE if first["all"] is None else f"{first['all']:.1%}"
    company = f"neighbours share their first expert in {repeated} of cases, and would in {first['uniform']:.1%} by lot"
    if first["shuffled"] is not None:
        company += f", or in {first['shuffled']:.1%} if the tokens of a domain were shuffled"
    read = f"{told['tokens']:,} tokens of {told['documents']:,} documents of the {told['split']} split"
    basis = f"From {read}, at step {told['step']:,}."
    if found is None:
        return [f"The text is of one domain, so it tells nothing of domains; in layer {best['layer']} {company}.", basis]
    figures = (
        f"Cramér's V {found['cramers_v']:.2f}, against {found['shuffled']:.2f} if documents had their domains by lot "
        f"(p = {found['p']:.2g})"
    )
    answer = (
        f"Experts tell the {count} domains apart, most of all in layer {best['layer']}: {figures}."
        if found["p"] <= SURE
        else f"Experts do not tell the {count} domains apart: even layer {best['layer']}, the strongest, has {figures}."
    )
    meaning = "V is 0 where domains are routed alike, and 1 where an expert tells its domain"
    for group in ("real", "synthetic"):
        if part := best["association"].get(group):
            meaning += f"; among {group} domains alone it is {part['cramers_v']:.2f} (p = {part['p']:.2g})"
    return [answer, f"{meaning}. In that layer {company}. {basis}"]


def _colours(num_experts: int) -> str:
    """A class for each expert; its number in the legend, pointed at, dims the tokens of all others."""
    point = "body:has(.legend .e{0}:is(:hover, :focus)) .passage span:not(.e{0})"
    return "\n".join(
        f".e{e} {{ --hue: {colour} }} {point.format(e)} {{ opacity: .15 }}"
        for e, colour in enumerate(expert_colours(num_experts))
    )


def _texts(told: Mapping[str, Any], passages: Sequence[Passage], shown: Mapping[str, Any]) -> list[str]:
    """The passages in one layer's colours, and what paints them in another's."""
    layers = [layer["layer"] for layer in told["layers"]]
    options = "".join(
        f"<option{' selected' if layer == shown['layer'] else ''} value={layer}>layer {layer}</option>" for layer in layers
    )
    legend = "".join(f'<span tabindex=0 class="e{e}">{e}</span>' for e in range(told["num_experts"]))
    parts = [
        "<h2>Tokens by their first expert</h2>",
        '<div class="bar"><label>Experts of <select id="layer" disabled>' + options + "</select></label>",
        f'<span class="legend">{legend}</span> <span id="told">Point at a number or a token.</span></div>',
    ]
    for number, passage in enumerate(passages):
        if not number or passages[number - 1].domain != passage.domain:
            parts.append(f"<h3>{html.escape(passage.domain)}</h3>")
        visits = zip(passage.texts, passage.experts[shown["layer"]], strict=True)
        tokens = "".join(f'<span class="e{experts[0]}">{_escape(text)}</span>' for text, experts in visits)
        parts.append(f'<div class="passage">{tokens}</div>')
    experts = [[experts for passage in passages for experts in passage.experts[layer]] for layer in layers]
    wide = told["num_experts"] > 256
    packed = np.array(experts, dtype="<u2" if wide else "u1").tobytes()
    data = {"top_k": told["top_k"], "wide": wide, "experts": base64.b64encode(packed).decode("ascii")}
    return [*parts, f'<script type="application/json" id="visits">{json.dumps(data)}</script>']


def _escape(text: str) -> str:
    """A carriage return would come back as the end of a line."""
    return html.escape(text, quote=False).replace("\r", "&#13;")


def _tables(told: Mapping[str, Any], shown: Mapping[str, Any]) -> list[str]:
    layers, domains = told["layers"], list(told["domains"])
    rows: list[tuple[str, ...]] = []
    for layer in layers:
        found, first, same = (
            layer["association"].get("all"),
            layer["repetition"]["first"],
            layer["saturation"]["checkpoints"],
        )
        rows.append(
            (
                str(layer["layer"]),
                f"{layer['load_max_over_mean']:.2f}",
                str(len(layer["dead_experts"])),
                *((f"{found['cramers_v']:.3f}", f"{found['p']:.3g}") if found else (NONE, NONE)),
                *(_share(first[key]) for key in ("all", "shuffled", "uniform")),
                f"{layer['entropy']['all']:.3f}",
                *(f"{one['experts']:.3f}" for one in same),
            )
        )
    steps = [f"as at step {one['step']:,}" for one in layers[0]["saturation"]["checkpoints"]]
    head = ("layer", "max / mean load", "dead", "V", "p", "same first", "shuffled", "by lot", "entropy", *steps)
    repeated = tuple(
        (str(layer["layer"]), *(_share(layer["repetition"]["first"]["domains"][domain]) for domain in domains))
        for layer in layers
    )
    words = tuple(
        (str(expert), " · ".join(json.dumps(token["text"], ensure_ascii=False) for token in tokens) or NONE)
        for expert, tokens in enumerate(shown["characteristic"]["by_input"])
    )
    title = f"Tokens most its own, by expert of layer {shown['layer']}"
    return [
        *table_html(Table("Layers", head, tuple(rows))),
        *table_html(Table("Neighbours with the same first expert, by domain", ("layer", *domains), repeated)),
        '<div class="words">',
        *table_html(Table(title, ("expert", "tokens"), words, left=2)),
        "</div>",
    ]


def _share(value: float | None) -> str:
    return NONE if value is None else f"{value:.3f}"
