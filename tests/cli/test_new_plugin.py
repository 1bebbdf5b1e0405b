"""A package written by `moe-engine new-plugin` runs as generated: it installs, passes its own tests and the linter.

The example in examples/ passes the same tests.
"""

import importlib.util
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from moe_engine.cli import main
from moe_engine.registry.discovery import KINDS
from moe_engine.testing import checks, results
from warm import MOE_ENGINE, Server

DEMO = Path(__file__).parents[2] / "examples" / "moe-engine-demo"
NAME = "quite_a_long_name_for_a_{}"  # the longest lines of a module hold its class's name


@pytest.fixture(scope="module")
def projects(tmp_path_factory):
    """The folders of one project of each kind, and of a copy of the example."""
    home = tmp_path_factory.mktemp("baked")
    for kind in KINDS.values():
        assert main(["new-plugin", kind, NAME.format(kind), "--out", str(home / kind)]) == 0
    for path in DEMO.rglob("*"):
        if path.is_file() and path.suffix in (".py", ".toml", ".md") and "build" not in path.parts:
            copy = home / "demo" / path.relative_to(DEMO)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    return sorted(home.iterdir())


@pytest.mark.parametrize("kind", KINDS.values())
def test_a_plugin_loads_and_keeps_its_first_promises(projects, kind, monkeypatch):
    """Read from its folder, without installing it."""
    (folder,) = [folder for folder in projects if folder.name == kind]
    (path,) = folder.glob("*.py")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)
    spec.loader.exec_module(module)
    (point,) = tomllib.loads((folder / "pyproject.toml").read_text())["project"]["entry-points"].popitem()[1].values()
    several = list(checks(getattr(module, point.partition(":")[2])))[:3]
    assert [one.why for one in results(several) if one.outcome == "FAILED"] == []


@pytest.mark.long
def test_they_pass_their_own_tests(projects, new_venv, tmp_path):
    """Every check of its kind, for each kind; the command line lists them all as fine."""
    python = new_venv(tmp_path / "venv", projects)
    server = Server(python)
    done = server.run(["-m", "pytest", "-q", "-p", "no:cacheprovider", *projects], tmp_path)
    assert not done.returncode, done.stdout[-3000:] + done.stderr[-1000:]
    ran = int(done.stdout.splitlines()[-1].split(" passed")[0].split()[-1])
    assert ran >= 3 * len(projects)
    done = server.run([*MOE_ENGINE, "plugins", "--check"], tmp_path)
    server.stop()
    assert not done.returncode, done.stdout
    assert {NAME.format(kind) for kind in KINDS.values()} < {line.split()[0] for line in done.stdout.splitlines()}


def test_they_pass_the_linter(projects):
    """With the rules in each one's own pyproject.toml."""
    pytest.importorskip("ruff")
    for words in (["check"], ["format", "--check"]):
        command = [sys.executable, "-m", "ruff", *words, "--no-cache", "--quiet", *projects]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        assert not done.returncode, done.stdout
