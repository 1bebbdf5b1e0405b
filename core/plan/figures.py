"""The figure of a plan: the time of a step by split, and tokens per second by ranks."""

from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.figure import Figure

from ..run.figures import INK, STYLE
from .splits import Planned, best_of, stop_of

PARTS = {"products": "matrix products", "exchange": "all-to-all", "gradients": "gradients"}


def figure_of(fitting: Sequence[Planned], steps: Sequence[Planned]) -> Figure:
    """Left: each split's step, cut into its parts. Right: the best split of each number of ranks, next to the ideal."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10.5, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        _draw_splits(left, fitting)
        _draw_ladder(right, steps)
    return figure


def _draw_splits(axes: mpl.axes.Axes, fitting: Sequence[Planned]) -> None:
    best = best_of(fitting)
    names = [f"{one.split}{', best' if one is best else ''}" for one in fitting]
    ends = [0.0] * len(fitting)
    for number, (part, words) in enumerate(PARTS.items()):
        widths = [1000 * getattr(one.times, part) for one in fitting]
        axes.barh(names, widths, left=ends, color=f"C{number}", label=words)
        ends = [end + width for end, width in zip(ends, widths, strict=True)]
    axes.set(title="time of a step by split, data x expert", xlabel="ms")
    axes.invert_yaxis()
    axes.legend(fontsize=8)


def _draw_ladder(axes: mpl.axes.Axes, steps: Sequence[Planned]) -> None:
    ranks = [one.split.ranks for one in steps]
    axes.plot(ranks, [one.tokens_per_second / one.times.efficiency for one in steps], "--", color=INK, label="ideal")
    axes.plot(ranks, [one.tokens_per_second for one in steps], marker="o", label="best split")
    for one in steps:
        where = (one.split.ranks, one.tokens_per_second)
        axes.annotate(str(one.split), where, (0, -11), textcoords="offset points", fontsize=6.5, ha="left")
    stop = stop_of(steps)
    if stop is not None:
        axes.axvline(ranks[stop], color="C3", linewidth=0.8, linestyle=":", label="scaling stops")
    axes.set(title="tokens per second by ranks", xlabel="ranks", xscale="log", yscale="log")
    axes.set_xticks(ranks, [str(count) for count in ranks], fontsize=8)
    axes.minorticks_off()
    axes.legend(fontsize=8)
