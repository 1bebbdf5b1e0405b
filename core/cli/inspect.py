"""`moe-engine inspect`: see what the experts of a checkpoint do on texts."""

from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import UsageError, listed, visible
from .figures import write_file
from .flags import check_target, flags, html_flag, json_flag, model_and_texts, quiet_flag, texts_of, wide_flag
from .output import echo, echo_json

if TYPE_CHECKING:
    from ..engine.engine import Engine
    from ..pretrained.inspecting import EngineInspector, Inspector, Passage

LENGTH = 512  # tokens of a window, unless the model takes fewer


@click.command("inspect", short_help="See what the experts of a checkpoint do on texts.")
@model_and_texts
@click.option(
    "--label", "labels", multiple=True, metavar="NAME", help="A text's domain, one per text.  [default: its file name]"
)
@click.option(
    "--tokens", type=click.IntRange(1), default=20_000, show_default=True, help="Tokens to read of each text, at most."
)
@click.option(
    "--length",
    type=click.IntRange(1),
    metavar="INTEGER",
    help=f"Tokens of a window.  [default: {LENGTH}, or what the model takes]",
)
@click.option("--batch", type=click.IntRange(1), default=4, show_default=True, help="Windows at a time.")
@flags("device")
@html_flag
@click.option("--trace", type=click.Path(path_type=Path), help="Write a trace here, for replay.")
@click.option("--counts", type=click.Path(path_type=Path), help="Write a CSV file here, for routing-stats.")
@quiet_flag
@wide_flag
@json_flag("all numbers")
def inspect(
    folder: Path,
    more: tuple[Path, ...],
    texts: tuple[Path, ...],
    labels: tuple[str, ...],
    tokens: int,
    length: int | None,
    batch: int,
    device: str | None,
    html: Path | None,
    trace: Path | None,
    counts: Path | None,
    quiet: bool,
    wide: bool,
    as_json: bool,
) -> None:
    """Run texts through a mixture of transformers, and show what its experts do:
    how even their load is, how sure the router is, how differently the texts use
    them, and which tokens each one gets.

    \b
    Look at a model on two kinds of text, and open the page:
        moe-engine inspect models/olmoe --text prose.txt code.py \\
            --html olmoe.html
    Name the domains; keep the routing, and try other routers on it:
        moe-engine inspect models/olmoe --text a.txt --label prose \\
            --text b.txt --label code --trace olmoe.routing
        moe-engine replay olmoe.routing --biases none,loss_free --by-label

    FOLDER is a causal language model in safetensors or GGUF, with its tokenizer;
    RUN is a run of task causal_lm, by its newest intact checkpoint. Nothing is
    downloaded, no code of the folder runs, and pickles are refused. Each text is
    cut into windows, which are not padded; the model decides as it does anyway,
    in the precision of its file.

    \b
    top prob  the mean of the router's largest probability
    router H  the mean entropy of its probabilities, 1 if all are equal
    margin    the mean of the K-th score minus the next
    labels    the largest Jensen-Shannon divergence of two labels, in bits
    """
    files, names = texts_of(texts, more), list(labels)
    indices, names = _labels(files, names)
    for flag, path in (("--trace", trace), ("--counts", counts)):
        check_target(flag, path)
    inspector, passages, tokenizer, about = _run(
        folder, files, indices, names, tokens, length, batch, device, trace is not None, quiet
    )

    from ..pretrained.inspection import counts_csv, report_of

    report = report_of(inspector, passages, names, tokenizer, about)
    notes = [*_limits(report, tokens)]
    if trace is not None:
        inspector.trace.write(trace)
    if counts is not None:
        write_file(counts, counts_csv(report).encode(), "--counts")
    if html is not None:
        from ..pretrained.inspection_page import page_of

        write_file(html, page_of(report, notes).encode(), "--html")
    if as_json:
        echo_json({**report, "notes": notes}, 1)
        return
    _show(report, notes, wide)
    for what, path in (("page", html), ("trace", trace), ("counts", counts)):
        if path is not None:
            echo(f"{what}: {path}")


