"""One growth from beginning to end: what it measures, and that all processes do it or none."""

import sys
import warnings

import attrs
import pytest
import torch
from torch import nn

from moe_engine import Growth, RunError, UsageError, hookimpl
from rig import INITIALIZERS, LOSSES, Rig, same
from support import on_ranks, refused


@pytest.mark.parametrize("initializer", INITIALIZERS)
def test_the_loss_moves_by_what_the_probe_measured(initializer):
    rig = Rig(f"topk,{LOSSES},{initializer}").train(20)
    first = float(rig.probe().detach())
    record = rig.grow(2)
    assert (record.loss_before, record.loss_after) == (first, float(rig.probe().detach()))
    assert record.initializer == initializer


def test_the_change_is_that_of_the_layers_output():
    rig = Rig().train(20)
    x = rig.model[0](rig.x).detach()
    with torch.no_grad():
        before = rig.layer.eval()(x)
        record = rig.grow(0)
        after = rig.layer.eval()(x)
    assert record.change == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-5)


def test_the_same_seed_draws_the_same_new_expert_and_random_states_stay():
    one, two = Rig().train(3), Rig().train(3)
    torch.rand(7)
    state = torch.get_rng_state()
    one.grow(1)
    assert torch.equal(torch.get_rng_state(), state)
    two.grow(1)
    assert torch.equal(one.layer.experts.w_in, two.layer.experts.w_in)
    one.grow(1)
    assert not torch.equal(one.layer.experts.w_in[5], one.layer.experts.w_in[4])


def test_random_states_of_every_library_stay(monkeypatch):
    import random

    import numpy as np

    rig = Rig().train(2)

    def probe():
        random.random(), np.random.rand(), torch.rand(())
        return rig.probe()

    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    rig.grow(0, probe=probe)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states


def test_a_part_that_fails_after_the_commit_is_put_back_too(monkeypatch):
    """A rehearsal of the grown layer, and the probe, are part of the transaction."""
    rig = Rig().train(3)
    before = rig.everything()
    monkeypatch.setattr(rig.layer, "_rehearse", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        rig.grow(1)
    monkeypatch.undo()
    same(before, rig.everything())
    calls = []

    def probe():
        calls.append(rig.layer.spec.experts)
        return rig.probe() if len(calls) == 1 else 1 / 0

    with pytest.raises(ZeroDivisionError):
        rig.grow(1, probe=probe)
    assert calls == [4, 5]
    same(before, rig.everything())
    rig.train(2)  # what was put back is in use again


def test_exactness_is_held_against_a_measurement(install):
    """A router's word is not enough."""

    class Liar(sys.modules["moe_engine"].LinearRouter):
        keeps_function = ("copies_expert",)

        def select(self, tokens, levels):
            probs = levels[0].biased.softmax(-1)
            gates, experts = probs.topk(self.top_k)
            return probs, sys.modules["moe_engine"].assign(gates, experts, tokens)

    @attrs.define(eq=False)
    class LiarPlugin:
        @hookimpl
        def moe_router(self, spec):
            return Liar(spec)

    install("router", "liar", LiarPlugin)
    rig = Rig("liar,clone").train(2)
    before = rig.everything()
    with refused("growth-not-exact", "changed its output by 0."):
        rig.grow(0, require_exact=True)
    same(before, rig.everything())
    rig.train(1)


def test_an_exact_growth_is_let_through(install):
    """Gates that do not compete (ReLU, Wang et al., 2024) and a new expert that answers zero."""
    from moe_engine import LinearRouter, assign

    class Relu(LinearRouter):
        keeps_function = ("silent_start",)

        def select(self, tokens, levels):
            gates = levels[0].biased.relu()
            experts = torch.arange(gates.shape[1]).expand_as(gates)
            return None, assign(gates, experts, tokens)

    @attrs.define(eq=False)
    class ReluPlugin:
        @hookimpl
        def moe_router(self, spec):
            return Relu(spec)

    install("router", "relu_like", ReluPlugin)
    rig = Rig("relu_like,zero_output").train(5)
    record = rig.grow(0, require_exact=True)
    assert record.change <= 1e-5
    assert record.loss_after == pytest.approx(record.loss_before, rel=1e-5)


def _process(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    rig = Rig("topk,saturation,switch_aux,split,schedule")
    rig.random.manual_seed(rank)
    parallel = nn.parallel.DistributedDataParallel(rig.model)
    for _ in range(3):
        rig.step(parallel)
    said = []
    for kind, more in (
        ("forgotten", {}),
        ("other failed", {"followers": parallel, "probe": (lambda: 1 / 0) if rank else rig.probe}),
    ):
        try:
            rig.grow(1, **more)
        except (RunError, UsageError, ZeroDivisionError) as error:
            said.append(f"{kind}: {type(error).__name__} {error}")
    try:
        rig.grow(rank, followers=parallel)
    except RunError as error:
        said.append(str(error))
    del more  # or it keeps the first DistributedDataParallel alive
    sizes = [rig.layer.spec.experts]
    for _ in range(3):
        (wanted,) = rig.engine.due(float(rank)) or (Growth("moe", (rig.layer.spec.experts - 1,)),)
        rig.engine.grow(wanted, rig.optimizer, followers=parallel, probe=rig.probe)
        parallel = nn.parallel.DistributedDataParallel(rig.model)
        for _ in range(2):
            rig.step(parallel)
        sizes.append(rig.layer.spec.experts)
    tokens = rig.layer.sums.take_since_log()["tokens"].item()
    torch.save([said, sizes, tokens, rig.model.state_dict()], f"{folder}/{rank}")
    torch.distributed.destroy_process_group()


def test_two_processes_grow_alike_or_not_at_all(tmp_path):
    on_ranks(_process, str(tmp_path))
    one, two = (torch.load(tmp_path / str(rank), weights_only=True) for rank in range(2))
    assert "a live DistributedDataParallel holds this layer" in one[0][0]
    assert "rebuild it after the growth" in two[0][0]
    assert "was not done, because it failed in another process" in one[0][1]
    assert "ZeroDivisionError" in two[0][1]
    assert all(said[2].endswith("was not done, because processes disagree") for said in (one[0], two[0]))
    assert one[1] == two[1] == [4, 5, 6, 7]
    assert one[2] == two[2] == 2 * 2 * 64
    for name, value in one[3].items():
        assert torch.equal(value, two[3][name]), name


def test_no_growth_is_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Rig().train(2).grow(0).after == 5
