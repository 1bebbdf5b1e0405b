"""Which growths make no sense, and where each unit of one that does comes from."""

import pytest

from moe_engine import Engine, Growth, UsageError
from moe_engine.growth.plans import plans_of
from rig import Rig, same


@pytest.mark.parametrize(
    ("parents", "more", "sentence"),
    [
        ((9,), {}, "layer 'moe' has no expert 9; they are 0 to 3"),
        ((-1,), {}, "has no expert -1"),
        ((True,), {}, "has no expert True"),
        ((), {"drop": (4,)}, "has no expert 4"),
        ((), {"drop": (0, 1, 2, 3)}, "would remove every expert"),
        ((), {"drop": (0, 1, 2)}, "top_k is 2, but a token can choose 1 to 1"),
        ((), {}, "names no parent and nobody to drop"),
        ((1,), {"drop": (1,)}, "expert 1 of layer 'moe' can't be removed and be a parent"),
        ((0,), {"of": "group"}, "layer 'moe' has no 'group' that could grow; it has expert"),
        ((0,), {"require_exact": True, "probe": None}, "require_exact needs a probe"),
        ((0,), {"require_exact": True}, "initializer 'random' can't keep what a layer with router 'topk' computes"),
        ((), {"drop": (0,), "require_exact": True}, "removal can't keep what a layer with router 'topk' computes"),
        ((0,), {"optimizers": ()}, r"a live AdamW holds this layer's weights; pass it to grow\(..., optimizers"),
    ],
)
def test_what_makes_no_sense_is_refused_and_changes_nothing(parents, more, sentence):
    rig = Rig().train(2)
    before = rig.everything()
    with pytest.raises(UsageError, match=sentence):
        rig.grow(*parents, **more)
    same(before, rig.everything())


@pytest.mark.parametrize(
    ("parents", "drop", "origins", "newcomers"),
    [
        ((1,), (), (0, 1, 2, 3, 1), (4,)),
        ((3, None), (0,), (3, 1, 2, 3, None), (0, 4)),  # the first newcomer replaces what is dropped
        ((), (1, 2), (0, 3), ()),
    ],
)
def test_the_plan_says_where_each_expert_comes_from(parents, drop, origins, newcomers):
    (plan,) = plans_of(Engine("topk", experts=4).moe(6, 5), Growth("moe0", parents, drop=drop)).values()
    assert (plan.origins, plan.newcomers) == (origins, newcomers)


def test_a_group_comes_with_the_experts_of_its_parent():
    layer = Engine("hierarchical", ["hierarchical.groups=2"], experts=4, top_k=1).moe(6, 5)
    plans = plans_of(layer, Growth("moe0", (1,), of="group"))
    assert plans["group"].origins == (0, 1, 1)
    assert plans["expert"].origins == (0, 1, 2, 3, 2, 3)
    assert plans["expert"].homes == (2, 2)
