"""Figures of runs, drawn with matplotlib: curves, usage over time, class by expert, effects."""

import io
import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.text import Text

from ..errors import visible
from .forms import FORMATS, Format
from .recorded import growths, lives, series

if TYPE_CHECKING:
    from ..contract.run import Run

INK = "#6b7280"  # readable on white and on near-black
STYLE: Any = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.titlesize": "medium",
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "moe-engine",
    "font.size": 10,
}
HEAT = "viridis"


_last: list[tuple["weakref.ref[Run]", dict[str, Figure]]] = []  # the run drawn last, for its next report


def of_run(run: "Run") -> dict[str, Figure]:
    """Every figure of a run by name; made once for all reports of a run."""
    if not (_last and _last[0][0]() is run):
        _last[:] = [(weakref.ref(run), _made(run))]
    return _last[0][1]


def _made(run: "Run") -> dict[str, Figure]:
    """Every figure of a run by name, not drawn yet."""
    figures = {"loss": curves([run], ["loss"]), "accuracy": curves([run], ["accuracy"])}
    for layer in run.summary["layers"]:
        name = layer["name"]
        figures[f"balance {name}"] = balance(run, name)
        figures[f"usage {name}"] = usage(run, name)
        figures[f"classes {name}"] = classes(run, name)
        figures[f"effects {name}"] = effects(run, name)
    return {name: figure for name, figure in figures.items() if figure is not None}


def overlaid(runs: Sequence["Run"]) -> Figure:
    """The test curves of several runs, one colour per run."""
    figure = curves(runs, ["loss", "accuracy", "cv", "maxvio"])
    assert figure is not None  # every run has a loss
    return figure


QUALITIES = {
    "accuracy": ("test accuracy, % (higher is better)", 100),
    "perplexity": ("test perplexity (lower is better)", 1),
    "loss": ("test loss (lower is better)", 1),
}
COSTS = {"cv": ("cv of the load (0 = even)", 1), "step_ratio": ("time of a training step (dense = 1)", 1)}


def compared(comparison: Mapping[str, Any]) -> Figure:
    """Quality, cv and step time of a comparison, one line per variant: each seed, the mean and its 95 % interval."""
    rows = [row for row in comparison["rows"] if row["numbers"]]
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    panels = {comparison["quality"]: QUALITIES[comparison["quality"]], **COSTS}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10.5, 1.5 + 0.3 * len(rows)), layout="constrained")
        first, *others = figure.subplots(1, len(panels), sharey=True)
        for axes, (name, (title, factor)) in zip((first, *others), panels.items(), strict=True):
            axes.set_title(title, fontsize=9.5)
            for height, row in enumerate(rows):
                color = INK if row["kind"] == "dense" else f"C{kinds.index(row['kind']) - 1}"
                _interval(axes, row["numbers"].get(name), factor, height, color, row["kind"] == "dense")
        first.set_yticks(range(len(rows)), [_titled(row, kinds) for row in rows])
        first.set_ylim(len(rows) - 0.4, -0.6)
        if comparison["quality"] == "accuracy":
            first.set_xlim(right=min(first.get_xlim()[1], 100))
        for axes in others:
            axes.set_xlim(left=-0.02 * axes.get_xlim()[1])
        seeds = len(comparison["seeds"])
        figure.suptitle(
            f"{comparison['title']}: mean{' and 95 % interval' if seeds > 1 else ''} of {seeds} seeds", fontsize=11
        )
    return figure


def _titled(row: Mapping[str, Any], kinds: Sequence[str]) -> str:
    """A row's name; with its kind, if plugins of several kinds are compared."""
    with_kind = len({*kinds} - {"dense", "base"}) > 1 and row["kind"] not in ("dense", "base")
    return f"{row['variant']} ({row['kind']})" if with_kind else row["variant"]


def _interval(axes: Any, number: Mapping[str, Any] | None, factor: float, height: int, color: str, line: bool) -> None:
    if number is None:
        return
    mean, half = factor * number["mean"], factor * (number["half"] or 0)
    values = [value for value in number["values"] if value is not None]  # a seed may lack it
    axes.scatter([factor * value for value in values], [height] * len(values), s=12, color=color, alpha=0.45)
    axes.errorbar(mean, height, xerr=half, fmt="o", color=color, markersize=5, capsize=3)
    if line:  # the reference of the others
        axes.axvline(mean, color=color, linewidth=0.8, linestyle="--", alpha=0.6, zorder=0)


