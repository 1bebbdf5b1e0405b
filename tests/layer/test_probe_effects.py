"""Whether the task teaches a router."""

import attrs
import torch

from moe_engine import Engine, hookimpl
from support import refused


def test_a_router_that_cannot_learn_is_refused(install):
    from moe_engine.plugins.routers.topk import TopK, TopKRouter

    @attrs.define(eq=False)
    class Mine:
        @hookimpl
        def moe_router(self, spec):
            return TopKRouter(spec, TopK(renorm=True))

    install("router", "mine", Mine)
    engine = Engine("mine", experts=4, top_k=1)
    layer = engine.moe(3, 4).eval()
    with refused("router-without-gradient", "layer 'moe0'", "level 'expert'"):
        engine.check_learning(lambda: layer(torch.randn(9, 3)).square().mean())


def test_a_router_that_cannot_learn_is_allowed_on_purpose_and_named():
    engine = Engine("topk", ["topk.renorm=true"], experts=4, top_k=1, allow_no_gradient=True)
    allowed, fine = engine.moe(3, 4, name="a").eval(), engine.moe(3, 4, name="b", top_k=2).eval()
    engine.check_learning(lambda: fine(allowed(torch.randn(9, 3))).square().mean())
    remark = engine.plugins.remarks["learning"]
    assert (remark.name, remark.severity) == ("no gradient", 2)
    assert remark.why.startswith("layer 'a': the task gives the router's level 'expert' no gradient")
    assert "'b'" not in remark.why
    with refused("mix-refused", "topk.renorm", "top_k=1"):
        engine.moe(3, 4, allow_no_gradient=False)


def test_a_router_that_learns_is_not_named():
    engine = Engine("topk", experts=4, top_k=1, allow_no_gradient=True)
    layer = engine.moe(3, 4).eval()
    engine.check_learning(lambda: layer(torch.randn(9, 3)).square().mean())
    assert "learning" not in engine.plugins.remarks
