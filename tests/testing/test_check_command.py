"""`moe-engine check`: lines, JSON, exit codes."""

import json

import attrs
import pytest
from faults import Top

from moe_engine import hookimpl
from moe_engine.cli import main
from moe_engine.testing import CLAIMS

FEW = ("builds", "learns_from_the_task", "choices_are_valid", "smooth_load_matches_the_load")


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Only some claims, to save time."""
    monkeypatch.setattr("moe_engine.testing.checking.CLAIMS", [claim for claim in CLAIMS if claim.name in FEW])


@pytest.fixture
def constant(install):
    """An installed router that can't learn at K = 1."""

    @attrs.define(eq=False)
    class Constant:
        @hookimpl
        def moe_router(self, spec):
            class Renormalised(Top):
                def gates(self, probs_TK):
                    return probs_TK / probs_TK.sum(-1, keepdim=True)

            return Renormalised(spec)

    install("router", "constant", Constant)


def test_each_claim_is_one_line(capsys):
    assert main(["check", "topk"]) == 0
    head, *lines, last = capsys.readouterr().out.splitlines()
    assert head.startswith("topk: router (moe-engine ")
    assert (
        lines[0] == "  ok      A layer with the plugin can be built, and every tensor is finite after a training step"
    )
    assert lines[-1].endswith("(the router does not provide 'smooth_load')") and lines[-1].startswith(
        "  skipped If a router"
    )
    assert last == "4 claims: 3 ok, 0 failed, 1 skipped"


def test_a_claim_that_fails_is_named_and_the_exit_code_is_1(constant, capsys):
    assert main(["check", "constant", "topk"]) == 1
    out = capsys.readouterr().out
    assert "  FAILED  router 'constant' breaks 'The task's gradient reaches the logits of every level" in out
    assert "topk: router (moe-engine" in out
    assert out.splitlines()[-1] == "8 claims: 5 ok, 1 failed, 2 skipped"


def test_json_output(constant, capsys):
    assert main(["check", "constant", "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)
    assert [(row["claim"], row["outcome"]) for row in rows] == [
        ("builds", "ok"),
        ("learns_from_the_task", "FAILED"),
        ("choices_are_valid", "ok"),
        ("smooth_load_matches_the_load", "skipped"),
    ]
    assert {row["plugin"] for row in rows} == {"constant"}
    assert all(row["says"] and row["seconds"] >= 0 for row in rows)


def test_debug_prints_the_traceback(constant, capsys):
    main(["check", "constant", "--debug"])
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["topk", "tpok"], ("'tpok'", "did you mean 'topk'?")),
        (["topk", "--set", "topk.heat=2"], ("router 'topk' has no option 'heat'",)),
        (["topk", "--set", "heat"], ("'heat'", "plugin.option=value")),
        (["topk", "--set", "z_loss.weight=1"], ("'z_loss'", "not checked")),
        ([], ("Missing argument 'NAME...'",)),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_2(arguments, words, capsys):
    """Refused before any check runs."""
    assert main(["check", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert [word for word in words if word not in printed.err] == [] and printed.err.count("\n") == 1
