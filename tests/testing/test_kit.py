"""The kit's own ways: by name, class or instance, with settings, one by one or together, without pytest."""

import subprocess
import sys
import unittest

import attrs
import pytest
import torch
from faults import Top

from moe_engine import Traits, UsageError, assign, hookimpl, option
from moe_engine.testing import CLAIMS, Broken, NotApplicable, check_loss, check_router, checks
from moe_engine.testing.subjects import subject


@attrs.define(eq=False)
class Tempered:
    """A router that may choose its best expert K times."""

    twice: bool = option(False, help="be broken")

    @hookimpl
    def moe_router(self, spec):
        return Twice(spec) if self.twice else Top(spec)


class Twice(Top):
    def select(self, tokens, levels):
        probs_TE = self.probs(levels[0])
        best_TK = self.ranked(levels[0], probs_TE).argmax(-1, keepdim=True).expand(-1, self.top_k)
        return probs_TE, assign(self.gates(probs_TE.gather(-1, best_TK)), best_TK, tokens)


FEW = ("builds", "learns_from_the_task", "choices_are_valid", "top_k_is_kept", "extreme_values_stay_finite")


@pytest.fixture
def few(monkeypatch):
    """Only some claims, to save time."""
    chosen = [claim for claim in CLAIMS if claim.name in FEW]
    monkeypatch.setattr("moe_engine.testing.checking.CLAIMS", chosen)


@pytest.mark.parametrize("check", [one for one in checks(Tempered) if one.claim.name in FEW], ids=str)
def test_one_line_of_pytest_is_enough(check):
    """The way that the documentation shows."""
    check()


def test_a_check_says_what_it_is():
    """An id for pytest; the names of claims differ."""
    assert str(checks(Tempered)[0]) == "tempered: builds"
    names = [claim.name for claim in CLAIMS]
    assert len(names) == len(set(names))
    assert all(claim.says and claim.hooks for claim in CLAIMS)


def test_an_installed_plugin_is_known_by_its_class_too():
    from moe_engine.plugins.routers.topk import TopK

    assert (subject(TopK).name, subject(TopK).found.distribution) == ("topk", "moe-engine")


def test_all_that_fails_is_one_error(few):
    """Settings reach the plugin, whether typed or as an instance; the error names every claim that fails."""
    check_router(Tempered)
    with pytest.raises(Broken) as typed:
        check_router(Tempered, ["tempered.twice=yes"])
    with pytest.raises(Broken) as given:
        check_router(Tempered(twice=True))
    assert str(typed.value) == str(given.value)
    assert str(typed.value).startswith("2 of 5 claims fail: router 'tempered' breaks 'The task's gradient")
    assert "and router 'tempered' breaks 'Each choice is a real token's" in str(typed.value)


def test_what_is_no_such_plugin_is_refused():
    with pytest.raises(UsageError, match="router 'tempered' is no loss: it does not implement moe_aux_loss"):
        check_loss(Tempered)
    with pytest.raises(UsageError, match="there is no plugin 'tpok'; did you mean 'topk'"):
        check_router("tpok")
    with pytest.raises(UsageError, match="dict is no plugin: it implements none of moe_router"):
        check_router(dict)


def test_what_does_not_apply_is_skipped_in_any_runner():
    assert issubclass(NotApplicable, unittest.SkipTest)
    (fixed,) = [one for one in checks("z_loss") if one.claim.name == "value_at_balance_is_as_declared"]
    with pytest.raises(NotApplicable, match="its value at balance is not fixed"):
        fixed()


def test_a_loss_gets_a_router_that_gives_what_it_needs():
    """By traits: the first router that gives what the default one does not."""

    @attrs.define(eq=False)
    class Smooth:
        traits = Traits(requires=("smooth_load",))

        @hookimpl
        def moe_aux_loss(self, routing):
            load = routing.smooth_load
            return (load / load.sum().clamp(min=1)).square().sum()

    assert subject(Smooth).routers == ["noisy_topk"]
    (builds, *_) = checks(Smooth)
    builds()


def test_checks_leave_the_callers_random_state_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    checks("topk")[0]()
    assert torch.equal(expected, torch.rand(1))


def test_the_kit_needs_no_pytest():
    """It is part of what is installed, which has no pytest."""
    code = "import sys, moe_engine.testing; sys.exit('pytest' in sys.modules)"
    assert not subprocess.run([sys.executable, "-c", code], check=False).returncode
