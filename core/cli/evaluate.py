"""`moe-engine evaluate`: the loss of a language model on texts, and how even the load of its experts is."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .flags import flags, json_flag, model_and_texts, texts_of, wide_flag
from .output import echo, echo_json

if TYPE_CHECKING:
    from ..pretrained.trained import TextLoss

BALANCE = ("maxvio", "cv", "active", "entropy")


@click.command("evaluate", short_help="Loss and balance of a language model on texts.")
@model_and_texts
@click.option(
    "--length", type=click.IntRange(1), metavar="INTEGER", help="Tokens in a window.  [default: the run's, or 512]"
)
@flags("device")
@wide_flag
@json_flag("the report")
def evaluate(
    folder: Path,
    more: tuple[Path, ...],
    texts: tuple[Path, ...],
    length: int | None,
    device: str | None,
    wide: bool,
    as_json: bool,
) -> None:
    """Measure the loss and perplexity of a language model on texts, and how even
    the load of its experts is.

    \b
    Compare a run with the model that it began with:
        moe-engine evaluate models/olmoe --text prose.txt code.py
        moe-engine evaluate runs/A --text prose.txt code.py

    RUN is a run of task causal_lm, finished or running, by its newest intact
    checkpoint; FOLDER is a causal language model of transformers, as safetensors
    or GGUF. Neither is changed. The loss is the mean over all tokens but the
    first, in windows that do not overlap; perplexity is exp of it.

    \b
    maxvio   the busiest expert's load above the mean, 1 if it has twice that
    cv       standard deviation of the loads, as a share of their mean
    active   experts with at least a tenth of the mean load
    """
    from ..contract.stats import plain
    from ..pretrained.trained import open_trained, text_losses
    from ..run.device import find_device

    files = texts_of(texts, more)
    trained = open_trained(
        folder, find_device(device or "auto"), lambda remark: echo(f"moe-engine: {remark}", err=True)
    )
    window = trained.language.window(length or trained.length)
    losses = [*text_losses(trained, files, window)]
    layers = {
        name: {key: plain(metrics.get(key)) for key in BALANCE}
        | {"experts": len(plain(metrics.get("load")) or ()) or None}
        for name, metrics in trained.balance().items()
    }
    report = _report(losses, layers, window)
    if as_json:
        echo_json(report, 2)
    else:
        _show(report, wide)


def _report(losses: list["TextLoss"], layers: dict[str, Any], length: int) -> dict[str, Any]:
    """The texts, their mean, and the layers."""
    from ..pretrained.trained import TextLoss

    tokens = sum(one.tokens for one in losses)
    whole = TextLoss("all texts", tokens, math.fsum(one.loss * one.tokens for one in losses) / tokens)
    rows = [
        {"text": one.text, "tokens": one.tokens, "loss": one.loss, "perplexity": one.perplexity}
        for one in (*losses, whole)
    ]
    return {"length": length, **{name: rows[-1][name] for name in ("loss", "perplexity")}, "texts": rows[:-1]} | {
        "layers": [{"layer": name, **row} for name, row in layers.items()]
    }


def _show(report: dict[str, Any], wide: bool) -> None:
    from ..run.forms import heading, shown
    from .tables import print_line, table

    columns = ("text", "tokens", "loss", "perplexity")
    texts = report["texts"]
    if len(texts) > 1:
        texts = [*texts, {"text": "all texts", "tokens": sum(row["tokens"] for row in texts), **report}]
    lines = [[shown(name, row[name]) for name in columns] for row in texts]
    table([*map(heading, columns)], lines, wide=wide)
    print_line("")
    if not report["layers"]:
        print_line("the model has no experts")
        return
    heads = ("layer", "experts", *BALANCE)
    lines = [[shown(name, row[name]) for name in heads] for row in report["layers"]]
    table([*map(heading, heads)], lines, wide=wide)
