"""Write results/ into docs/performance.md, between its markers, and draw docs/performance.png."""

import json
import re
from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from paired import RESULTS

DOCS = RESULTS.parents[1] / "docs"
PAGE = DOCS / "performance.md"
SCRIPTS = ("experts", "step", "memory", "growth", "startup")
SHOWN = ("matmuls", "engine", "torch grouped_mm", "transformers grouped_mm", "ModuleList loop")
CELLS = ("256/512, E 8", "512/1024, E 8", "256/512, E 64", "512/512, E 256")


def results_of(name: str) -> Any:
    """The results that a script wrote."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def criteria() -> str:
    """A line for each criterion of each script."""
    lines = ["| claim | measured | at most | verdict |", "|---|---:|---:|---|"]
    for criterion in (criterion for name in SCRIPTS for criterion in results_of(name)["criteria"]):
        low, high = criterion["quartiles"]
        spread = f" [{low:.2f}, {high:.2f}]" if low != high else ""
        measured = f"{criterion['median']:.2f}{spread} {criterion['unit']}".rstrip()
        lines.append(f"| {criterion['claim']} | {measured} | {criterion['at_most']:.4g} | {criterion['verdict']} |")
    return "\n".join(lines)


def memory() -> str:
    """Peak MiB of each candidate."""
    lines = ["| | MiB allocated | MiB resident |", "|---|---:|---:|"]
    peaks = results_of("memory")["peaks"].items()
    return "\n".join([*lines, *(f"| {name} | {mib['allocated']:.0f} | {mib['resident']:.0f} |" for name, mib in peaks)])


def tables() -> Mapping[str, str]:
    """Each table by the name of its marker."""
    cells = (RESULTS / "experts.md").read_text(encoding="utf-8").strip()
    return {"criteria": criteria(), "cells": cells, "memory": memory()}


def with_tables(page: str) -> str:
    """The page with the current tables."""
    for name, table in tables().items():
        between = f"(<!-- {name} -->\n)(?s:.*?)(\n<!-- end -->)"
        page = re.sub(between, lambda found, table=table: f"{found[1]}\n{table}\n{found[2]}", page)  # type: ignore[misc]
    return page


def figure_of_cells() -> Figure:
    """The experts in four cells next to others, relative to a dense MLP; lines end at the quartiles."""
    cells = results_of("experts")["cells"]
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for panel, name in zip(figure.subplots(1, len(CELLS), sharey=True), CELLS, strict=True):
        over_dense = cells[f"T 4096, {name}, K 2"]["over dense"]
        shown = [candidate for candidate in reversed(SHOWN) if candidate in over_dense]
        for row, candidate in enumerate(shown):
            measured = over_dense[candidate]
            low, high = measured["quartiles"]
            color = {"matmuls": "0.6", "engine": "C3"}.get(candidate, "C0")
            median = measured["median"]
            panel.barh(row, median, xerr=[[median - low], [high - median]], color=color)
        panel.axvline(1, color="0.3", linewidth=0.9, linestyle="--")
        panel.set_title(name, fontsize=9, loc="left")
        panel.set_yticks(range(len(shown)), shown)
    figure.suptitle("Forward and backward of the experts, relative to a dense MLP on as many rows", fontsize=10)
    return figure


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    figure_of_cells().savefig(DOCS / "performance.png", dpi=100)
