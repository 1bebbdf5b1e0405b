"""docs/tutorial.md, followed to the letter by a stranger in a fresh environment."""

import os
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import pytest

import warm
from moe_engine.cli import COMMANDS, main
from moe_engine.testing import checks, results
from warm import MOE_ENGINE, Server

TUTORIAL = (Path(__file__).parents[1] / "docs" / "tutorial.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```", TUTORIAL, re.M | re.S)


def test_its_blocks_parse_and_its_files_are_those_of_the_scaffold(tmp_path, capsys):
    """What can be said without following it, which takes a minute."""
    for language, _, text in BLOCKS:
        if language == "python":
            compile(text, "tutorial.md", "exec")
    lines = [shlex.split(line) for language, _, text in BLOCKS if language == "sh" for line in text.splitlines()]
    assert {words[1] for words in lines if words[0] == "moe-engine"} <= {command.name for command in COMMANDS}
    assert lines[0] == ["moe-engine", "new-plugin", "router", "my_router"]
    assert main([*lines[0][1:], "--out", str(tmp_path / "my_router")]) == 0
    capsys.readouterr()
    files = [file for _, file, _ in BLOCKS if file]
    assert files and all((tmp_path / file).exists() for file in files)


def test_its_router_keeps_what_a_router_promises(tmp_path, monkeypatch):
    """Of the promises that are quick to test."""
    (source,) = [text for _, file, text in BLOCKS if file and file.endswith(".py")]
    module = types.ModuleType("moe_engine_my_router")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(source, "tutorial.md", "exec"), vars(module))
    slow = ("experts_can_be_added_and_removed", "compiles")
    several = [check for check in checks(module.MyRouter) if check.claim.name not in slow]
    assert [one.why for one in results(several) if one.outcome == "FAILED"] == []


@pytest.fixture(scope="module")
def reader(new_venv, tmp_path_factory):
    """Where the reader's files are, and what was printed by each block of commands."""
    home = tmp_path_factory.mktemp("reader")
    python = new_venv(home / ".venv")
    server = Server(python)
    engine = python.parent / "moe-engine"
    words = [sys.executable, "-S", warm.__file__, server.address, *MOE_ENGINE]
    engine.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
    engine.chmod(0o755)
    offline = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    path = os.pathsep.join([str(python.parent), os.environ["PATH"]])
    environment = {**os.environ, **offline, "PATH": path, "COLUMNS": "200"}
    done = []
    for number, (language, file, text) in enumerate(BLOCKS):
        if file:
            assert (home / file).exists(), f"{file}, which the page replaces, is not there"
            (home / file).write_text(text)
        elif language in ("sh", "python"):
            if language == "sh":
                command = ["bash", "-ec", text]
                ran = subprocess.run(command, check=False, capture_output=True, text=True, cwd=home, env=environment)
            else:
                ran = server.run(["-c", text], home, environment)
            follows = BLOCKS[number + 1 : number + 2]
            expected = follows[0][2] if follows and follows[0][0] == "text" else ""
            assert ran.returncode == (2 if expected.startswith("moe-engine: ") else 0), (text, ran.stdout, ran.stderr)
            assert expected in ran.stdout + ran.stderr
            done.append(ran.stdout)
    yield SimpleNamespace(home=home, printed=done)
    server.stop()


@pytest.mark.long
def test_the_readers_router_is_listed(reader):
    """With the distribution that it came from."""
    row = next(line for line in reader.printed[1].splitlines() if line.split()[:1] == ["my_router"])
    assert {"moe-engine-my-router", "0.1.0"} <= set(re.split(r"[\s\[\]]+", row))


@pytest.mark.long
def test_the_algorithm_alone_prints_its_load_and_gates(reader):
    """Six tokens with two choices each."""
    first = next(text for text in reader.printed if text.startswith("tensor(["))
    assert sum(float(number) for number in re.findall(r"[\d.]+", first.splitlines()[0])) == 12


@pytest.mark.long
def test_the_readers_router_is_in_the_report(reader):
    """First as it was written by new-plugin, then with the option that the reader gave it."""
    assert "my_router" in (reader.home / "runs/hello/report.html").read_text()
    report = (reader.home / "runs/mine/report.html").read_text()
    assert "my_router" in report and "floor = 0.2" in report


@pytest.mark.long
def test_the_comparison_and_the_wheel_are_there(reader):
    """A figure, and a file for others."""
    assert (reader.home / "compare.png").stat().st_size > 1000
    (wheel,) = (reader.home / "dist").iterdir()
    assert wheel.name == "moe_engine_my_router-0.1.0-py3-none-any.whl"