def figure_bytes(figure: Figure, kind: str) -> bytes:
    """A figure as the content of a file: svg and pdf are transparent, png is white."""
    out = io.BytesIO()
    for text in figure.findobj(Text):  # a name may hold what no font has, and what no file takes
        text.set_text("\n".join(map(visible, text.get_text().split("\n"))))
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        dated: Any = {"metadata": {"Date": None}} if kind == "svg" else {}
        figure.savefig(out, format=kind, dpi=110, facecolor="white" if kind == "png" else "none", **dated)
    figure.set_layout_engine("none")  # the layout is found; another kind of file need not find it again
    return out.getvalue()


def _mark(axes: Any, run: "Run", layer: str | None = None) -> None:
    """Draw a line at every step at which a layer grew."""
    for index, step in enumerate(sorted({growth["step"] for growth in growths(run, layer)})):
        label = "growth" if index == 0 else "_"  # matplotlib leaves labels that begin with _ out of a legend
        axes.axvline(step, color="C3", alpha=0.6, linewidth=0.8, linestyle=":", zorder=0, label=label)


def curves(runs: Sequence["Run"], names: Sequence[str]) -> Figure | None:
    """One panel per metric. One run: training and test; several: only the test set."""
    splits = (("train", "--", "training"), ("eval", "-", "test")) if len(runs) == 1 else (("eval", "-", ""),)
    panels = [name for name in names if any(series(run, split, name)[0] for run in runs for split, _, _ in splits)]
    if not panels:
        return None
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.6 * columns, 3.0 * rows), layout="constrained")
        for index, name in enumerate(panels):
            form = FORMATS.get(name, Format(name))
            axes = figure.add_subplot(rows, columns, index + 1, title=form.title, xlabel="step")
            for number, run in enumerate(runs):
                for split, dash, word in splits:
                    # a "$" in a name does not begin a formula
                    label = word if len(runs) == 1 else f"{run.name}: {run.typed}".replace("$", r"\$")
                    steps, values = series(run, split, name)
                    scaled = [form.factor * value for value in values]
                    axes.plot(steps, scaled, dash, color=f"C{number}", label=label, marker="o", markersize=2.5)
            if len(runs) == 1:
                _mark(axes, runs[0])
            if index == 0:
                axes.legend()
    return figure


def balance(run: "Run", layer: str) -> Figure | None:
    """cv, maxvio and gini of one layer over training, and the active experts."""
    lines = {name: series(run, "train", name, layer) for name in ("cv", "gini", "maxvio", "active")}
    if not lines["cv"][0]:
        return None
    experts = next(summary["experts"] for summary in run.summary["layers"] if summary["name"] == layer)
    sizes = [(record["step"], len(record["layers"][layer]["load"])) for record in _with_load(run, layer)]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.6, 3.4), layout="constrained")
        axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        for name in ("cv", "gini", "maxvio"):
            axes.plot(*lines[name], label=name, marker="o", markersize=2.5)
        axes.set(title=f"balance in training (0 = even), and active experts of {experts}", ylim=(0, None))
        if growths(run, layer):
            below.step(*zip(*sizes, strict=True), where="pre", color=INK, alpha=0.5, linestyle="--", label="experts")
        below.step(*lines["active"], where="pre", color=INK)
        below.set(xlabel="step", ylabel="active", ylim=(0, max(size for _, size in sizes) * 1.1))
        for panel in (axes, below):
            _mark(panel, run, layer)
        axes.legend(ncols=4)
    return figure


def _with_load(run: "Run", layer: str) -> list[dict[str, Any]]:
    """The training records that hold the layer's load."""
    return [
        record for record in run.records if record["split"] == "train" and record["layers"].get(layer, {}).get("load")
    ]


def usage(run: "Run", layer: str) -> Figure | None:
    """A heatmap of each expert's load over training; 1 = an even share. New and removed experts are marked."""
    loads, born, dead = lives(run, layer)
    if not loads:
        return None
    experts = 1 + max([expert for _, load in loads for expert in load] + [*born, *dead])
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.6, max(2.4, 1.2 + 0.16 * experts)), layout="constrained")
        axes = figure.add_subplot(title="load of each expert in training (1 = an even share)")
        figure.colorbar(draw_usage(axes, loads, born, dead, experts))
    return figure


