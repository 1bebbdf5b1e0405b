"""Every plugin that moe-engine brings keeps every promise."""

import os
import socket

import pytest

from moe_engine.registry import discovery
from moe_engine.testing import checks, results

BUILTIN = {name: found.kind for name, (found, *_) in discovery.find().items() if found.distribution == "moe-engine"}


@pytest.fixture
def offline(monkeypatch):
    """Data that are not here are not fetched."""

    def refuse(*_, **__):
        raise OSError("this test is offline")

    for name in ("create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)


@pytest.mark.parametrize("name", BUILTIN)
def test_a_built_in_plugin_keeps_every_promise(offline, tmp_path, name):
    said = list(results(checks(name, data_dir=os.environ.get("DATA", str(tmp_path)))))
    assert [one.why for one in said if one.outcome == "FAILED"] == []
    assert any(one.outcome == "ok" for one in said) or BUILTIN[name] == "task"  # its data may not be here


@pytest.mark.parametrize("name", [name for name, kind in BUILTIN.items() if kind == "loss"])
def test_a_built_in_loss_says_what_balance_is_worth(name):
    """Also where that is nothing fixed, by None."""
    (found,) = discovery.find()[name]
    assert "traits" in vars(discovery.load(found))
