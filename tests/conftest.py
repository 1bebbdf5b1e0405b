"""What the tests share."""

import sys
import types
from importlib import metadata

import pytest
import torch

from moe_engine import manager


@pytest.fixture(autouse=True)
def _seeded():
    """Every test starts from the same random state, on one thread."""
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture
def install(monkeypatch):
    """install(kind, name, cls): make a plugin class look like one of an installed distribution "elsewhere 1.0"."""
    found = manager.find()

    def add(kind, name, cls, distribution="elsewhere"):
        module = types.ModuleType(f"elsewhere_{name}")
        module.Plugin = cls
        monkeypatch.setitem(sys.modules, module.__name__, module)
        group = next(group for group, word in manager.KINDS.items() if word == kind)
        point = metadata.EntryPoint(name, f"{module.__name__}:Plugin", manager.PREFIX + group)
        found.setdefault(name, []).append(manager.Found(name, kind, distribution, "1.0", point))

    with manager.pretend(found):
        yield add
