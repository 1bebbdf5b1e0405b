"""What the tests share."""

import gc
import os
import socket
import subprocess
import sys
import types
from importlib import metadata
from pathlib import Path

import pytest
import torch

import warm
from moe_engine.registry import discovery

os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start, too: several tests run at a time


def pytest_collection_finish():
    _freeze()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    if nextitem is None or nextitem.module is not item.module:
        _freeze()


def _freeze():
    """What is imported stays: growths, which look for optimizers among all objects, need not look there."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded():
    """Every test starts from the same random state, on one thread."""
    torch.default_generator.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _metadata_read_once():
    """What is installed changes with sys.path alone while tests run, and reading it takes as long as a small test."""
    read, known = metadata.entry_points, {}

    def entry_points(**selection):
        if selection:
            return read(**selection)
        path = tuple(sys.path)
        if path not in known:
            known[path] = read()
        return known[path]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metadata, "entry_points", entry_points)
        yield


@pytest.fixture
def install(monkeypatch):
    """install(kind, name, cls): make a plugin class look like one of an installed distribution "elsewhere 1.0"."""
    found = discovery.find()

    def add(kind, name, cls, distribution="elsewhere"):
        module = types.ModuleType(f"elsewhere_{name}")
        module.Plugin = cls
        monkeypatch.setitem(sys.modules, module.__name__, module)
        group = next(group for group, word in discovery.KINDS.items() if word == kind)
        point = metadata.EntryPoint(name, f"{module.__name__}:Plugin", discovery.PREFIX + group)
        found.setdefault(name, []).append(discovery.Found(name, kind, distribution, "1.0", point))

    with discovery.pretend(found):
        yield add


@pytest.fixture(scope="session")
def commands():
    """A server whose commands start at once; see warm.py."""
    server = warm.Server()
    yield server
    server.stop()


@pytest.fixture
def free_port():
    """A TCP port of this machine that nobody uses."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def has(name, major):
    """Is a distribution installed, in that major version or a later one?"""
    found = metadata.distributions(name=name)
    return any(int(one.version.split(".")[0]) >= major for one in found)


@pytest.fixture(scope="session")
def new_venv():
    """new_venv(folder, sources): the python of a fresh environment, in which these source trees are installed.

    It sees what these tests see, moe-engine installed as editable included.
    """
    if not (has("pip", 22) and has("setuptools", 77)):
        pytest.skip("needs pip and setuptools 77")

    def make(folder, sources=()):
        python = make_venv(folder)
        quiet = ("--quiet", "--disable-pip-version-check", "--no-input", "--no-index", "--no-cache-dir")
        install = [python, "-m", "pip", "install", *quiet, "--no-deps", "--no-build-isolation", *sources]
        if sources:
            subprocess.run(install, check=True, cwd=folder)
        return python

    return make


def make_venv(folder):
    """The python of a fresh environment beside ours."""
    subprocess.run([sys.executable, "-m", "venv", "--system-site-packages", "--without-pip", folder], check=True)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    ours = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    # a line that begins with import is run: addsitedir reads the .pth files of our environment, a path would not
    lines = [f"import site; site.addsitedir({path!r})\n" for path in ours]
    (Path(site) / "ours.pth").write_text("".join(lines), "utf-8")
    return python
