"""`moe-engine check`: run the conformance tests on plugins."""

import traceback
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..contract.options import Settings, parse_settings
from ..errors import UsageError, nearest
from ..registry.discovery import find, pick
from .flags import json_flag, settings_flag
from .output import echo, echo_json
from .tables import print_line

if TYPE_CHECKING:
    from ..testing import Result


@click.command(short_help="Run the conformance tests on plugins.")
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@settings_flag
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path),
    default=Path("data"),
    show_default=True,
    metavar="FOLDER",
    help="Data of task plugins; claims whose data is missing are skipped.",
)
@click.option(
    "--ranks",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    metavar="N",
    help="Also train on N ranks, in N processes, next to one process.",
)
@json_flag("the outcomes")
@click.option("--debug", is_flag=True, help="Show the traceback of each failed claim.")
def check(
    names: tuple[str, ...], settings: tuple[str, ...], data_dir: Path, ranks: int, as_json: bool, debug: bool
) -> int:
    """Run the conformance tests on the given plugins.

    \b
    Test a router, then again with another setting:
        moe-engine check my_router
        moe-engine check my_router --set my_router.heat=2
    \b
    Test also that two ranks compute what one process does:
        moe-engine check my_router --ranks 2

    Each claim is printed as ok, FAILED with what to do, or skipped with the
    reason. Exit code 1 means that a claim failed, 2 that a plugin or an option
    is unknown. The same claims run in pytest through moe_engine.testing.
    """
    installed = find()
    found = [pick(name, installed) for name in names]
    given = _settings(names, settings)

    from ..testing import checks, results

    # build the checks of every plugin first: a wrong option is then reported before the first test runs
    checks_of = [checks(name, {name: given.get(name, {})}, str(data_dir), ranks) for name in names]
    rows: list[dict[str, Any]] = []
    outcomes = Counter[str]()
    for plugin, its_checks in zip(found, checks_of, strict=True):
        if not as_json:
            echo(f"{plugin.name}: {plugin.kind} ({plugin.distribution} {plugin.version})")
        for result in results(its_checks):
            outcomes[result.outcome] += 1
            if debug and result.error is not None:
                traceback.print_exception(result.error)
            if as_json:
                rows.append({"plugin": plugin.name, "kind": plugin.kind, **_row(result)})
            else:
                print_line(_line(result))
    if as_json:
        echo_json(rows, 2)
    else:
        failed, skipped = outcomes["FAILED"], outcomes["skipped"]
        print_line(f"{outcomes.total()} claims: {outcomes['ok']} ok, {failed} failed, {skipped} skipped")
    return 1 if outcomes["FAILED"] else 0


def _settings(names: tuple[str, ...], settings: tuple[str, ...]) -> Settings:
    given = parse_settings(settings)
    if others := sorted(given.keys() - set(names)):
        sentence = f"--set names plugin '{others[0]}', which is not checked; {nearest(others[0], names)}"
        raise UsageError(sentence, code="settings-of-unused-plugin")
    return given


def _row(result: "Result") -> dict[str, Any]:
    claim = result.claim
    outcome = {"outcome": result.outcome, "why": result.why, "seconds": round(result.seconds, 3)}
    return {"claim": claim.name, "says": claim.says, **outcome}


def _line(result: "Result") -> str:
    reason = f" ({result.why})" if result.why and result.outcome != "FAILED" else ""
    text = result.why if result.outcome == "FAILED" else f"{result.claim.says}{reason}"
    return f"  {result.outcome:8}{' '.join(str(text).split())}"
