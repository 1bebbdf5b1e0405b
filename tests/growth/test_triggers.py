"""When triggers are asked, and what they may return."""

import attrs

from moe_engine import Engine, Growth, hookimpl
from moe_engine.cli import main
from moe_engine.run.folder import read_run
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


def test_after_the_last_step_nothing_is_added_but_experts_are_still_removed_and_merged(install):
    """Growths that add or replace an expert are withheld; those that leave only trained experts are not."""
    wanted = [Growth("moe", (0,)), Growth("moe", (1,), drop=(0,)), Growth("moe", drop=(2,)), Growth("moe", ((0, 1),))]

    @attrs.define(eq=False)
    class Eager:
        @hookimpl
        def moe_growth(self, history):
            return wanted

    install("growth", "eager", Eager)
    rig = Rig("topk,random,eager")
    said = []
    rig.engine.triggers.add_until(0.8, 10, said.append)
    for step, count in ((8, 4), (9, 2), (10, 2)):
        rig.engine.step = step
        assert len(rig.engine.due(1.0)) == count
    assert said == ["step 9: eager asked for a growth of moe, but no expert is added after step 8 of 10 (--grow-until)"]


def test_a_run_adds_no_expert_in_its_last_fifth_and_says_so_once(tmp_path, capsys):
    """20 steps, growth every 6: at 6 and 12; 18 is after 0.8 x 20 = 16, unless --grow-until 1."""
    words = ["run", "--task", "blobs", "--set", "blobs.images=640", "--set", "blobs.test_images=64", "--epochs", "2"]
    words += ["--plugins", "schedule", "--set", "schedule.every=6", "--experts", "3", "--no-plugin", "plots,html"]
    for flags, steps in (([], [6, 12]), (["--grow-until", "1"], [6, 12, 18])):
        folder = tmp_path / str(len(steps))
        assert main([*words, *flags, "--out", str(folder)]) == 0
        assert [grown["step"] for grown in read_run(folder).summary["growths"]] == steps
        told = capsys.readouterr().err
        assert told.count("no expert is added after step 16 of 20 (--grow-until)") == (len(steps) == 2)
