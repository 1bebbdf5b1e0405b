"""A picture of results/experts.json, at docs/performance.png: python figure.py."""

import json
from pathlib import Path

from matplotlib.figure import Figure

from paired import RESULTS

SHOWN = ("products", "engine", "torch grouped_mm", "transformers grouped_mm", "ModuleList loop")
CELLS = ("256/512, E 8", "512/1024, E 8", "256/512, E 64", "512/512, E 256")
PICTURE = Path(__file__).parents[1] / "docs" / "performance.png"


def main() -> None:
    cells = json.loads((RESULTS / "experts.json").read_text(encoding="utf-8"))["cells"]
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots(1, len(CELLS), sharey=True)
    for panel, name in zip(axes, CELLS, strict=True):
        over_dense = cells[f"T 4096, {name}, K 2"]["over dense"]
        for row, candidate in enumerate(reversed(SHOWN)):
            one = over_dense[candidate]
            low, high = one["quartiles"]
            color = {"products": "0.6", "engine": "C3"}.get(candidate, "C0")
            panel.barh(row, one["ratio"], xerr=[[one["ratio"] - low], [high - one["ratio"]]], color=color)
        panel.axvline(1, color="0.3", linewidth=0.9, linestyle="--")
        panel.set_title(name, fontsize=9, loc="left")
        panel.set_yticks(range(len(SHOWN)), SHOWN[::-1])
    figure.suptitle("Forward and backward of the experts, times that of a dense MLP on as many rows", fontsize=10)
    figure.savefig(PICTURE, dpi=100)


if __name__ == "__main__":
    main()
