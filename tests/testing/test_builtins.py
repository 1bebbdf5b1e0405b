"""Every plugin that moe-engine brings keeps every promise.

`make test-long` tests every claim on every plugin. `make test` tests the claims about layers, of which there are many,
on every third plugin of a kind: a third of them on one plugin, the next third on the next. A claim that takes seconds
is tested on one plugin of each kind that it is about. They are always the same ones.
"""

import os
import socket
from functools import cache

import pytest

from moe_engine.registry import discovery
from moe_engine.testing import CLAIMS, NotApplicable, checks, results

BUILTIN = {name: found.kind for name, (found, *_) in discovery.find().items() if found.distribution == "moe-engine"}
KIN = {  # families under the names of others of their kin, which have the same code
    name
    for name, (found, *_) in discovery.find().items()
    if found.kind == "family" and not found.entry_point.module.endswith(f".{name}")
}
SLOW = {  # claims that take more than half a second of most plugins: they compile, train, grow or draw
    *("compiles", "experts_can_be_added_and_removed", "equal_load_leaves_the_bias_alone"),
    *(
        "requested_growth_is_possible",
        "same_history_gives_same_growth",
        "resumed_run_grows_alike",
        "max_experts_is_respected",
    ),
    *("orphans_are_declared", "written_files_are_listed", "report_can_be_rewritten", "model_learns"),
}

NUMBERS = {claim.name: number for number, claim in enumerate(CLAIMS)}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Data that are not here are not fetched."""

    def refuse(*_, **__):
        raise OSError("this test is offline")

    for name in ("create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)


@pytest.fixture
def checks_of(tmp_path):
    """The checks of a built-in plugin by the claim's name, on data of the folder DATA where that is set."""
    return lambda name: {
        check.claim.name: check for check in checks(name, data_dir=os.environ.get("DATA", str(tmp_path)))
    }


def assert_kept(name, several):
    outcomes = list(results(several))
    assert [one.why for one in outcomes if one.outcome == "FAILED"] == []
    assert any(one.outcome == "ok" for one in outcomes) or BUILTIN[name] == "task"  # its data may not be here


@cache
def holders(kind):
    """The plugins of a kind that each claim is about, by name."""
    found = {}
    for name in sorted(name for name in BUILTIN if BUILTIN[name] == kind and name not in KIN):
        for check in checks(name):
            found.setdefault(check.claim.name, []).append(name)
    return found


def is_sampled(name, claim):
    """Whether a plugin is among the eighth of those that the claim is about."""
    names = holders(BUILTIN[name])[claim]
    return (names.index(name) + NUMBERS[claim]) % min(len(names), 8) == 0


@pytest.mark.parametrize("name", [name for name in BUILTIN if name not in KIN])
def test_a_built_in_plugin_keeps_promises_that_are_quick_to_test(checks_of, name):
    quick = {claim: check for claim, check in checks_of(name).items() if claim not in SLOW}
    eighth = [check for claim, check in quick.items() if is_sampled(name, claim)]
    assert_kept(name, eighth if len(quick) > 20 else quick.values())


@pytest.mark.long
@pytest.mark.parametrize("name", BUILTIN)
def test_a_built_in_plugin_keeps_every_promise(checks_of, name):
    assert_kept(name, checks_of(name).values())


def first_of(kind, claim):
    """The plugins of a kind by name, from another one on for each claim: whom a claim is tested on is no chance."""
    names = sorted(name for name in BUILTIN if BUILTIN[name] == kind)
    first = sorted(SLOW).index(claim) % len(names)
    return names[first:] + names[:first]


@pytest.mark.parametrize("claim", sorted(SLOW))
def test_one_plugin_of_each_kind_keeps_a_promise_that_is_slow_to_test(checks_of, claim):
    """Of every third kind that the claim is about, the first plugin that it applies to."""
    tested = []
    kinds = [kind for kind in sorted(set(BUILTIN.values())) if claim in holders(kind)]
    for kind in kinds[sorted(SLOW).index(claim) % 3 % len(kinds) :: 3]:
        for name in first_of(kind, claim):
            try:
                checks_of(name)[claim]()
            except (KeyError, NotApplicable):
                continue
            tested.append(name)
            break
    assert tested


def test_slow_claims_are_claims():
    assert {claim.name for claim in CLAIMS} >= SLOW


@pytest.mark.parametrize("name", [name for name, kind in BUILTIN.items() if kind == "loss"])
def test_a_built_in_loss_says_what_balance_is_worth(name):
    """Also where that is nothing fixed, by None."""
    (found,) = discovery.find()[name]
    assert "traits" in vars(discovery.load(found))
