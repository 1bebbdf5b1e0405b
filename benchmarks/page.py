"""Enter what results/ holds into docs/performance.md, between its markers, and draw docs/performance.png."""

import json
import re
from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from paired import RESULTS

DOCS = RESULTS.parents[1] / "docs"
PAGE = DOCS / "performance.md"
SCRIPTS = ("experts", "step", "memory", "growth", "startup")
SHOWN = ("products", "engine", "torch grouped_mm", "transformers grouped_mm", "ModuleList loop")
CELLS = ("256/512, E 8", "512/1024, E 8", "256/512, E 64", "512/512, E 256")


def load(name: str) -> Any:
    """What a script wrote."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def bars() -> str:
    """A line for each bar of each script."""
    lines = ["| bar | measured | at most | |", "|---|---:|---:|---|"]
    for bar in (bar for name in SCRIPTS for bar in load(name)["bars"]):
        low, high = bar["quartiles"]
        spread = f" [{low:.2f}, {high:.2f}]" if low != high else ""
        measured = f"{bar['median']:.2f}{spread} {bar['unit']}".rstrip()
        lines.append(f"| {bar['what']} | {measured} | {bar['at_most']:.4g} | {bar['verdict']} |")
    return "\n".join(lines)


def memory() -> str:
    """MiB at the peak, of each candidate."""
    lines = ["| | MiB allocated | MiB resident |", "|---|---:|---:|"]
    found = load("memory")["found"].items()
    return "\n".join([*lines, *(f"| {name} | {one['allocated']:.0f} | {one['resident']:.0f} |" for name, one in found)])


def tables() -> Mapping[str, str]:
    """What stands between which markers."""
    cells = (RESULTS / "experts.md").read_text(encoding="utf-8").strip()
    return {"bars": bars(), "cells": cells, "memory": memory()}


def entered(page: str) -> str:
    """The page with the tables of now."""
    for name, table in tables().items():
        between = f"(<!-- {name} -->\n)(?s:.*?)(\n<!-- end -->)"
        page = re.sub(between, lambda found, table=table: f"{found[1]}\n{table}\n{found[2]}", page)  # type: ignore[misc]
    return page


def picture() -> Figure:
    """The experts of four cells beside others, over a dense MLP; lines end at the quartiles."""
    cells = load("experts")["cells"]
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for panel, name in zip(figure.subplots(1, len(CELLS), sharey=True), CELLS, strict=True):
        over_dense = cells[f"T 4096, {name}, K 2"]["over dense"]
        shown = [candidate for candidate in reversed(SHOWN) if candidate in over_dense]
        for row, candidate in enumerate(shown):
            one = over_dense[candidate]
            low, high = one["quartiles"]
            color = {"products": "0.6", "engine": "C3"}.get(candidate, "C0")
            panel.barh(row, one["median"], xerr=[[one["median"] - low], [high - one["median"]]], color=color)
        panel.axvline(1, color="0.3", linewidth=0.9, linestyle="--")
        panel.set_title(name, fontsize=9, loc="left")
        panel.set_yticks(range(len(shown)), shown)
    figure.suptitle("Forward and backward of the experts, times that of a dense MLP on as many rows", fontsize=10)
    return figure


if __name__ == "__main__":
    PAGE.write_text(entered(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    picture().savefig(DOCS / "performance.png", dpi=100)
