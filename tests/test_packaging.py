"""setup.cfg says what the folders hold, and the wheel holds what setup.cfg says."""

import configparser
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from moe_engine.registry.discovery import KINDS, PREFIX

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def setup_cfg():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def lines(text):
    return [line.strip() for line in text.strip().splitlines()]


def test_every_package_is_listed(setup_cfg):
    folders = {"core": "moe_engine", "plugins": "moe_engine.plugins", "studies": "moe_engine.studies"}
    expected = {
        ".".join([package, *path.parent.relative_to(ROOT / folder).parts])
        for folder, package in folders.items()
        for path in (ROOT / folder).rglob("__init__.py")
    }
    assert set(lines(setup_cfg["options"]["packages"])) == expected


def test_every_strategy_is_an_entry_point_of_its_files_name(setup_cfg):
    expected = {
        f"{PREFIX}{kind}/{path.stem} = moe_engine.plugins.{kind}.{path.stem}"
        for kind in KINDS
        for path in (ROOT / "plugins" / kind).glob("[!_]*.py")
    }
    listed = {
        f"{group}/{line.rpartition(':')[0]}"
        for group, text in setup_cfg["options.entry_points"].items()
        if group.startswith(PREFIX)
        for line in lines(text)
        if not is_alias(line)
    }
    assert listed == expected


def is_alias(line):
    """Whether an entry point gives a family another model type, whose blocks are the same."""
    name, _, target = line.partition(" = ")
    return "plugins.families." in target and not target.rpartition(":")[0].endswith(f".{name}")


def test_every_test_folder_mirrors_a_source_folder():
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir()} - {"__pycache__"}
    rooms = {path.name for path in (ROOT / "core").iterdir() if path.is_dir()} - {"__pycache__"}
    assert folders - {"core", "plugins", "torture"} <= rooms  # core: of the modules that lie in no room


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy: what a build leaves in its folder would meet that of a test at the same time."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("core", "plugins", "studies"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    words = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", out, source]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *words], check=True, capture_output=True)
    return next(out.glob("*.whl"))


def test_the_wheel_holds_every_source_file(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, package in (("core", "moe_engine"), ("plugins", "moe_engine/plugins")):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert f"{package}/{path.relative_to(ROOT / folder).as_posix()}" in names


@pytest.mark.parametrize(
    ("words", "files"),
    [
        (
            ["new-plugin", "router", "mine", "--out", "out"],
            {".github", ".gitignore", "README.md", "moe_engine_mine.py"},
        ),
        pytest.param(
            ["run", "--plugins", "saturation,switch_aux", "--steps", "3", "--quiet", "--out", "out"],
            {
                "config.toml",
                "metrics.jsonl",
                "summary.json",
                "model.safetensors",
                "report.html",
                "checkpoints",
            },
            marks=pytest.mark.long,
        ),
    ],
)
def test_the_installed_wheel_runs(wheel, tmp_path, words, files):
    """In a folder of its own, where neither the checkout nor its editable install can stand in for it."""
    with zipfile.ZipFile(wheel) as file:  # all that pip does with a wheel of Python files alone
        file.extractall(tmp_path / "site")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path / "site")!r})
from moe_engine.cli import main
import moe_engine
assert moe_engine.__file__.startswith({str(tmp_path)!r}), moe_engine.__file__
sys.exit(main({words!r}))
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=tmp_path)
    assert files <= {path.name for path in (tmp_path / "out").iterdir()}


def test_a_strategy_is_one_file_that_can_be_read_at_a_glance():
    """At most 80 lines each, docstrings included, and most of them under 40."""
    kinds = ("routers", "biases", "losses", "growth", "initializers", "metrics", "reports", "experts")
    files = [path for kind in kinds for path in (ROOT / "plugins" / kind).glob("[!_]*.py")]
    lines = {path.name: len(path.read_text("utf-8").splitlines()) for path in files}
    assert {name: count for name, count in lines.items() if count > 80} == {}
    strategies = [count for path in files for count in [lines[path.name]] if path.parent.name != "experts"]
    assert sum(count < 40 for count in strategies) > len(strategies) / 2