# -- what is given -------------------------------------------------------------------------------------------


def _labels(files: Sequence[Path], given: Sequence[str]) -> tuple[list[int], list[str]]:
    """The index of each text's label, and their names."""
    if given and len(given) != len(files):
        sentence = f"{len(files)} texts have {len(given)} labels; give one --label per text, or none"
        raise UsageError(sentence, code="labels-do-not-fit")
    short = [file.name for file in files]
    each = list(given) or [str(file) if short.count(file.name) > 1 else file.name for file in files]
    names = list(dict.fromkeys(each))
    return [names.index(name) for name in each], names


# -- the run -------------------------------------------------------------------------------------------------


def _run(
    folder: Path,
    files: Sequence[Path],
    indices: Sequence[int],
    labels: Sequence[str],
    tokens: int,
    length: int | None,
    batch: int,
    device: str | None,
    record: bool,
    quiet: bool,
) -> tuple["Inspector | EngineInspector", list["Passage"], Any, dict[str, Any]]:
    from ..pretrained.inspecting import inspect as inspected
    from ..pretrained.inspecting import read_passages
    from .progress import tracked

    tokenizer, load, engine = _opened(folder, device or "auto")
    passages = read_passages(tokenizer, files, indices, tokens)
    model = load()
    window = _window(model, length)
    inspector = inspected(
        model, passages, labels, window, batch, record, lambda batches: tracked(batches, "inspecting", quiet), engine
    )
    versions = {name: metadata.version(name) for name in ("moe-engine", "transformers", "torch")}
    about = {"model": type(model).__name__, "folder": str(folder), "length": window, "versions": versions}
    return inspector, passages, tokenizer, about


def _opened(folder: Path, device: str) -> tuple[Any, Callable[[], Any], "Engine | None"]:
    """The tokenizer, what loads the model, and the engine of a run."""
    from ..pretrained.loading import load_model, load_tokenizer
    from ..run.device import find_device

    place = find_device(device)
    if (folder / "config.toml").exists():
        from ..pretrained.trained import of_run

        trained = of_run(folder, place, lambda remark: echo(f"moe-engine: {remark}", err=True))
        return trained.language.tokenizer, lambda: trained.model, trained.engine
    return load_tokenizer(folder), lambda: load_model(folder).to(place), None


def _window(model: Any, length: int | None) -> int:
    """Tokens of a window. Raises UsageError for more than the model takes."""
    config = model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None) or length or LENGTH
    if length is not None and length > longest:
        sentence = f"--length is {length}, but {type(model).__name__} takes {longest} tokens"
        raise UsageError(sentence, code="too-long-window")
    return length or min(LENGTH, longest)


# -- what is shown -------------------------------------------------------------------------------------------


def _limits(report: dict[str, Any], tokens: int) -> list[str]:
    """Sentences on what was left out."""
    cut = [text["file"] for text in report["texts"] if text["cut"]]
    notes = [f"only the first {tokens:,} tokens of {listed(cut)} were read; --tokens reads more"] if cut else []
    if report["silent"]:
        notes.append(f"no token came to {listed(report['silent'])}")
    return notes


def _show(report: dict[str, Any], notes: Sequence[str], wide: bool) -> None:
    from ..pages.blocks import grouped
    from ..pretrained.inspection_page import label_lines, layers_table
    from .tables import print_line, table

    layers = layers_table(report)
    table(layers.columns, layers.rows, wide=wide, first=("active", "verdict"))
    for finding in grouped(report["findings"]):
        where = f"{len(finding['layers'])} of {len(report['layers'])} layers, worst {finding['layers'][0]}"
        advice = f"; {finding['advice']}" if finding["advice"] else ""
        print_line(visible(f"{finding['name']}: {where}: {finding['why']}{advice}"))
    for line in label_lines(report):
        print_line(line)
    print_line(f"{report['tokens']:,} tokens in windows of {report['length']}")
    for note in notes:
        print_line(visible(note))
