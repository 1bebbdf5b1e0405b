"""The kit itself: plugins by name, class or instance, with settings, checked one by one or together, without pytest."""

import inspect
import unittest

import attrs
import pytest
import torch
from faults import Top

import moe_engine.testing
from moe_engine import (
    LevelSpec,
    PluginError,
    Router,
    StackedMLP,
    Traits,
    UsageError,
    assign,
    hookimpl,
    linear_logits,
    option,
    uniform,
)
from moe_engine.testing import CLAIMS, Broken, NotApplicable, check_loss, check_router, checks, results
from moe_engine.testing.plugin_under_test import HOOK_OF, plugin_under_test
from support import refused


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


@pytest.mark.parametrize("check", [check for check in checks(Tempered) if check.claim.name in FEW], ids=str)
def test_the_documented_lines_are_enough(check):
    check()


def test_a_check_names_the_plugin_and_the_claim():
    """An id for pytest; the names of claims differ."""
    assert str(checks(Tempered)[0]) == "tempered: builds"
    names = [claim.name for claim in CLAIMS]
    assert len(names) == len(set(names))
    assert all(claim.says and claim.hooks for claim in CLAIMS)


def test_every_public_name_has_a_docstring():
    assert {f"check_{kind}" for kind in HOOK_OF} <= set(vars(moe_engine.testing))
    for name, value in vars(moe_engine.testing).items():
        if not name.startswith("_") and not inspect.ismodule(value) and name != "CLAIMS":
            assert value.__doc__, name
    assert check_router.__name__ == "check_router" and "implements moe_router" in check_router.__doc__


def test_an_installed_plugin_is_recognised_by_its_class():
    from moe_engine.plugins.routers.topk import TopK

    assert (plugin_under_test(TopK).name, plugin_under_test(TopK).found.distribution) == ("topk", "moe-engine")


def test_all_failures_are_one_error(few):
    """Settings reach the plugin, as text or in an instance; the error names every claim that fails."""
    check_router(Tempered)
    with pytest.raises(Broken) as as_text:
        check_router(Tempered, ["tempered.twice=yes"])
    with pytest.raises(Broken) as as_instance:
        check_router(Tempered(twice=True))
    assert str(as_text.value) == str(as_instance.value)
    assert as_text.value.claims == ("learns_from_the_task", "choices_are_valid")
    assert str(as_text.value).startswith("2 of 5 claims fail: router 'tempered' breaks 'The task's gradient")
    assert "and router 'tempered' breaks 'Only real tokens choose" in str(as_text.value)


def test_a_failed_check_names_its_claim():
    check = next(check for check in checks(Tempered, ["tempered.twice=1"]) if check.claim.name == "choices_are_valid")
    with pytest.raises(Broken) as failure:
        check()
    assert failure.value.claims == ("choices_are_valid",)


def test_a_plugin_of_another_kind_is_refused():
    with refused("wrong-kind", "router 'tempered'", "moe_aux_loss"):
        check_loss(Tempered)
    with pytest.raises(UsageError, match="tpok.*topk"):
        check_router("tpok")
    with refused("not-a-plugin", "dict", "moe_router", kind=PluginError):
        check_router(dict)


def test_a_claim_that_does_not_apply_is_skipped_in_any_runner():
    assert issubclass(NotApplicable, unittest.SkipTest)
    (at_balance,) = [check for check in checks("z_loss") if check.claim.name == "value_at_balance_is_as_declared"]
    with pytest.raises(NotApplicable, match="declare no value at balance"):
        at_balance()


def test_a_loss_runs_with_a_router_that_provides_what_it_requires():
    """The first router that provides what the default one does not."""

    @attrs.define(eq=False)
    class Smooth:
        traits = Traits(requires=("smooth_load",))

        @hookimpl
        def moe_aux_loss(self, routing):
            load = routing.smooth_load
            return (load / load.sum().clamp(min=1)).square().sum()

    assert plugin_under_test(Smooth).routers == ["noisy_topk"]
    (builds, *_) = checks(Smooth)
    builds()


def test_a_plugin_that_fits_no_router_is_refused():
    @attrs.define(eq=False)
    class Demanding:
        traits = Traits(requires=("smooth_load",))

        @hookimpl
        def moe_aux_loss(self, routing):
            return routing.smooth_load.sum()

    tested = plugin_under_test(Demanding)
    tested.installed = {name: found for name, found in tested.installed.items() if found[0].kind != "router"} | {
        "topk": tested.installed["topk"]
    }
    with refused("no-fitting-router", "loss 'demanding'", "smooth_load"):
        _ = tested.routers


