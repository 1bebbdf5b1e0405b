"""The kit finds faults: a plugin with one fault fails exactly the claims about it, with a message that says so."""

import faults_elsewhere
import faults_in_layers
import faults_in_routers
import pytest
from faults import FAULTS

from moe_engine.testing import CLAIMS, checks, results

MODULES = (faults_in_layers, faults_in_routers, faults_elsewhere)  # where faults are registered
SLOW = {"compiles", "cost_is_bounded"}  # tested only on plugins with that fault


def failures(fault):
    """The failure of each claim that the plugin breaks, by the claim's name."""
    to_run = [check for check in checks(fault.plugin) if check.claim.name not in SLOW - set(fault.claims)]
    return {result.claim.name: result.why for result in results(to_run) if result.outcome == "FAILED"}


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_fault_is_caught_by_its_claims_and_no_others(fault):
    found = failures(fault)
    assert set(fault.claims) == set(found), found
    assert fault.message in found[fault.claims[0]]


def test_every_claim_catches_a_fault():
    assert {claim.name for claim in CLAIMS} == {name for fault in FAULTS for name in fault.claims}
