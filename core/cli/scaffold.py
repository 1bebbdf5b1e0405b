"""New distributions: everything that a plugin of one kind needs to be installed, tested and shared."""

import os
import re
import shlex
import shutil
from keyword import iskeyword
from pathlib import Path

import attrs
from jinja2 import Environment, PackageLoader, StrictUndefined

from .. import __all__ as public
from ..errors import UsageError, nearest
from ..registry.discovery import KINDS, PREFIX, find

FILES = {  # what is written: its template; {kind}, {name} and {module} are filled in
    "pyproject.toml": "pyproject.toml",
    "README.md": "README.md",
    "{module}.py": "{kind}.py",
    "tests/test_{name}.py": "test.py",
    ".github/workflows/ci.yml": "ci.yml",
    ".gitignore": "gitignore",
}


RESERVED = ("all", "none", "recorded")  # words that stand where names of plugins do
NOUNS = {"growth": "growth trigger", "initializer": "initializer of new experts", "experts": "bank of experts"}


@attrs.frozen
class Project:
    """A distribution that is to be written.

    kind: of its plugin. name: the plugin's, an identifier. Distribution and module carry moe-engine's name before
    it, so that a plugin called `json` hides nobody's module.
    """

    kind: str
    name: str
    folder: Path

    @property
    def distribution(self) -> str:
        return f"moe-engine-{self.name.replace('_', '-')}"

    @property
    def module(self) -> str:
        return f"moe_engine_{self.name}"

    @property
    def cls(self) -> str:
        return "".join(word.capitalize() for word in self.name.split("_"))

    @property
    def group(self) -> str:
        return PREFIX + next(group for group, kind in KINDS.items() if kind == self.kind)

    @property
    def noun(self) -> str:
        return NOUNS.get(self.kind, self.kind)

    def render(self, template: str) -> str:
        """One template of core/templates, filled in."""
        loader = PackageLoader(__package__, "templates")
        environment = Environment(loader=loader, undefined=StrictUndefined)
        names = ("name", "distribution", "module", "cls", "group", "noun")
        words = {name: getattr(self, name) for name in names}
        words.update(kind=self.kind, folder=shlex.quote(str(self.folder)))
        return environment.get_template(f"{template}.jinja").render(words) + "\n"

    def files(self) -> dict[str, str]:
        """Every file's path and content."""
        words = {"kind": self.kind, "name": self.name, "module": self.module}
        return {path.format(**words): self.render(template.format(**words)) for path, template in FILES.items()}


def project(kind: str, name: str, out: Path | None) -> Project:
    """The project of a plugin of that kind, to be written to `out` or ./NAME. Raises UsageError."""
    if kind not in KINDS.values():
        raise UsageError(f"there is no kind of plugin '{kind}'; {nearest(kind, KINDS.values())}")
    wanted = Project(kind, name.replace("-", "_"), out or Path(name))
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", wanted.name):
        advice = f"use small letters, digits and underscores, as in my_{kind}"
        raise UsageError(f"'{name}' can't be a plugin's name; {advice}")
    if iskeyword(wanted.cls) or wanted.cls in public:
        raise UsageError(f"plugin '{name}' would be the class {wanted.cls}, a name that is taken; choose another name")
    if len(name) > 64 or name in RESERVED:
        raise UsageError(f"'{name}' can't be a plugin's name: it is too long, or a word of the command line")
    if others := find().get(wanted.name):
        raise UsageError(f"there is a plugin '{wanted.name}' already, of {others[0].distribution}; choose another name")
    if wanted.folder.exists() or wanted.folder.is_symlink():
        raise UsageError(f"{wanted.folder} exists already; name another folder with --out")
    return wanted


def write(wanted: Project) -> None:
    """Write the project: all of it under its final name, or nothing. Raises UsageError where it can't be written."""
    folder = wanted.folder
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    files = wanted.files()
    try:
        for path, content in files.items():
            (temporary / path).parent.mkdir(parents=True, exist_ok=True)
            (temporary / path).write_text(content, "utf-8")
        temporary.rename(folder)
    except OSError as error:
        raise UsageError(f"{folder} can't be written: {error.strerror}; name another folder with --out") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
