"""The page of an inspection: one HTML file that opens offline."""

import math
from collections.abc import Sequence
from functools import cache
from itertools import combinations
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader

from ..analysis.usage import LEAST
from ..errors import visible
from .inspection import CONTEXTS, SAMPLE, TOKENS, preferences

LARGEST = 3_000_000  # bytes of a page
SHADES = 33  # colours of a heatmap
PAIRS = 15  # of labels that one table compares
# what is shown of each expert, and of how many layers and tokens, until a page is small enough
DETAIL = ((TOKENS, CONTEXTS, 1000, SAMPLE), (6, 2, 48, SAMPLE), (5, 1, 24, 160), (4, 0, 8, 80), (3, 0, 2, 40))


class Tint(NamedTuple):
    """A cell of a heatmap: its colour, and the load over an even share."""

    shade: int
    ratio: str


def page_of(report: dict[str, Any], notes: Sequence[str]) -> str:
    """The page. notes: sentences for its head. Of a large model it shows less detail, and says so."""
    experts = max(row["experts"] for row in report["layers"])
    for tokens, contexts, layers, sample in DETAIL:
        rows = min(layers, len(report["layers"])) * experts
        if rows * (60 + 90 * tokens + 250 * contexts) > 2 * LARGEST and layers > DETAIL[-1][2]:
            continue  # far too large, by what a row takes
        left_out = _left_out(report, tokens, contexts, layers, sample)
        text = _rendered(report, [*notes, *left_out], tokens, contexts, layers, sample)
        if len(text.encode()) < LARGEST:
            break
    return text


def _left_out(report: dict[str, Any], tokens: int, contexts: int, layers: int, sample: int) -> list[str]:
    """What the page does not show, in a sentence."""
    shown = min(layers, len(report["layers"]))
    if (tokens, contexts) == (TOKENS, CONTEXTS) and shown == len(report["layers"]):
        return []
    per = f"{tokens} tokens and {contexts} contexts of each expert, {sample} tokens of each text"
    return [f"to stay small, this page shows {per}, and {shown} layers' experts; --json has all"]


def _rendered(
    report: dict[str, Any], notes: Sequence[str], tokens: int, contexts: int, layers: int, sample: int
) -> str:
    page = Environment(loader=PackageLoader("moe_engine.pretrained", ""), autoescape=True)
    page.globals |= {"show": visible, "hue": hue, "tint": tint, "broken": broken, "farthest": farthest}
    names = list(report["labels"])
    rows, short = report["layers"], short_names([row["layer"] for row in report["layers"]])
    order = [finding["layer"] for finding in report["findings"]]
    opened = next((at for at, row in enumerate(rows) if order and row["layer"] == order[0]), 0)
    ranked = {name: at for at, name in enumerate(order)}
    kept = {row["layer"] for row in sorted(rows, key=lambda row: ranked.get(row["layer"], len(rows)))[:layers]}
    shown = [
        {**one, "tokens": one["tokens"][:sample], "first": [of_layer[:sample] for of_layer in one["first"]]}
        for one in report["sample"]
    ]
    every = sorted(
        combinations(range(len(names)), 2), key=lambda pair: -max(row["divergence"][pair[0]][pair[1]] for row in rows)
    )
    pairs = every[:PAIRS]
    return page.get_template("inspection.html.jinja").render(
        report=report,
        notes=notes,
        groups=grouped(report["findings"]),
        colours=_colours(),
        names=names,
        pairs=pairs,
        further=len(every) - len(pairs),
        chances=[max(row["by_chance"][a][b] for row in rows) for a, b in pairs],
        preferred=list(preferences(report)) if pairs else [],
        short=short,
        sizes=", ".join(sorted({f"{row['experts']}, {row['top_k']}" for row in rows})),
        loads=[(short[row["layer"]], row["load"]) for row in rows],
        most=max(row["experts"] for row in rows),
        sample=shown,
        shown=sample,
        firsts=[one["first"] for one in shown],
        opened=opened,
        detailed=[row for row in rows if row["layer"] in kept],
        by_label=lambda row: [(visible(name), one["load"]) for name, one in row["labels"].items()],
        tokens=tokens,
        contexts=contexts,
        least=LEAST,
    )


def grouped(findings: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One finding of each name, the worst first, with all layers that have it."""
    groups: dict[str, dict[str, Any]] = {}
    for finding in findings:
        group = groups.setdefault(finding["name"], {**finding, "layers": []})
        group["layers"].append(finding["layer"])
    return list(groups.values())


def farthest(row: dict[str, Any]) -> float:
    """The largest divergence between two labels in a layer."""
    return max(float(bits) for of_label in row["divergence"] for bits in of_label)


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Names without the parts that all share: 3 of model.layers.3.mlp."""
    parts = [name.split(".") for name in names]
    if len({len(one) for one in parts}) > 1 or len(names) < 2:
        return {name: visible(name) for name in names}
    differing = [at for at, found in enumerate(zip(*parts, strict=True)) if len(set(found)) > 1]
    first, last = differing[0], differing[-1] + 1
    return {name: visible(".".join(one[first:last])) for name, one in zip(names, parts, strict=True)}


def hue(expert: int) -> int:
    """An angle that is far from those of neighbouring experts."""
    return round(expert * 137.508) % 360


def broken(token: str) -> str:
    """A token as it stands in a text: its line breaks break the line."""
    return visible(token).replace("\u21b5", "\u21b5\n")


@cache
def tint(share: float, experts: int) -> Tint:
    """The colour of a share: its ratio to an even one, on a logarithmic scale from 1/8 to 8."""
    ratio = share * experts
    shade = 0 if ratio <= 1 / 8 else min(round((math.log2(ratio) + 3) / 6 * (SHADES - 1)), SHADES - 1)
    return Tint(shade, f"{ratio:.1f}" if ratio >= 1 else f"{ratio:.2f}")


def _colours() -> list[tuple[str, str]]:
    """Each colour of a heatmap, and that of text on it."""
    import matplotlib as mpl

    scale, middle = mpl.colormaps["RdBu_r"], SHADES // 2
    return [
        (mpl.colors.to_hex(scale(at / (SHADES - 1))), "#fff" if abs(at - middle) > 2 / 3 * middle else "#1b1f24")
        for at in range(SHADES)
    ]
