"""The page of a run, finished or still growing: verdict, learning, balance, layers, growth, details of each layer."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from ..contract.run import Run
from ..pages.blocks import CELLS, Block, Chart, Code, Heat, Mark, Note, Page, Section, Table, grouped, spread
from ..pages.page import html_of
from .forms import FORMATS, MEANINGS, PERCENT, Format, heading, percent, shown
from .recorded import growths, lives, series
from .sample_page import sample_section

FACTS = ("loss", "perplexity", "accuracy")
NEWEST = (*FACTS, "cv", "maxvio", "active", "dropped")
COLUMNS = ("experts", "top_k", "active", "cv", "gini", "entropy", "max_min", "maxvio", "dropped", "mutual_information")
BALANCE = ("cv", "gini", "maxvio")
SIZES = {"flops.active": "MFLOPs per token", "flops.total": "MFLOPs with all experts"}
PLUGINS = "Plugins"
MOST_LINES = 4  # layers that share one chart; more are a heatmap
MOST_SHARES = 64  # experts whose shares stand in a table


def run_page(run: Run, refresh: int | None = None) -> str:
    """The page of a run as one self-contained HTML file, which opens offline.

    run: one that has not ended is shown as far as it was recorded. refresh: seconds after which an open page asks for
    itself again.
    """
    summary = run.summary
    names = [layer["name"] for layer in by_trouble(summary)]
    page = Page(
        about=f"{run.name}: {run.config.get('run', {}).get('task', '')}, {run.typed}",
        verdict=summary.get("verdict") or ("no verdict" if "loss" in summary else newest(run)),
        severity=_severity(summary),
        findings=[{**one, "where": _where(run, one, len(names))} for one in grouped(summary.get("findings", []))],
        facts=[*_facts(summary)],
        sections=[section for section in _sections(run, names) if section.blocks],
        footer=_footer(summary),
        refresh=refresh,
    )
    return html_of(page)


def by_trouble(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The layers of a summary, those with the worst findings first, then those with the largest cv of the load."""
    worst: dict[str, int] = {}
    for finding in summary.get("findings", []):
        worst[finding["layer"]] = max(worst.get(finding["layer"], 0), finding["severity"])
    return sorted(summary["layers"], key=lambda layer: (-worst.get(layer["name"], 0), -(layer.get("cv") or 0)))


def newest(run: Run) -> str:
    """How far a run is that has not ended."""
    step = max((record["step"] for record in run.records), default=0)
    epoch = max((record.get("epoch", 1) for record in run.records), default=1)
    return f"step {step}, epoch {epoch} of {run.config.get('run', {}).get('epochs', '?')}"


def _newest_numbers(run: Run) -> Iterator[Block]:
    """The newest record of each split; metrics of layers are averaged over the layers."""
    rows = []
    for split, word in (("train", "training"), ("eval", "test")):
        if any(record["split"] == split for record in run.records):
            last = {name: series(run, split, name) for name in NEWEST}
            step = max(steps[-1] for steps, _ in last.values() if steps)
            rows.append(
                [word, str(step), *(shown(name, line[-1] if line else None) for name, (_, line) in last.items())]
            )
    yield Table(("newest", "step", *map(heading, NEWEST)), rows) if rows else Note("Nothing has been recorded yet.")


def _severity(summary: Mapping[str, Any]) -> int | None:
    judged = [finding["severity"] for finding in summary.get("findings", []) if finding["metric"] == "verdict"]
    return max(judged) if summary.get("verdict") and judged else None


def verdicts_of(run: Run) -> dict[str, str]:
    """The verdict on each layer, on the test set."""
    return {one["layer"]: one["name"] for one in run.summary.get("findings", []) if one["metric"] == "verdict"}


def _since(run: Run, finding: Mapping[str, Any]) -> str:
    """From which step on training had the verdict of a finding's first layer, if it still had it at its end."""
    if finding["metric"] != "verdict":
        return ""
    found = None
    for record in run.records:
        verdict = record["layers"].get(finding["layer"], {}).get("verdict") if record["split"] == "train" else None
        if verdict:
            found = (found or record["step"]) if verdict["name"] == finding["name"] else None
    return "" if found is None or not finding["severity"] else f"in training since step {found}"


