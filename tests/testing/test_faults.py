"""The kit finds faults: a plugin with one fault fails exactly the claims about it, with a message that says so.

`make test-long` tests every claim on every faulty plugin; `make test` tests the claims that a fault breaks, and an
eighth of the others that take less than half a second, which together are all of those.
"""

import faults_elsewhere
import faults_in_layers
import faults_in_routers
import faults_on_ranks
import pytest
from faults import FAULTS
from test_builtins import SLOW as SLOW_ON_MOST

from moe_engine.testing import CLAIMS, checks, results

MODULES = (faults_in_layers, faults_in_routers, faults_elsewhere, faults_on_ranks)  # where faults are registered
SLOW = {"compiles", "cost_is_bounded"}  # tested only on plugins with that fault
ON_RANKS = {claim.name for claim in CLAIMS if claim.on_ranks}  # tested only on plugins with a fault that shows there
EVERY = [claim.name for claim in CLAIMS if claim.name not in SLOW]


def assert_caught(fault, others):
    """By its own claims, and by none of the others."""
    on_ranks = ON_RANKS if ON_RANKS & set(fault.claims) else set()
    ranks = 2 if on_ranks else 1
    wanted = {*fault.claims, *others, *on_ranks}
    to_run = [check for check in checks(fault.plugin, ranks=ranks) if check.claim.name in wanted]
    found = {result.claim.name: result.why for result in results(to_run) if result.outcome == "FAILED"}
    assert set(fault.claims) == set(found), found
    assert fault.message in found[fault.claims[0]]


@pytest.mark.parametrize(("number", "fault"), list(enumerate(FAULTS)), ids=str)
def test_a_fault_is_caught_by_its_claims(number, fault):
    assert_caught(fault, [name for name in EVERY[number % 8 :: 8] if name not in SLOW_ON_MOST])


@pytest.mark.long
@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_fault_is_caught_by_its_claims_and_no_others(fault):
    assert_caught(fault, EVERY)


def test_every_claim_catches_a_fault():
    assert {claim.name for claim in CLAIMS} == {name for fault in FAULTS for name in fault.claims}
