"""A run as far as it is on the disk: its records so far, and a page of them. Nothing is written, and no lock taken."""

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..contract.run import Run
from ..errors import UsageError
from ..files import MOST_TOML, read_file, read_toml
from .folder import is_config
from .forms import heading, shown

QUANTITIES = ("loss", "accuracy", "perplexity", "cv", "maxvio", "active", "dropped")
REFRESH = 5  # seconds after which an open page asks again


def records_of(content: bytes) -> list[dict[str, Any]]:
    """The records in metrics.jsonl while a run may be writing it: its whole lines, but for those that are damaged."""
    found = []
    for line in content.split(b"\n")[:-1]:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        layers = record.get("layers") if isinstance(record, dict) else None
        whole = isinstance(layers, dict) and all(isinstance(metrics, dict) for metrics in layers.values())
        if whole and "split" in record and isinstance(record.get("step"), int):
            found.append(record)
    return found


def read_live(folder: Path) -> Run:
    """A run that may not have ended. Its summary has the layers that were recorded. Raises UsageError."""
    try:
        config = read_toml(read_file(folder / "config.toml", MOST_TOML))
        content = read_file(folder / "metrics.jsonl")
    except FileNotFoundError as error:
        raise UsageError(f"{folder} does not hold a run; name a run's folder", code="unknown-run") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{folder} can't be read: {error}", code="unreadable-file") from error
    if not is_config(config):
        raise UsageError(f"run folder {folder} is damaged: config.toml has no [run]", code="damaged-run")
    records = records_of(content)
    sizes = {
        name: len(metrics["load"])
        for record in records
        for name, metrics in record["layers"].items()
        if isinstance(metrics.get("load"), list)
    }
    layers = [{"name": name, "experts": experts} for name, experts in sizes.items()]
    return Run(folder, {"layers": layers}, records, config)


def page_of(run: Run) -> str:
    """One page about a run so far: its newest numbers, growth, and every figure. It asks for itself again."""
    from .report_inputs import run_figures

    options = run.config.get("run", {})
    newest = {record["split"]: record for record in run.records}
    figures = run_figures(run) if run.records else {}
    pictures = (
        f'<figure><figcaption>{html.escape(name)}</figcaption><img alt="{html.escape(name)}" '
        f'src="data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"></figure>'
        for name, svg in figures.items()
    )
    rows = [row for split in ("train", "eval") if split in newest for row in [_row(split, newest[split])]]
    step = max((record["step"] for record in run.records), default=0)
    epoch = max((record.get("epoch", 1) for record in run.records), default=1)
    title = html.escape(f"{run.name}: step {step}, epoch {epoch} of {options.get('epochs', '?')}")
    plugins = html.escape(f"{options.get('task', '')}: {run.typed}")
    heads = "".join(f"<th>{html.escape(head)}</th>" for head in ("newest", "step", *map(heading, QUANTITIES)))
    grown = sum(record["split"] == "growth" for record in run.records)
    return PAGE.format(
        refresh=REFRESH,
        title=title,
        plugins=plugins,
        table=f"<table><tr>{heads}</tr>{''.join(rows)}</table>" if rows else "<p>Nothing has been recorded yet.</p>",
        growth=f"<p>Growths so far: {grown}.</p>" if grown else "",
        figures="".join(pictures),
    )


def _row(split: str, record: dict[str, Any]) -> str:
    """A table row of one record; metrics of layers are averaged over the layers."""
    cells = ["test" if split == "eval" else split, str(record["step"])]
    for name in QUANTITIES:
        values = [layer[name] for layer in record["layers"].values() if layer.get(name) is not None]
        value = record.get(name, _mean(values))
        cells.append(shown(name, value))
    return f"<tr>{''.join(f'<td>{html.escape(text)}</td>' for text in cells)}</tr>"


def _mean(values: Sequence[float]) -> float | None:
    return float(sum(values) / len(values)) if values else None


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="refresh" content="{refresh}"><title>{title}</title>
<style>:root {{ color-scheme: light dark; }} body {{ font: 16px/1.5 system-ui, sans-serif; margin: 1rem; }}
table {{ border-collapse: collapse; }} th, td {{ text-align: right; padding: .2rem .7rem; }}
main {{ display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); }}
figure {{ margin: 0; }} img {{ width: 100%; }}</style></head>
<body><h1>{title}</h1><p>{plugins}</p>{table}{growth}<main>{figures}</main></body></html>
"""
