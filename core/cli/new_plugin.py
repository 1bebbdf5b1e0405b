"""`moe-engine new-plugin`: write a new plugin package."""

from pathlib import Path

import click

from ..registry.discovery import KINDS
from .flags import out_flag
from .output import echo


@click.command("new-plugin", short_help="Write a new plugin package that runs as generated.")
@click.argument("kind", metavar="KIND")
@click.argument("name", metavar="NAME")
@out_flag("Folder of the package.", "./NAME")
def new_plugin(kind: str, name: str, out: Path | None) -> None:
    from .scaffold import project, write

    package = project(kind, name, out)
    write(package)
    echo(package.render("next.txt"), nl=False)


new_plugin.help = f"""Write a new plugin package that runs as generated.

KIND is one of {", ".join(KINDS.values())}.

\b
Write a router, install it, test it, and use it in a run:
    moe-engine new-plugin router my_router
    python -m pip install --editable my_router
    python -m pytest my_router
    moe-engine run --plugins my_router

The folder gets a pyproject.toml with the entry point, a module with a small,
complete strategy for you to change, a test that runs the conformance tests, a
README and a CI workflow.
"""
