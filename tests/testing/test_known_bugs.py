"""docs/conformance.md lists every claim, and what rules out each known bug."""

import re
from pathlib import Path

import faults_elsewhere
import faults_in_layers
import faults_in_routers
import pytest
import torch
from faults import FAULTS

from moe_engine import Engine
from moe_engine.testing import CLAIMS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "conformance.md").read_text("utf-8")
ROWS = {int(number): cell for number, cell in re.findall(r"^\| (\d+) \|.*\| ([^|]+) \|$", PAGE, re.M)}
NAMES = {claim.name for claim in CLAIMS}
MODULES = (faults_in_layers, faults_in_routers, faults_elsewhere)  # where faults are registered


def test_the_page_lists_every_claim_with_its_sentence():
    listed = dict(re.findall(r"^- `(\w+)`: (.+)\.$", PAGE, re.M))
    assert {claim.name: claim.says for claim in CLAIMS} == listed


def test_every_known_bug_has_a_row():
    assert list(range(1, 32)) == sorted(ROWS)


@pytest.mark.parametrize("number", ROWS)
def test_what_rules_out_a_bug_exists(number):
    """Each claim catches a plugin with that bug; each test exists."""
    quoted = re.findall(r"`(\w+)`", ROWS[number])
    claims = [name for name in quoted if name in NAMES]
    tests = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", ROWS[number])
    assert claims or tests
    caught = {name for fault in FAULTS if number in fault.bugs for name in fault.claims}
    assert set(claims) <= caught
    for path, name in tests:
        assert re.search(rf"^def {name}\(", (ROOT / path).read_text("utf-8"), re.M), name


def test_a_dropped_choice_leaves_the_other_gate_as_it_was():
    """Four equal tokens choose experts 0 and 1, which keep two each: gates are the same as without a limit."""

    def gates(capacity):
        layer = Engine(experts=4, top_k=2, capacity=capacity).moe(4, 4)
        with torch.no_grad():
            layer.router.weight[:] = torch.eye(4)
        return layer.route(layer.tokens(torch.tensor([[3.0, 2.0, 0.0, 0.0]]).expand(4, 4))).gates()

    free, limited = gates(None), gates(1.0)
    kept = torch.tensor([[1.0, 1.0, 0.0, 0.0]] * 2 + [[0.0] * 4] * 2)
    torch.testing.assert_close(limited, free * kept)
