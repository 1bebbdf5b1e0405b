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


def test_a_line_for_each_claim(capsys):
    assert main(["check", "topk"]) == 0
    head, *lines, last = capsys.readouterr().out.splitlines()
    assert head.startswith("topk: router of moe-engine ")
    assert lines[0] == "  ok      A layer can be built with it, and makes a training step of finite numbers"
    assert lines[-1].endswith("(the router does not give 'smooth_load')") and lines[-1].startswith("  skipped A router")
    assert last == "4 claims: 3 ok, 0 failed, 1 skipped"


def test_a_claim_that_fails_is_named_and_the_exit_code_is_1(constant, capsys):
    assert main(["check", "constant", "topk"]) == 1
    out = capsys.readouterr().out
    assert "  FAILED  router 'constant' breaks 'The task's gradient reaches the logits of every level" in out
    assert "topk: router of moe-engine" in out
    assert out.splitlines()[-1] == "8 claims: 5 ok, 1 failed, 2 skipped"


def test_json_for_programs(constant, capsys):
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


def test_debug_shows_where(constant, capsys):
    main(["check", "constant", "--debug"])
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["topk", "tpok"], "there is no plugin 'tpok'; did you mean 'topk'?"),
        (["topk", "--set", "topk.heat=2"], "router 'topk' has no option 'heat'"),
        (["topk", "--set", "heat"], "setting 'heat' is not of the form plugin.option=value"),
        (["topk", "--set", "z_loss.weight=1"], "options are set for plugin 'z_loss', which is not checked"),
        ([], "Missing argument 'NAME...'"),
    ],
)
def test_a_wrong_word_is_one_sentence_and_exit_code_2(words, sentence, capsys):
    """Before anything is tested."""
    assert main(["check", *words]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert sentence in said.err and said.err.count("\n") == 1
