"""`moe-engine study`: a grid of variants and seeds, compared with published results."""

import json
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from ..errors import RunError, UsageError
from ..files import read_file, sealed, unsealed, write_atomically
from .flags import address_flag, backend_flag, flags, jobs_flag, json_flag, out_flag, quiet_flag, wide_flag
from .output import echo, echo_json


@click.command(short_help="Run a study: a grid of variants and seeds.")
@click.argument("name", required=False)
@click.option(
    "--seeds",
    type=click.IntRange(1, 1000),
    metavar="INTEGER",
    help="Runs per variant, with seeds 0, 1, ...  [default: the study's]",
)
@jobs_flag
@click.option("--quick", is_flag=True, help="Run a short form on generated data, without judging criteria.")
@backend_flag
@address_flag
@flags("device", "data_dir")
@out_flag("Result folder.", "results/NAME")
@click.option("--check", is_flag=True, help="Judge stored results and run nothing; exit 1 if a criterion fails.")
@wide_flag
@json_flag("the results")
@quiet_flag
def study(
    name: str | None,
    seeds: int | None,
    jobs: int | None,
    quick: bool,
    backend: str,
    address: str | None,
    out: Path | None,
    check: bool,
    wide: bool,
    as_json: bool,
    quiet: bool,
    **flags: Any,
) -> int:
    """Run a study: a grid of variants and seeds, compared with published
    results. Without NAME, list the studies.

    \b
    Run a study; repeat the command to continue after a stop:
        moe-engine study growth --data-dir data
    Check in a minute that it runs:
        moe-engine study growth --quick
    Judge stored results again:
        moe-engine study growth --check --out docs/results/growth
    Run your own study:
        moe-engine study mine.toml

    A study is a TOML file, described in docs/studies.md. The folder gets
    study.json, study.md, study.html and the figures; cells/ keeps the metrics
    of each finished run, which is not run again. A failed run is reported at
    the end and stops no other run. Failed criteria are shown; only --check
    turns them into exit code 1.
    """
    if name is None:
        return _list()
    from ..study.reading import read_study

    if quick and check:
        sentence = "--quick judges no criteria, so there is nothing to --check; remove one of them"
        raise UsageError(sentence, code="quick-and-check")
    chosen = read_study(name)
    chosen = chosen.shortened() if quick else chosen
    folder = out or Path("results") / (f"{chosen.name}-quick" if quick else chosen.name)
    if check:
        results = _stored(folder, chosen)
        _write_page(folder, results, _drawn(folder, chosen, results))
    else:
        given = {key: value for key, value in flags.items() if value is not None}
        results = _run(chosen, given, folder, seeds, jobs, (backend, address), quiet)
    if as_json:
        echo_json(results, 1)
    else:
        _print(results, folder, check, wide)
    _fail(results, check)
    return 0


def _fail(results: Mapping[str, Any], check: bool) -> None:
    """Raise RunError for a missing run or, with --check, for a failed criterion."""
    from ..study.tables import remarks

    if missing := remarks(results):
        sentence = f"{len(missing)} of {len(results['rows'])} variants lack a run; {missing[0]}"
        raise RunError(sentence, code="missing-runs")
    failed = [criterion["claim"] for criterion in results["criteria"] if criterion["verdict"] != "passed"]
    if check and failed:
        sentence = f"{len(failed)} of {len(results['criteria'])} criteria failed; the first: {failed[0]}"
        raise RunError(sentence, code="criteria-failed")


def _list() -> int:
    from ..study.reading import read_study, shipped
    from .tables import table

    studies = [read_study(name) for name in shipped()]
    table(["study", "runs", "question"], [[study.name, str(_count(study)), study.question] for study in studies])
    echo("`moe-engine study NAME` runs one; add --quick to try it in a minute")
    return 0


def _count(study: Any) -> int:
    """The number of distinct runs; parts may share some."""
    variants = [variant for _, _, variant in study.variants({})]
    return len(
        {(str((v.plugins, v.settings, v.flags)), seed) for v in variants for seed in v.seeds or range(study.seeds)}
    )


def _run(
    study: Any,
    flags: Mapping[str, Any],
    folder: Path,
    seeds: int | None,
    jobs: int | None,
    cluster: tuple[str, str | None],
    quiet: bool,
) -> dict[str, Any]:
    from ..study.clusters import connected
    from ..study.figures import figures_of
    from ..study.page import markdown_of
    from ..study.results import run_study
    from .progress import Cells

    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background jobs with SIGINT ignored
    with connected(*cluster, jobs) as backend, Cells(quiet) as cells:
        results, records = run_study(study, flags, folder, seeds, jobs, cells.show, backend)
    figures = figures_of(study, results, records)
    for file, content in figures.items():
        write_atomically(folder / file, content)
    write_atomically(folder / "study.json", (_text(sealed(results)) + "\n").encode())
    write_atomically(folder / "study.md", markdown_of(results, figures).encode())
    _write_page(folder, results, figures)
    return results


def _write_page(folder: Path, results: Mapping[str, Any], figures: Mapping[str, bytes]) -> None:
    from ..pages.page import html_of
    from ..study.page import study_page

    write_atomically(folder / "study.html", html_of(study_page(results, figures)).encode())


def _drawn(folder: Path, study: Any, results: Mapping[str, Any]) -> dict[str, bytes]:
    """The figures of stored results: those of numbers as they are judged now, those of single runs as they were."""
    from ..study.figures import figures_of

    again = figures_of(study, results, [])
    names = [f"{figure.name}.png" for figure in study.figure]
    stored = {name: read_file(folder / name) for name in names if name not in again and (folder / name).is_file()}
    return {name: {**stored, **again}[name] for name in names if name in again or name in stored}


def _stored(folder: Path, study: Any) -> dict[str, Any]:
    """The results in a folder, judged by the study's current criteria."""
    from ..study.results import judged

    file = folder / "study.json"
    try:
        stored = unsealed(read_file(file).decode())
        return judged(study, stored)
    except OSError as error:
        sentence = f"{file} can't be read: {error.strerror}; run the study first, or name its folder with --out"
        raise UsageError(sentence, code="no-results") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f"{file} is damaged ({error}); run the study again", code="damaged-results") from error


def _text(results: Mapping[str, Any]) -> str:
    return json.dumps(results, indent=1, allow_nan=False, ensure_ascii=False)


def _print(results: Mapping[str, Any], folder: Path, check: bool, wide: bool) -> None:
    from ..study.tables import criteria_table, legend_of, remarks, tables_of
    from .tables import print_line, table

    print_line(f"{results['title']}: {results['question']}")
    for title, part in () if check else tables_of(results):
        echo(f"\n{title}")
        table(part.columns, part.rows, wide=wide, first=(*part.columns[1:2], "cv", "verdicts"))
    if results["criteria"]:
        criteria = criteria_table(results)
        table(criteria.columns, criteria.rows, wide=wide, first=("verdict", "worst", "limit"))
    for line in (*remarks(results), *(() if check else [legend_of(results)]), f"page: {folder / 'study.html'}"):
        print_line(line)
