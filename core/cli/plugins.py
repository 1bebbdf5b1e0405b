"""`moe-engine plugins`: what is installed, what one plugin can be told, what is broken."""

import inspect
import json
from typing import Any

import click

from ..contract.options import Option, options_of
from ..errors import UsageError
from ..registry.discovery import Found, find, load, pick
from ..registry.manager import broken


@click.command()
@click.argument("name", required=False)
@click.option("--check", is_flag=True, help="Import every plugin and say what is wrong with each that is broken.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def plugins(name: str | None, check: bool, as_json: bool) -> int:
    """List installed plugins, or show the options of plugin NAME.

    The list is read from metadata: nothing is imported, so that a broken plugin can't disturb it. With
    --check all are imported; the exit code is 1 if one is broken.
    """
    installed = find()
    if name is not None and check:
        raise UsageError("--check looks at all plugins; leave the name away")
    if name is not None:
        found = pick(name, installed)
        return _show(found, load(found), as_json)
    rows = [_row(found) for several in installed.values() for found in several]
    rows.sort(key=lambda row: (row["kind"], row["name"]))
    if check:
        verdicts = broken()
        rows = [{**row, "error": verdicts[row["name"]]} for row in rows]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
    else:
        _table(rows, check)
    return 1 if check and any(row["error"] for row in rows) else 0


def _row(found: Found) -> dict[str, Any]:
    return {"name": found.name, "kind": found.kind, "distribution": found.distribution, "version": found.version}


def _table(rows: list[dict[str, Any]], check: bool) -> None:
    widths = [
        max([len(str(row[key])) for row in rows] + [len(key)]) for key in ("name", "kind", "distribution", "version")
    ]

    def line(*cells: str) -> str:
        return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()

    click.echo(line("name", "kind", "distribution", "version"))
    for row in rows:
        click.echo(line(row["name"], row["kind"], row["distribution"], row["version"]))
    if check:
        errors = [row["error"] for row in rows if row["error"]]
        for error in dict.fromkeys(errors):
            click.echo(f"broken: {' '.join(error.split())}")
        click.echo(f"{len(rows) - len(errors)} of {len(rows)} plugins are fine")


def _show(found: Found, cls: type, as_json: bool) -> int:
    options = list(options_of(cls).values())
    text = inspect.getdoc(cls) or ""
    if as_json:
        listed = [
            {**_limits(one), "name": one.name, "type": one.type, "default": one.default, "help": one.help}
            for one in options
        ]
        click.echo(json.dumps({**_row(found), "help": text, "options": listed}, indent=2))
        return 0
    click.echo(f"{found.name}: {found.kind} of {found.distribution} {found.version}\n\n{text}\n")
    if not options:
        click.echo("It has no options.")
        return 0
    click.echo(f"Options, for --set {found.name}.OPTION=VALUE:")
    for one in options:
        default = (
            "none"
            if one.default is None
            else str(one.default).lower()
            if isinstance(one.default, bool)
            else one.default
        )
        limits = "".join(f", {key} {value}" for key, value in _limits(one).items())
        click.echo(f"  {one.name} = {default}\n      {one.help} ({one.type}{limits})")
    return 0


def _limits(one: Option) -> dict[str, Any]:
    values = {"min": one.min, "max": one.max, "choices": None if one.choices is None else list(one.choices)}
    return {key: value for key, value in values.items() if value is not None}
