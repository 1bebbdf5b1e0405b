"""`moe-engine study`: a whole study with one command, its results beside what was published."""

import json
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from ..errors import RunError, UsageError
from ..files import write_atomically
from .flags import flag


@click.command()
@click.argument("name", required=False)
@click.option(
    "--seeds", type=click.IntRange(1, 1000), help="Runs of each variant, with seeds 0, 1, ...  [default: the study's]"
)
@click.option("--jobs", type=click.IntRange(1), help="Runs at a time, of one thread each.  [default: one a core]")
@click.option(
    "--quick", is_flag=True, help="A short form on generated data, to see that everything works; no bar is judged."
)
@click.option(
    "--backend",
    type=click.Choice(["loky", "dask"]),
    default="loky",
    help="joblib's; dask: a local cluster, or DASK_SCHEDULER_ADDRESS's.",
)
@flag("device")
@flag("data_dir", metavar="FOLDER")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the result.  [default: results/NAME]")
@click.option("--check", is_flag=True, help="Run nothing: judge the results that are there; exit 1 if a bar is missed.")
@click.option("--json", "as_json", is_flag=True, help="Print study.json on standard output, and nothing else there.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
def study(
    name: str | None,
    seeds: int | None,
    jobs: int | None,
    quick: bool,
    backend: str,
    out: Path | None,
    check: bool,
    as_json: bool,
    quiet: bool,
    **flags: Any,
) -> int:
    """Run a study: variants times seeds, what was published beside them, and what is expected of them.

    \b
    See which studies there are:
        moe-engine study
    Run one; where it was stopped, the same command goes on:
        moe-engine study growth --data-dir data
    See in a minute that it would run:
        moe-engine study growth --quick
    Judge the results again that are in a folder, without a run:
        moe-engine study growth --check --out docs/results/growth
    A study of your own:
        moe-engine study mine.toml

    A study is a TOML file; docs/studies.md describes it. The folder gets study.json, study.md, study.html and the
    pictures; cells/ holds each finished run's numbers, and what is in it is not run again. A run that fails is
    named in the end and stops no other. Bars that are missed are shown; only --check makes them an exit code.
    """
    if name is None:
        return _list()
    from ..study.reading import read_study

    if quick and check:
        raise UsageError("--quick judges no bar, so there is nothing to --check; leave one away")
    chosen = read_study(name)
    chosen = chosen.shortened() if quick else chosen
    folder = out or Path("results") / (f"{chosen.name}-quick" if quick else chosen.name)
    if check:
        results = _stored(folder, chosen)
    else:
        given = {key: value for key, value in flags.items() if value is not None}
        results = _run(chosen, given, folder, seeds, jobs, backend, quiet)
    if as_json:
        click.echo(_text(results))
    else:
        _print(results, folder, check)
    _fail(results, check)
    return 0


def _fail(results: Mapping[str, Any], check: bool) -> None:
    """Raise RunError for a run that is missing or, where bars are judged again, for one that is not held."""
    from ..study.tables import remarks

    if missing := remarks(results):
        raise RunError(f"{len(missing)} of {len(results['rows'])} variants lack a run; {missing[0]}")
    failed = [criterion["claim"] for criterion in results["criteria"] if criterion["verdict"] != "passed"]
    if check and failed:
        message = f"{len(failed)} of {len(results['criteria'])} criteria failed, the first: {failed[0]}"
        raise RunError(message, code="criteria-failed")


def _list() -> int:
    from ..study.reading import read_study, shipped
    from .progress import table

    studies = [read_study(name) for name in shipped()]
    table(["study", "question", "runs"], [[one.name, one.question, str(_count(one))] for one in studies])
    click.echo("moe-engine study NAME runs one; --quick in a minute")
    return 0


def _count(study: Any) -> int:
    """How many runs; parts may share some."""
    variants = [variant for _, _, variant in study.variants({})]
    return len(
        {(str((v.plugins, v.settings, v.flags)), seed) for v in variants for seed in v.seeds or range(study.seeds)}
    )


def _run(
    study: Any, flags: Mapping[str, Any], folder: Path, seeds: int | None, jobs: int | None, backend: str, quiet: bool
) -> dict[str, Any]:
    from ..study.figures import figures_of
    from ..study.page import html_of, markdown_of
    from ..study.results import run_study
    from .progress import Cells

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs would not be interrupted
    with _cluster(backend, jobs), Cells(quiet) as cells:
        results, records = run_study(study, flags, folder, seeds, jobs, cells.show, backend)
    figures = figures_of(study, results, records)
    for file, content in figures.items():
        write_atomically(folder / file, content)
    write_atomically(folder / "study.json", (_text(results) + "\n").encode())
    write_atomically(folder / "study.md", markdown_of(results, figures).encode())
    write_atomically(folder / "study.html", html_of(results, figures).encode())
    return results


@contextmanager
def _cluster(backend: str, jobs: int | None) -> Iterator[None]:
    """A dask client, of a cluster of this machine's cores unless the environment names a scheduler."""
    if backend != "dask":
        yield
        return
    try:
        from distributed import Client, LocalCluster
    except ImportError as error:
        raise UsageError("--backend dask needs dask: pip install 'moe-engine[dask]'") from error
    import os

    import joblib

    address = os.environ.get("DASK_SCHEDULER_ADDRESS")
    if address:
        with Client(address):  # type: ignore[no-untyped-call]
            yield
        return
    with (
        LocalCluster(n_workers=jobs or joblib.cpu_count(), threads_per_worker=1, dashboard_address=None) as cluster,  # type: ignore[no-untyped-call]
        Client(cluster),  # type: ignore[no-untyped-call]
    ):
        yield


def _stored(folder: Path, study: Any) -> dict[str, Any]:
    """The results in a folder, judged by the study's bars of today."""
    from ..study.results import judged

    file = folder / "study.json"
    try:
        stored = json.loads(file.read_text("utf-8"))
        return judged(study, stored)
    except OSError as error:
        raise UsageError(
            f"{file} can't be read: {error.strerror}; run the study first, or name its folder with --out"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{file} is damaged ({error}); run the study again") from error


def _text(results: Mapping[str, Any]) -> str:
    return json.dumps(results, indent=1, allow_nan=False, ensure_ascii=False)


def _print(results: Mapping[str, Any], folder: Path, check: bool) -> None:
    from ..study.tables import criteria_table, legend_of, remarks, tables_of
    from .progress import table

    click.echo(f"{results['title']}: {results['question']}")
    for title, columns, lines in () if check else tables_of(results):
        click.echo(f"\n{title}")
        table(columns, lines)
    if results["criteria"]:
        table(*criteria_table(results))
    for line in (*remarks(results), *(() if check else (legend_of(results), f"page: {folder / 'study.html'}"))):
        click.echo(line)
