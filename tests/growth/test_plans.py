"""Which growths make no sense, and where each unit of one that does comes from."""

import pytest

from moe_engine import UsageError
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