def test_checks_leave_the_callers_random_state_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    checks("topk")[0]()
    assert torch.equal(expected, torch.rand(1))


def test_the_kit_needs_no_pytest(commands):
    """It ships in the package, which does not depend on pytest."""
    code = "import sys, moe_engine.testing; sys.exit('pytest' in sys.modules)"
    assert not commands.run(["-c", code]).returncode


class ThreeLevels(Router):
    """A half of the experts, the best K of its parts, and the best expert of each."""

    def __init__(self, spec):
        super().__init__()
        self.top_k, self.parts = spec.top_k, 3 if spec.experts % 3 == 0 else 4
        for name, size in (("half", 2), ("part", 2 * self.parts), ("expert", spec.experts)):
            self.expert_param(f"{name}_weight", (size, spec.dim), fresh=uniform(spec.dim), role="logit_row", of=name)
        self.expert_buffer("part_of", torch.arange(spec.experts) * 2 * self.parts // spec.experts, values="part")

    @property
    def levels(self):
        sizes = (len(self.half_weight), len(self.part_weight), len(self.expert_weight))
        names, chosen = ("half", "part", "expert"), (1, self.top_k, self.top_k)
        return tuple(LevelSpec(*each, limited=each[0] != "half") for each in zip(names, sizes, chosen, strict=True))

    def unit_of_expert(self, level):
        return {"half": self.part_of // self.parts, "part": self.part_of}.get(level)

    def competes_in(self, level):
        return {"part": torch.arange(len(self.part_weight)) // self.parts, "expert": self.part_of}.get(level)

    def score(self, tokens):
        return tuple(linear_logits(tokens.x, w) for w in (self.half_weight, self.part_weight, self.expert_weight))

    def select(self, tokens, levels):
        half, part, expert = levels
        best_T1 = half.select_by(half.biased).argmax(-1, keepdim=True)
        open_TP = torch.arange(len(self.part_weight)) // self.parts == best_T1
        part_TK = part.select_by(part.biased).masked_fill(~open_TP, -torch.inf).topk(self.top_k, dim=-1).indices
        inside_TKE = self.part_of == part_TK[..., None]
        expert_TK = expert.select_by(expert.biased)[:, None].masked_fill(~inside_TKE, -torch.inf).argmax(-1)
        by_part_TP = half.biased.softmax(-1).repeat_interleave(self.parts, -1) * part.biased.softmax(-1)
        probs_TE = by_part_TP[:, self.part_of] * expert.biased.softmax(-1)
        probs_TE = probs_TE / probs_TE.sum(-1, keepdim=True)
        return probs_TE, assign(probs_TE.gather(-1, expert_TK), expert_TK, tokens)


def test_a_router_of_three_levels_keeps_the_claims_about_choices():
    @attrs.define(eq=False)
    class Three:
        @hookimpl
        def moe_router(self, spec):
            return ThreeLevels(spec)

    wanted = ("ties_are_spread", "padding_changes_nothing", "sequence_order_changes_nothing", "choices_are_valid")
    several = [check for check in checks(Three) if check.claim.name in wanted]
    assert [(one.outcome, one.why) for one in results(several)] == [("ok", None)] * 4


def test_experts_without_parameters_keep_the_claims_about_experts():
    """As the zero and copy experts of MoE++: their gradient is 0, with tokens too."""

    class SomeCopies(StackedMLP):
        def forward(self, x_ND, counts_E):
            y_ND = super().forward(x_ND, counts_E)
            copied_N = torch.arange(len(x_ND)) < counts_E[:2].sum()
            return torch.where(copied_N[:, None], x_ND, y_ND)

        def outputs(self, x_SD):
            return torch.cat([x_SD.expand(2, -1, -1), super().outputs(x_SD)[2:]])

    @attrs.define(eq=False)
    class Copies:
        @hookimpl
        def moe_experts(self, spec):
            return SomeCopies(spec)

    wanted = ("expert_grad_is_per_expert", "forward_agrees_with_outputs", "rows_are_independent")
    several = [check for check in checks(Copies) if check.claim.name in wanted]
    assert [(one.outcome, one.why) for one in results(several)] == [("ok", None)] * 3