def draw_usage(
    axes: Any,
    loads: Sequence[tuple[int, dict[int, float]]],
    born: Mapping[int, int],
    dead: Mapping[int, int],
    experts: int,
    top: float = 0.0,
) -> Any:
    """Draw the heatmap of `usage` from what `lives` returned; returns the image. top: least end of the colours."""
    relative_ES = np.full((experts, len(loads)), np.nan)
    for at, (_, load) in enumerate(loads):
        relative_ES[list(load), at] = np.array(list(load.values())) * len(load)
    edges = np.array([0, *(step for step, _ in loads)])
    top = top or max(2.0, float(np.nanmax(relative_ES)))
    image = axes.pcolormesh(edges, np.arange(experts + 1), relative_ES, cmap=HEAT, vmin=0, vmax=top)
    for which, mark, word in ((born, ">", "born"), (dead, "X", "removed")):
        if which:
            heights = [expert + 0.5 for expert in which]
            axes.scatter(list(which.values()), heights, marker=mark, s=24, color="C3", label=word, zorder=3)
    if born or dead:
        axes.legend(loc="lower left", ncols=2)
    axes.set(xlabel="step", ylabel="expert, in order of birth" if born or dead else "expert")
    named = range(0, experts, 1 + experts // 32)  # as many as can be read
    axes.set_yticks(np.array(named) + 0.5, [str(expert) for expert in named])
    axes.invert_yaxis()
    axes.grid(False)
    return image


def shares(load_RE: Sequence[Sequence[float]], names: Sequence[str]) -> Figure:
    """A heatmap of rows of loads: each expert's load over its row's mean, on a logarithmic scale.

    Rows may have different numbers of experts.
    """
    experts = max(map(len, load_RE))
    relative_RE = np.full((len(load_RE), experts), np.nan)
    for row, load in enumerate(load_RE):
        relative_RE[row, : len(load)] = np.array(load) / max(float(np.mean(load)), 1e-300)
    tall = len(names) > 300  # more names than can be read
    with mpl.rc_context(STYLE):
        width = min(3.5 + 0.14 * experts + 0.05 * max(map(len, names)), 16)
        figure = Figure(figsize=(width, 30 if tall else 1.3 + 0.17 * len(names)), layout="constrained")
        axes = figure.add_subplot(title="share of each expert over the mean (1 = an even share)", xlabel="expert")
        scale = mpl.colors.LogNorm(1 / 8, 8)
        shown_RE = np.maximum(relative_RE, 1e-6)  # 0 has no logarithm
        image = axes.imshow(shown_RE, cmap="RdBu_r", aspect="auto", interpolation="nearest", norm=scale)
        axes.set_yticks([] if tall else range(len(names)), [] if tall else [name.replace("$", r"\$") for name in names])
        axes.tick_params(axis="y", labelsize=7)
        axes.grid(False)
        bar = figure.colorbar(image, extend="both", ticks=[1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8], fraction=0.05, aspect=30)
        bar.ax.set_yticklabels(["1/8", "1/4", "1/2", "1", "2", "4", "8"])
        bar.ax.minorticks_off()
    return figure


def classes(run: "Run", layer: str) -> Figure | None:
    """A heatmap of each expert's share of each class's assignments, on the test set."""
    tables = series(run, "eval", "class_expert", layer)[1]
    if not tables:
        return None
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.6, max(2.4, 1.2 + 0.22 * len(tables[-1]))), layout="constrained")
        axes = figure.add_subplot(title="share of a class's assignments, test set")
        figure.colorbar(draw_classes(axes, tables[-1]))
    return figure


def draw_classes(axes: Any, table: Sequence[Sequence[float]]) -> Any:
    """Draw the heatmap of `classes` from counts [classes, E]; returns the image."""
    counts_CE = np.array(table, dtype=float)
    share_CE = counts_CE / np.maximum(counts_CE.sum(1, keepdims=True), 1)
    image = axes.imshow(share_CE, cmap=HEAT, aspect="auto", vmin=0)
    experts = range(0, share_CE.shape[1], 1 + (share_CE.shape[1] - 1) // 12)  # as many as can be read side by side
    axes.set(xticks=experts, yticks=range(share_CE.shape[0]), xlabel="expert", ylabel="class")
    axes.grid(False)
    return image


def effects(run: "Run", layer: str) -> Figure | None:
    """The effect of each loss term and bias on the router over training."""
    names = sorted({name for r in run.records for name in r["layers"].get(layer, {}) if name.startswith("effect.")})
    if not names:
        return None
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.6, 3.0), layout="constrained")
        axes = figure.add_subplot(
            title="effect on the router (loss: gradient over the task's; bias: share of choices)", xlabel="step"
        )
        axes.title.set_fontsize(8.5)
        for name in names:
            steps, values = series(run, "train", name, layer)
            axes.plot(steps, np.maximum(values, 1e-9), label=name.removeprefix("effect."), marker="o", markersize=2.5)
        axes.set(yscale="log")
        _mark(axes, run, layer)
        axes.legend()
    return figure
