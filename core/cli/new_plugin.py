"""`moe-engine new-plugin`."""

from pathlib import Path

import click

from ..registry.discovery import KINDS


@click.command("new-plugin")
@click.argument("kind", metavar="KIND")
@click.argument("name", metavar="NAME")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the project.  [default: ./NAME]")
def new_plugin(kind: str, name: str, out: Path | None) -> None:
    from .scaffold import project, write

    wanted = project(kind, name, out)
    write(wanted)
    click.echo(wanted.render("next.txt"), nl=False)


new_plugin.help = f"""Write a distribution with a plugin of your own, which works as written.

KIND is one of {", ".join(KINDS.values())}.

\b
A router of your own, installed, tested, in a run:
    moe-engine new-plugin router my_router
    python -m pip install --editable my_router
    python -m pytest my_router
    moe-engine run --plugins my_router

The folder gets a pyproject.toml with the entry point, a module with a small but complete strategy to change,
a test that holds it against moe-engine's checks, a README and a file for continuous integration.
"""
