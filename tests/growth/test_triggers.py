"""When triggers are asked, and what they may return."""

import attrs

from moe_engine import Engine, Growth, hookimpl
from rig import Rig
from support import refused


def test_settings_of_one_layer_reach_its_source_but_no_trigger():
    engine = Engine("topk,clone,schedule", experts=3)
    layers = [engine.moe(6, 5, name=f"n{noise}", settings=[f"clone.noise={noise}"]) for noise in (10, 0.001)]
    for layer in layers:
        engine.grow(Growth(layer.name, (1,)))
    far, near = [(one.experts.w_in[3] - one.experts.w_in[1]).norm() for one in layers]
    assert far > 100 * near
    with refused("not-a-layer-plugin", "schedule"):
        engine.moe(6, 5, settings=["schedule.every=3"])


def test_a_skipped_step_asks_no_trigger_again():
    rig = Rig("topk,random,schedule")
    assert rig.engine.due(1.0) == []
    rig.engine.step = 100
    assert len(rig.engine.due(1.0)) == 1
    rig.engine.after_step(skipped=True)
    assert rig.engine.due(1.0) == []


def test_triggers_that_answer_or_remember_nonsense_are_named(install):
    answers = {}

    @attrs.define(eq=False)
    class Odd:
        @hookimpl
        def moe_growth(self, history, memory):
            memory["x"] = answers["memory"]
            return answers["answer"]

    install("growth", "odd", Odd)
    rig = Rig("topk,odd")
    for number, (memory, answer, code) in enumerate(
        ((1, True, "growth-not-a-growth"), ({1}, None, "memory-not-a-number"))
    ):
        rig.engine.step = number + 1
        answers.update(memory=memory, answer=answer)
        with refused(code, "'odd'"):
            rig.engine.due(1.0)