def _where(run: Run, finding: Mapping[str, Any], layers: int) -> str:
    """The layers that a finding is about, where there are several, and since when."""
    first, *others = finding["layers"]
    named = f"{first} and {len(others)} more layers" if others else str(first)
    return "; ".join(filter(None, (named if layers > 1 else "", _since(run, finding))))


def _facts(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name in reversed(FACTS):  # the quality first
        if summary.get(name) is not None:
            yield percent(summary[name]) if name == "accuracy" else shown(name, summary[name]), f"test {name}"
    for name, value in summary.get("measures", {}).items():
        yield shown(name, value), f"test {heading(name)}"
    for name, value in summary.get("sizes", {}).items():
        yield shown(name, float(value)), SIZES.get(name, heading(name))
    if "steps" in summary:
        yield f"{summary['steps']:,}", "steps"
        yield f"{summary['seconds']:.0f} s", f"in all, on {summary['device']}"
    yield from _speed(summary.get("speed", {}))


def _speed(speed: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if "step_seconds" in speed:
        yield f"{shown('step_seconds', speed['step_seconds'])} ms", "a training step"
    for name, word in (("trained_per_second", "trained"), ("tested_per_second", "tested")):
        if name in speed:
            yield f"{speed[name]:,.0f}", f"{speed['unit']}/s {word}"


def _sections(run: Run, names: Sequence[str]) -> Iterator[Section]:
    if "loss" not in run.summary:
        yield Section("Newest numbers", [*_newest_numbers(run)])
    yield Section("Learning", [*_learning(run)], "Drag over a chart to zoom, double-click to go back.")
    yield Section("Balance", [*_balance(run, names)])
    yield Section("Losses and biases", [*_terms(run)], TERMS)
    note = f"{'The worst first. ' if len(names) > 1 else ''}Point at a title for its meaning."
    yield Section("Layers on the test set", [*_layers(run, names)], note)
    yield sample_section(run, names)
    yield Section("Growth", [*_growth(run)], GROWTH)
    verdicts = verdicts_of(run)
    for name in names:
        title = f"Layer {name}: {verdicts[name]}" if name in verdicts and len(names) > 1 else f"Layer {name}"
        yield Section(title, [*_details(run, name, len(names) == 1)], folded=len(names) > 1)
    if plugins := run.plugins:
        yield Section(PLUGINS, [*_plugins(plugins)], "In their own words, metrics with their formulas.", folded=True)
    config = run.folder / "config.toml"
    if config.is_file():
        yield Section("Configuration", [Code(config.read_text("utf-8"))], CONFIGURATION, folded=True)


GROWTH = (
    "Change: |y' - y| / |y| of the layer's output on the held-out batch. Loss: the task's on that batch, before and "
    "after. The parent of a new expert is given by its index before the growth."
)
CONFIGURATION = "Save this as config.toml; moe-engine run --config config.toml repeats the run."


def marks(run: Run, layer: str | None = None) -> list[Mark]:
    """Growths, removals and changes of a layer's verdict, or the growths of all layers, and what caused them."""
    found = []
    for one in growths(run, layer):
        where = "" if layer else f"{one['layer']}: "
        found.append(Mark(one["step"], f"{where}{one['before']} to {one['after']} experts ({one['why']})"))
    return found + ([*_verdicts(run, layer)] if layer else [])


def _verdicts(run: Run, layer: str) -> Iterator[Mark]:
    """The changes of a layer's verdict in training."""
    before = None
    for record in run.records:
        verdict = record["layers"].get(layer, {}).get("verdict") if record["split"] == "train" else None
        if verdict and before and verdict["name"] != before:
            yield Mark(record["step"], f"{before} became {verdict['name']}: {verdict['why']}")
        before = verdict["name"] if verdict else before


def both(run: Run, name: str) -> dict[str, tuple[Sequence[float], Sequence[float | None]]]:
    """A metric in training and on the test set, in its unit."""
    form = FORMATS.get(name, Format(name))
    lines = {word: series(run, split, name) for split, word in (("train", "training"), ("eval", "test"))}
    return {
        word: (steps, [form.factor * value for value in values]) for word, (steps, values) in lines.items() if steps
    }


def _chart(title: str, lines: Any, **options: Any) -> Iterator[Chart]:
    if any(steps for steps, _ in lines.values()):
        yield Chart(title, lines, **options)


def _learning(run: Run) -> Iterator[Block]:
    for name in (*FACTS, "learning_rate"):
        form, lines = FORMATS.get(name, Format(name)), both(run, name)
        if name != "learning_rate" or len(set(chain(*(values for _, values in lines.values())))) > 1:  # not a constant
            yield from _chart(form.title, lines, decimals=form.digits, marks=marks(run))
    measures: dict[str, list[str]] = {}  # by unit
    for name in run.summary.get("measures", {}):
        measures.setdefault("%" if FORMATS.get(name, Format(name)).factor == PERCENT else "", []).append(name)
    for unit, names in measures.items():
        lines = {heading(name): both(run, name).get("test", ((), ())) for name in names}
        yield from _chart(f"other measures on the test set{unit and f', {unit}'}", lines, decimals=2, marks=marks(run))


def _terms(run: Run) -> Iterator[Block]:
    """What the auxiliary losses are, and what each loss and bias does."""
    known = sorted({name for record in run.records for layer in record["layers"].values() for name in layer})
    losses = {name.removeprefix("loss."): series(run, "train", name) for name in known if name.startswith("loss.")}
    yield from _chart("auxiliary losses, before their weights", losses, decimals=4, marks=marks(run))
    effects = {name.removeprefix("effect."): series(run, "train", name) for name in known if name[:7] == "effect."}
    yield from _chart("effect on the router", effects, logarithmic=True, decimals=4, marks=marks(run))


TERMS = (
    "Means over the layers. The effect of a loss is the norm of its weighted gradient at the router's logits, over the "
    "task's; that of a bias the share of choices that differ without it. Zeros are left out of the logarithmic axis."
)


def _balance(run: Run, names: Sequence[str]) -> Iterator[Block]:
    if len(names) == 1:
        yield from _layer_balance(run, names[0])
    else:
        if frames := _loads(run, names):
            yield Heat("load of each expert in training, over an even share", names, frames)
        yield from _of_layers(run, names, "cv", "cv of the load in training (0 = even)")
    yield from _of_layers(run, names, "active", "active experts", stairs=True, decimals=0)


def _of_layers(run: Run, names: Sequence[str], metric: str, title: str, **options: Any) -> Iterator[Block]:
    """A metric of each layer in training: a line each, or rows of a heatmap where lines would tangle."""
    lines = {name: series(run, "train", metric, name) for name in names}
    if len(names) <= MOST_LINES:
        yield from _chart(title, lines, zero=True, marks=marks(run), **options)
    elif steps := sorted({step for of_layer, _ in lines.values() for step in of_layer}):
        rows = [[dict(zip(*line, strict=True)).get(step) for step in steps] for line in lines.values()]
        columns = [str(step) for step in steps]
        yield Heat(title, names, [("", rows)], columns, column="step", even=False)


def _layer_balance(run: Run, name: str) -> Iterator[Block]:
    yield from usage(run, name)
    lines = {metric: series(run, "train", metric, name) for metric in BALANCE}
    yield from _chart("balance in training (0 = even)", lines, zero=True, marks=marks(run, name))
    yield from classes(run, name)


def _loads(run: Run, names: Sequence[str]) -> list[tuple[str, list[list[float]]]]:
    """(step, each layer's loads over an even share) at each log point that has them."""
    frames = []
    for record in run.records:
        loads = [record["layers"].get(name, {}).get("load") for name in names]
        if record["split"] == "train" and all(loads):
            rows = [[(share or 0.0) * len(load) for share in load] for load in loads]
            frames.append((f"step {record['step']}", rows))
    return frames


def _layers(run: Run, names: Sequence[str]) -> Iterator[Block]:
    known = {layer["name"]: layer for layer in run.summary["layers"]}
    columns = [name for name in COLUMNS if any(layer.get(name) is not None for layer in known.values())]
    verdicts, told = verdicts_of(run), {heading(column): MEANINGS[column] for column in columns if column in MEANINGS}
    if "active" in columns:
        rows = [
            [name, verdicts.get(name, "-"), *(shown(column, known[name].get(column)) for column in columns)]
            for name in names
        ]
        yield Table(("layer", "verdict", *map(heading, columns)), rows, (0, 1), told=told)


def _growth(run: Run) -> Iterator[Block]:
    rows = []
    for one in growths(run):
        parents = dict(zip((at for at, row in enumerate(one["rows"]) if row is None), one["parents"], strict=False))
        inherits = one["initializer"] != "random"  # whose experts have nothing of their parent
        added = [f"{at} ({'-' if parent is None or not inherits else parent})" for at, parent in parents.items()]
        change = "-" if one["change"] is None else percent(one["change"])
        loss = f"{shown('loss', one['loss_before'])} to {shown('loss', one['loss_after'])}"
        sizes = f"{one['before']} to {one['after']}"
        dropped = ", ".join(map(str, one["drop"])) or "-"
        start = one["initializer"] or "-"
        rows.append([str(one["step"]), one["layer"], sizes, ", ".join(added) or "-", dropped, start, change, loss])
        rows[-1].append(one["why"])
    if rows:
        columns = ("step", "layer", "experts", "added (parent)", "removed", "initializer", "change", "loss", "why")
        yield Table(columns, rows, (1, 2, 3, 4, 5, 8))


def _details(run: Run, name: str, alone: bool) -> Iterator[Block | Section]:
    """What else is known of a layer. alone: its balance is shown above."""
    if not alone:
        yield from _layer_balance(run, name)
    summary = next(layer for layer in run.summary["layers"] if layer["name"] == name)
    load = summary.get("load") or []
    if 0 < len(load) <= MOST_SHARES:
        shares = [[str(at), percent(share), f"{share * len(load):.2f}"] for at, share in enumerate(load)]
        table = Table(("expert", "share of the load", "over an even share"), shares)
        yield Section("Shares on the test set", [table], folded=True)
    others = [key for key in sorted(summary) if key not in ("name", "load", *COLUMNS)]
    if others:
        rows = [[heading(key), shown(key, summary[key])] for key in others]
        table = Table(("metric", "value"), rows)
        yield Section(
            "Other metrics on the test set", [table], f"What each means is told below, under {PLUGINS}.", folded=True
        )


def usage(run: Run, name: str) -> Iterator[Heat]:
    """Each expert's load over training; experts in the order of their creation. Of many layers, some of the steps."""
    loads, born, dead = lives(run, name)
    if loads:
        experts = 1 + max([expert for _, load in loads for expert in load] + [*born, *dead])
        loads = spread(loads, CELLS // (experts * len(run.summary["layers"])))
        rows = [
            [load[expert] * len(load) if expert in load else None for _, load in loads] for expert in range(experts)
        ]
        columns = [str(step) for step, _ in loads]
        order = ", in the order of their creation" if born or dead else ""
        title = f"load of each expert over training, over an even share{order}"
        yield Heat(title, [str(expert) for expert in range(experts)], [("", rows)], columns, "expert", "step")


def classes(run: Run, name: str) -> Iterator[Heat]:
    """Each expert's share of each class's assignments, on the test set."""
    tables = series(run, "eval", "class_expert", name)[1]
    if tables:
        rows = [[count / (sum(counts) or 1) for count in counts] for counts in tables[-1]]
        title, names = "share of a class's assignments, test set", [str(at) for at in range(len(rows))]
        yield Heat(title, names, [("", rows)], row="class", even=False)


def _plugins(plugins: Sequence[Mapping[str, str]]) -> Iterator[Section]:
    for plugin in plugins:
        paragraphs = [Note(words) for words in plugin.get("about", "").split("\n\n") if words]
        home = f"{plugin['distribution']} {plugin['version']}"
        yield Section(plugin["name"], paragraphs, f"{plugin['kind']}, {home}" if "kind" in plugin else home)


def _footer(summary: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in summary.get("versions", {}).items())
    return f"{versions}; seed {summary['seed']}" if versions else ""
