"""Which growths make no sense, and where each unit of one that does comes from."""

import re

import pytest
import torch

from moe_engine import Engine, Growth, UsageError
from moe_engine.growth.plans import plans_of
from rig import Rig, same
from support import refused


@pytest.mark.parametrize(
    ("parents", "more", "code", "words"),
    [
        ((9,), {}, "bad-growth", "layer 'moe' has no expert 9; they are 0 to 3"),
        ((-1,), {}, "bad-growth", "no expert -1"),
        ((True,), {}, "bad-growth", "no expert True"),
        ((), {"drop": (4,)}, "bad-growth", "no expert 4"),
        ((), {"drop": (0, 1, 2, 3)}, "bad-growth", "every expert"),
        ((), {"drop": (0, 1, 2)}, "bad-layer-spec", "top_k=2"),
        ((), {}, "bad-growth", "does nothing"),
        ((1,), {"drop": (1,)}, "bad-growth", "expert 1 of layer 'moe'"),
        ((0,), {"of": "group"}, "unknown-population", "no 'group'"),
        ((0,), {"require_exact": True, "probe": None}, "growth-needs-probe", "require_exact"),
        ((0,), {"require_exact": True}, "growth-not-exact", "initializer 'random' can't preserve"),
        ((), {"drop": (0,), "require_exact": True}, "growth-not-exact", "removal can't preserve"),
        ((0,), {"optimizers": ()}, None, "AdamW"),
    ],
)
def test_what_makes_no_sense_is_refused_and_changes_nothing(parents, more, code, words):
    rig = Rig().train(2)
    before = rig.everything()
    with pytest.raises(UsageError, match=re.escape(words)) as caught:
        rig.grow(*parents, **more)
    assert code in (None, caught.value.code)
    same(before, rig.everything())


@pytest.mark.parametrize(
    ("parents", "drop", "origins", "added"),
    [
        ((1,), (), (0, 1, 2, 3, 1), (4,)),
        ((3, None), (0,), (3, 1, 2, 3, None), (0, 4)),  # the first new expert replaces what is dropped
        ((), (1, 2), (0, 3), ()),
    ],
)
def test_the_plan_says_where_each_expert_comes_from(parents, drop, origins, added):
    (plan,) = plans_of(Engine("topk", experts=4).moe(6, 5), Growth("moe0", parents, drop=drop)).values()
    assert (plan.origins, plan.added) == (origins, added)


def test_a_group_comes_with_the_experts_of_its_parent():
    layer = Engine("hierarchical", ["hierarchical.groups=2"], experts=4, top_k=1).moe(6, 5)
    plans = plans_of(layer, Growth("moe0", (1,), of="group"))
    assert plans["group"].origins == (0, 1, 1)
    assert plans["expert"].origins == (0, 1, 2, 3, 2, 3)
    assert plans["expert"].homes == (2, 2)


def test_a_growth_may_give_each_new_expert_a_row_of_its_own():
    rig = Rig("topk,random")
    rows_ND = torch.randn(2, rig.layer.spec.dim)
    rig.engine.grow(Growth("moe", (0, 1), rows={"router.weight": rows_ND}), rig.optimizer)
    assert torch.equal(rig.layer.router.weight[-2:], rows_ND)
    rig.engine.grow(Growth("moe", (0, 1), rows={"router.weight": rows_ND[0]}), rig.optimizer)
    assert torch.equal(rig.layer.router.weight[-2:], rows_ND[:1].expand(2, -1))
    rig.engine.grow(Growth("moe", (2,), drop=(1,), rows={"router.weight": rows_ND[1:]}), rig.optimizer)
    assert torch.equal(rig.layer.router.weight[1], rows_ND[1])


def test_rows_of_another_shape_are_the_growths_fault():
    rig = Rig("topk,random").train(2)
    before = rig.everything()
    with refused("bad-growth", "rows 'router.weight' of the growth of 'moe'", "[3, 6]", "[2, 6], or [6] for all"):
        rig.engine.grow(Growth("moe", (0, 1), rows={"router.weight": torch.zeros(3, 6)}), rig.optimizer)
    same(before, rig.everything())
