"""Sentences and tables of ablations, for routing.html and the terminal."""

from collections.abc import Mapping
from typing import Any

from moelm.analyze.ablation.routes import REPLACEMENTS
from moelm.report.table import NO_VALUE, Table


def ablation_sentences(ablation: Mapping[str, Any]) -> list[str]:
    """What the ablations say, without the details."""
    layers = ablation["layers"]
    sentences = []
    if "effects" in ablation:
        sentences.append(_effects_sentence(ablation))
    uniform = {layer["layer"]: layer["routes"]["replaced"]["uniform"]["mean"] for layer in layers}
    most = max(uniform, key=lambda number: uniform[number])
    better = [layer["routes"]["better_than_random"]["mean"] for layer in layers]
    sentences.append(
        f"With random routes in one layer the loss changes by {min(uniform.values()):+.3f} to {uniform[most]:+.3f}, most "
        f"in layer {most}. A random route has a higher loss than a token's own in {min(better):.0%} to {max(better):.0%} "
        "of cases, by layer; 50% would mean that the route makes no difference."
    )
    half = {
        order: min(curve, key=lambda point: abs(point["experts"] - curve[-1]["experts"] / 2))
        for order, curve in ablation["removal"].items()
    }
    best = min(half, key=lambda order: half[order]["mean"])
    total = ablation["removal"]["random"][-1]["experts"]
    names = {"load": "by load", "ablation": "by their effect", "random": "at random"}
    selected = names[best] + ("" if best == "random" else " (measured on other rows)")
    others = ", ".join(f"{point['mean']:+.3f} {names[order]}" for order, point in half.items() if order != best)
    sentences.append(
        f"With {half[best]['experts']} of {total} experts in every layer the loss changes by {half[best]['mean']:+.3f} if "
        f"they are selected {selected}, compared with {others}."
    )
    return sentences


def _effects_sentence(ablation: Mapping[str, Any]) -> str:
    layers, effects = ablation["layers"], ablation["effects"]
    serving = sum(len(names) for layer in layers for names in layer["experts"]["serves"])
    agreement = [layer["experts"]["agreement"]["spearman"] for layer in layers if layer["experts"]["agreement"]]
    text = (
        "Without one expert, whose place the next best takes, the loss of a domain rises more than without as many "
        f"assignments of its other experts in {serving} of {effects['cells']:,} cases of an expert and a domain (at a "
        f"false-discovery rate of {effects['discovery_rate']:.0%})."
    )
    if not agreement:
        return text
    return (
        f"{text} The rank correlation of this difference with the share of the domain's assignments that the expert has is "
        f"{min(agreement):.2f} to {max(agreement):.2f}, by layer."
    )


def ablation_tables(ablation: Mapping[str, Any]) -> list[Table]:
    """Loss by layer with other routes and, if they were ablated, the domains that each expert serves."""
    tables = [routes_table(ablation)]
    if "effects" in ablation:
        rows = [
            (
                f"{layer['layer']}",
                f"{expert}",
                ", ".join(names),
                _most_seen(layer["routes"]["shares"], expert),
                f"{layer['experts']['mask']['loss'][expert]:.4f}",
                f"{layer['experts']['mask']['control'][expert]:.4f}",
            )
            for layer in ablation["layers"]
            for expert, names in enumerate(layer["experts"]["serves"])
            if names
        ]
        head = ("layer", "expert", "serves", "largest share of", "loss without it", "control")
        tables.append(Table("Domains that experts serve", head, tuple(rows), left=4))
    return tables


def routes_table(ablation: Mapping[str, Any], intervals: bool = True) -> Table:
    """Differences of the loss with other routes and without experts, by layer."""
    effects = "effects" in ablation
    names = list(ablation["layers"][0]["routes"]["replaced"])
    head = ["layer", *(REPLACEMENTS[name] for name in names), "own better"] + (
        ["ablated", "control", "rank r"] if effects else []
    )
    rows = []
    for layer in ablation["layers"]:
        routes = layer["routes"]
        row = [str(layer["layer"]), *(_signed(routes["replaced"][name], intervals) for name in names)]
        row.append(f"{routes['better_than_random']['mean']:.0%}")
        if effects:
            mask, agreement = layer["experts"]["mask"], layer["experts"]["agreement"]
            row += [f"{sum(mask[key]) / len(mask[key]):.4f}" for key in ("loss", "control")]
            row.append(f"{agreement['spearman']:.2f}" if agreement else NO_VALUE)
        rows.append(tuple(row))
    title = "Loss with other routes" + (" and without one expert (mean over experts)" if effects else "")
    return Table(f"{title}, minus the model's loss", tuple(head), tuple(rows))


def _signed(value: Mapping[str, Any], interval: bool) -> str:
    half = "" if value["high"] is None or not interval else f" ± {value['high'] - value['mean']:.3f}"
    return f"{value['mean']:+.3f}{half}"


def _most_seen(shares: Mapping[str, list[float]], expert: int) -> str:
    domain = max(shares, key=lambda name: shares[name][expert])
    return f"{domain} ({shares[domain][expert]:.0%})"
