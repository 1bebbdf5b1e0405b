"""`moe-engine check`: hold plugins against what is promised of every plugin."""

import json
import traceback
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..contract.options import parse_settings
from ..errors import UsageError, nearest
from ..registry.discovery import find, pick
from .flags import settings_flag

if TYPE_CHECKING:
    from ..testing import Result


@click.command()
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@settings_flag
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path),
    default=Path("data"),
    show_default=True,
    metavar="FOLDER",
    help="Where a task's files are; without them its claims are skipped.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--debug", is_flag=True, help="Show the traceback of each claim that fails.")
def check(names: tuple[str, ...], settings: tuple[str, ...], data_dir: Path, as_json: bool, debug: bool) -> int:
    """Test what is promised of every plugin on the plugins NAME...: one line for each claim.

    \b
    A router, and with another setting:
        moe-engine check my_router
        moe-engine check my_router --set my_router.heat=2
    Several, for a program to read:
        moe-engine check my_router my_loss --json

    A claim is ok, FAILED with what to do, or skipped with the reason. The exit code is 1 if one failed,
    2 for an unknown name. The claims are those of moe_engine.testing, which tests use too.
    """
    installed = find()
    found = [pick(name, installed) for name in names]
    given = parse_settings(settings)
    if strangers := sorted(given.keys() - set(names)):
        raise UsageError(
            f"options are set for plugin '{strangers[0]}', which is not checked; {nearest(strangers[0], names)}"
        )

    from ..testing import checks, results

    # all of them before the first is tested, so that a wrong word is said at once; each is tested alone
    several = [checks(name, {name: given.get(name, {})}, str(data_dir)) for name in names]
    rows: list[dict[str, Any]] = []
    outcomes = Counter[str]()
    for one, its in zip(found, several, strict=True):
        if not as_json:
            click.echo(f"{one.name}: {one.kind} of {one.distribution} {one.version}")
        for result in results(its):
            outcomes[result.outcome] += 1
            if debug and result.error is not None:
                traceback.print_exception(result.error)
            if as_json:
                rows.append({"plugin": one.name, "kind": one.kind, **_row(result)})
            else:
                click.echo(_line(result))
    if as_json:
        click.echo(json.dumps(rows, indent=2))
    else:
        failed, skipped = outcomes["FAILED"], outcomes["skipped"]
        click.echo(f"{outcomes.total()} claims: {outcomes['ok']} ok, {failed} failed, {skipped} skipped")
    return 1 if outcomes["FAILED"] else 0


def _row(result: "Result") -> dict[str, Any]:
    claim = result.claim
    told = {"outcome": result.outcome, "why": result.why, "seconds": round(result.seconds, 3)}
    return {"claim": claim.name, "says": claim.says, **told}


def _line(result: "Result") -> str:
    why = f" ({result.why})" if result.why and result.outcome != "FAILED" else ""
    text = result.why if result.outcome == "FAILED" else f"{result.claim.says}{why}"
    return f"  {result.outcome:8}{' '.join(str(text).split())}"
