"""The kit bites: each claim is broken by a plugin with one fault, and the sentence says so."""

import faults_elsewhere
import faults_in_layers
import faults_in_routers
import pytest
from faults import FAULTS

from moe_engine.testing import CLAIMS, checks, results

MODULES = (faults_in_layers, faults_in_routers, faults_elsewhere)  # where faults are registered
SLOW = {"compiles", "cost_is_bounded"}  # tested only on plugins that are to break them


def failures(fault):
    """What is said of each claim that the plugin breaks."""
    several = [one for one in checks(fault.plugin) if one.claim.name not in SLOW - set(fault.claims)]
    return {one.claim.name: one.why for one in results(several) if one.outcome == "FAILED"}


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_fault_is_caught_by_its_claims_and_no_other(fault):
    found = failures(fault)
    assert set(fault.claims) == set(found), found
    assert fault.says in found[fault.claims[0]]


def test_every_claim_bites():
    assert {one.name for one in CLAIMS} == {name for fault in FAULTS for name in fault.claims}
