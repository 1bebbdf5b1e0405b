"""Write a new plugin package: module, entry point, test, README and CI workflow."""

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

FILES = {  # path: template; {kind}, {name} and {module} are filled in
    "pyproject.toml": "pyproject.toml",
    "README.md": "README.md",
    "{module}.py": "{kind}.py",
    "tests/test_{name}.py": "test.py",
    ".github/workflows/ci.yml": "ci.yml",
    ".gitignore": "gitignore",
}
RESERVED = ("all", "none", "recorded")  # words that flags take instead of a plugin's name
LONGEST = 64
NOUNS = {
    "growth": "growth trigger",
    "initializer": "initializer of new experts",
    "experts": "bank of experts",
    "family": "family of foreign models",
}


@attrs.frozen
class Project:
    """A plugin package to be written.

    kind: the plugin's kind. name: the plugin's name, an identifier. The distribution and the module are prefixed
    with moe-engine's name, so a plugin called `json` does not shadow the standard module.
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
        """Fill in one of the templates."""
        loader = PackageLoader(__package__, "templates")
        environment = Environment(loader=loader, undefined=StrictUndefined)
        names = ("name", "distribution", "module", "cls", "group", "noun")
        words = {name: getattr(self, name) for name in names}
        words.update(kind=self.kind, folder=shlex.quote(str(self.folder)))
        return environment.get_template(f"{template}.jinja").render(words) + "\n"

    def files(self) -> dict[str, str]:
        """The content of every file, by its path."""
        words = {"kind": self.kind, "name": self.name, "module": self.module}
        return {path.format(**words): self.render(template.format(**words)) for path, template in FILES.items()}


def project(kind: str, name: str, out: Path | None) -> Project:
    """The project of a plugin of that kind, to be written to `out` or ./NAME. Raises UsageError."""
    if kind not in KINDS.values():
        sentence = f"unknown kind of plugin '{kind}'; {nearest(kind, KINDS.values())}"
        raise UsageError(sentence, code="unknown-kind")
    package = Project(kind, name.replace("-", "_"), out or Path(name))
    _check_name(package, name)
    if package.folder.exists() or package.folder.is_symlink():
        raise UsageError(f"{package.folder} already exists; name another folder with --out", code="folder-exists")
    return package


def _check_name(package: Project, name: str) -> None:
    """Raise UsageError for a name that is invalid or already taken."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", package.name):
        sentence = f"'{name}' is not a valid plugin name; use lower-case letters, digits and underscores"
        raise UsageError(f"{sentence}, as in my_{package.kind}", code="bad-plugin-name")
    if len(name) > LONGEST:
        sentence = f"'{name}' is not a valid plugin name: it has more than {LONGEST} characters"
        raise UsageError(sentence, code="bad-plugin-name")
    if name in RESERVED or iskeyword(package.cls) or package.cls in public:
        why = "flags use that word" if name in RESERVED else f"its class would be called {package.cls}"
        raise UsageError(f"the name '{name}' is reserved: {why}; choose another name", code="reserved-plugin-name")
    if others := find().get(package.name):
        sentence = f"plugin '{package.name}' already exists, in {others[0].distribution}; choose another name"
        raise UsageError(sentence, code="plugin-exists")


def write(package: Project) -> None:
    """Write the whole project, or nothing. Raises UsageError if it can't be written."""
    folder = package.folder
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    files = package.files()
    try:
        for path, content in files.items():
            (temporary / path).parent.mkdir(parents=True, exist_ok=True)
            (temporary / path).write_text(content, "utf-8")
        temporary.rename(folder)
    except OSError as error:
        sentence = f"{folder} can't be written: {error.strerror}; name another folder with --out"
        raise UsageError(sentence, code="unwritable-folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
