"""Growth, removal and replacement of experts of a live layer: all of it or nothing."""

import copy
import gc
import re
import resource
import sys
import warnings

import attrs
import pytest
import torch
import torch.nn.utils.prune
from torch import nn

from moe_engine import Engine, Growth, NewExpert, RunError, UsageError, adam, hookimpl
from moe_engine import optimizer_state as optimizers
from moe_engine.contract import growth
from moe_engine.contract.parts import Part
from moe_engine.growth import transaction
from support import refused

INITIALIZERS = ("random", "zero_output", "clone", "split")
ROUTERS = ("topk", "sigmoid_topk", "hierarchical")
LOSSES = "saturation,loss_free,switch_aux"


class Rig:
    """A small model, its engine, an optimizer and a fixed batch to probe with."""

    def __init__(self, plugins="topk,saturation,loss_free,switch_aux,random", optimizer=adam, experts=4, **spec):
        torch.manual_seed(0)
        self.engine = Engine(plugins, experts=experts, **{"top_k": 2, **spec})
        self.layer = self.engine.moe(6, 5, bias=True, name="moe")
        self.model = nn.Sequential(nn.Linear(3, 6), self.layer, nn.Linear(6, 1))
        self.optimizer = optimizer(self.model, 1e-2)
        self.random = torch.Generator().manual_seed(0)
        self.x = torch.randn(32, 3, generator=self.random)

    def loss(self, x, model=None):
        return ((model or self.model)(x) - x.sum(1, keepdim=True).sin()).square().mean()

    def probe(self):
        self.model.eval()
        loss = self.loss(self.x)
        self.model.train()
        return loss

    def step(self, model=None):
        loss = self.loss(torch.randn(64, 3, generator=self.random), model)
        (loss + self.engine.aux_loss()).backward()
        self.engine.after_backward()
        self.optimizer.step()
        self.engine.after_step()
        self.optimizer.zero_grad()
        return loss.detach()

    def train(self, steps):
        for _ in range(steps):
            self.step()
        return self

    def grow(self, *parents, **more):
        more = {"optimizers": self.optimizer, "probe": self.probe, **more}
        wanted = {name: more.pop(name) for name in ("drop", "of", "require_exact") if name in more}
        return self.engine.grow(Growth("moe", parents, **wanted), **more)

    def everything(self):
        """All that a growth may touch, as copies."""
        tensors = {**self.model.state_dict(), "step_sums": self.layer.sums.step, "seen": self.layer.sums.evaluated}
        tensors |= {"aux_value": self.layer.sums.aux_value, "window": self.layer.sums.since_log}
        state = self.optimizer.state_dict()["state"]
        tensors |= {f"{i}.{key}": value for i, own in state.items() for key, value in own.items()}
        kept = {name: value.detach().clone() for name, value in tensors.items() if isinstance(value, torch.Tensor)}
        ids = [(id(p), p.data_ptr(), p.requires_grad) for p in self.model.parameters()]
        order = [id(p) for p in self.optimizer.state]
        plain = (
            self.layer.spec,
            dict(self.layer.sizes),
            dict(self.layer.sums.layout),
            dict(self.layer.sums.step_layout),
        )
        return kept, (ids, order, plain, len(self.engine.growths), torch.get_rng_state().tolist())


def same(one, two):
    assert one[1] == two[1]
    assert one[0].keys() == two[0].keys()
    for name, value in one[0].items():
        assert torch.equal(value, two[0][name]), name


# -- what a growth does ------------------------------------------------------------------------------


@pytest.mark.parametrize("initializer", INITIALIZERS)
@pytest.mark.parametrize("router", ROUTERS)
def test_old_experts_and_their_moments_stay_bit_for_bit(router, initializer):
    rig = Rig(f"{router},{LOSSES},{initializer}", experts=6).train(5)
    before = {n: p.detach().clone() for n, p in rig.layer.named_parameters()}
    moments = {n: copy.deepcopy(rig.optimizer.state[p]) for n, p in rig.layer.named_parameters()}
    record = rig.grow(1)
    assert (record.before, record.after, record.rows) == (6, 7, (*range(6), None))
    for name, parameter in rig.layer.named_parameters():
        if "group_weight" in name:
            continue
        kept = [row for row in range(6) if not (initializer == "split" and row == 1)]
        assert torch.equal(parameter[kept], before[name][kept]), name
        for key in ("exp_avg", "exp_avg_sq"):
            state = rig.optimizer.state[parameter]
            assert torch.equal(state[key][:6], moments[name][key]), (name, key)
            assert torch.equal(state["step"], moments[name]["step"])
    rig.train(5)


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


def test_newcomers_of_each_source_are_what_they_say():
    def newcomer(initializer, settings=()):
        rig = Rig(f"topk,{initializer}").train(3)
        before = copy.deepcopy(rig.layer)
        rig.grow(1)
        return before.requires_grad_(False), rig.layer.requires_grad_(False)

    before, after = newcomer("random")
    assert after.experts.w_in[4].abs().max() <= 6**-0.5
    assert not torch.equal(after.experts.w_in[4], before.experts.w_in[1])
    before, after = newcomer("zero_output")
    assert not after.experts.w_out[4].any()
    assert not after.experts.b_out[4].any()
    assert after.experts.w_in[4].any()
    before, after = newcomer("clone")
    assert torch.equal(after.router.weight[4], before.router.weight[1])
    noise = after.experts.w_in[4] - before.experts.w_in[1]
    assert float(noise.std() / before.experts.w_in[1].std()) == pytest.approx(0.01, rel=0.5)
    before, after = newcomer("split")
    for name in ("w_in", "w_out", "b_in", "b_out"):
        old, new = getattr(before.experts, name), getattr(after.experts, name)
        assert not torch.equal(new[1], old[1])
        torch.testing.assert_close((new[1] + new[4]) / 2, old[1])
    torch.testing.assert_close((after.router.weight[1] + after.router.weight[4]) / 2, before.router.weight[1])


def test_a_parent_of_several_is_split_again_and_again():
    rig = Rig("topk,split").train(3)
    before = rig.layer.experts.w_in[1].detach().clone()
    rig.grow(1, 1, 1)
    rows = rig.layer.experts.w_in.detach()[[1, 4, 5, 6]]
    assert len({float(row.sum()) for row in rows}) == 4
    torch.testing.assert_close(rows[3] + rows[0] + (rows[2] - rows[3] - rows[0]), rows[2])
    assert (rows.mean(0) - before).norm() < before.norm()


def test_moments_of_a_newcomer():
    """Copied with a copy; else 0, and the mean of squares where no bias is corrected for."""
    for initializer, copied in (("clone", True), ("split", True), ("random", False), ("zero_output", False)):
        rig = Rig(f"topk,{initializer}").train(10)
        rig.grow(1)
        state = rig.optimizer.state[rig.layer.experts.w_in]
        if copied:
            assert torch.equal(state["exp_avg"][4], state["exp_avg"][1])
            assert torch.equal(state["exp_avg_sq"][4], state["exp_avg_sq"][1])
        else:
            assert not state["exp_avg"][4].any()
            assert not state["exp_avg_sq"][4].any()
    rig = Rig("topk,random", optimizer=lambda model, lr: torch.optim.RMSprop(model.parameters(), lr)).train(10)
    rig.grow(1)
    squares = rig.optimizer.state[rig.layer.experts.w_in]["square_avg"]
    torch.testing.assert_close(squares[4], squares[:4].mean(0))


def test_biases_and_histories_follow_their_rules():
    rig = Rig(experts=4).train(10)
    saturation, loss_free = rig.layer.biases[0]["saturation"], rig.layer.biases[0]["loss_free"]
    s, b = saturation.s.clone(), loss_free.b.clone()
    rig.grow(3)
    torch.testing.assert_close(saturation.s, torch.cat([s, s.mean()[None]]))
    grown = torch.cat([b, b[3:]])
    torch.testing.assert_close(loss_free.b, grown - grown.mean())


def test_removal_and_replacement():
    rig = Rig(experts=5).train(3)
    rows = rig.layer.router.weight.detach().clone()
    record = rig.grow(drop=(1, 3))
    assert (record.rows, record.drop, record.initializer, rig.layer.spec.experts) == ((0, 2, 4), (1, 3), None, 3)
    assert torch.equal(rig.layer.router.weight, rows[[0, 2, 4]])
    record = rig.grow(0, drop=(1,))
    assert (record.rows, record.parents, rig.layer.spec.experts) == ((0, None, 2), (0,), 3)
    assert torch.equal(rig.layer.router.weight[[0, 2]], rows[[0, 4]])
    assert not torch.equal(rig.layer.router.weight[1], rows[2])
    rig.train(3)


def test_whole_groups_come_and_go():
    rig = Rig(f"hierarchical,{LOSSES},clone", experts=6).train(3)
    router = rig.layer.router
    rows = router.group_weight.detach().clone()
    record = rig.grow(1, of="group")
    assert (record.before, record.after, record.parents) == (6, 9, (3, 4, 5))
    assert router.group_of.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert torch.equal(router.group_weight, rows[[0, 1, 1]])
    assert rig.layer.biases[0]["saturation"].s.shape == (3,)
    assert rig.layer.biases[1]["saturation"].s.shape == (9,)
    rig.train(3)
    record = rig.grow(drop=(0,), of="group")
    assert router.group_of.tolist() == [0, 0, 0, 1, 1, 1]
    rig.grow(drop=(1,), of="group")  # one group remains, whatever the option says
    rig.grow(0, of="group")
    record = rig.grow(1, drop=(0,), of="group")
    assert (record.rows, router.group_of.tolist()) == ((None, None, None, 3, 4, 5), [0, 0, 0, 1, 1, 1])
    rig.grow(0)  # one more in the first group alone
    assert router.group_of.tolist() == [0, 0, 0, 1, 1, 1, 0]
    rig.train(3)


def test_the_same_seed_draws_the_same_newcomer_and_random_states_stay():
    one, two = Rig().train(3), Rig().train(3)
    torch.rand(7)
    state = torch.get_rng_state()
    one.grow(1)
    assert torch.equal(torch.get_rng_state(), state)
    two.grow(1)
    assert torch.equal(one.layer.experts.w_in, two.layer.experts.w_in)
    one.grow(1)
    assert not torch.equal(one.layer.experts.w_in[5], one.layer.experts.w_in[4])


def test_a_frozen_layer_grows_and_loads_and_stays_frozen():
    rig = Rig(optimizer=lambda model, lr: adam(model[2], lr))
    rig.layer.requires_grad_(False)
    rig.grow(0, optimizers=())
    rig.layer.load_state_dict(Rig(experts=7).layer.state_dict())
    assert rig.layer.spec.experts == 7
    assert not any(parameter.requires_grad for parameter in rig.layer.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("initializer", INITIALIZERS)
def test_a_layer_of_any_precision_grows_and_loads(dtype, initializer):
    rig = Rig(f"topk,saturation,switch_aux,{initializer}")
    rig.model.to(dtype)
    rig.x = rig.x.to(dtype)
    record = rig.grow(1)
    assert record.change >= 0
    assert {p.dtype for p in rig.model.parameters()} == {dtype}
    small = Rig(f"topk,saturation,switch_aux,{initializer}")
    small.model.to(dtype).load_state_dict(rig.model.state_dict())
    assert torch.equal(small.model(rig.x), rig.model(rig.x))


def test_layers_of_one_model_grow_by_themselves():
    """Blocks that were made by copying one another have the same past, and separate futures."""
    engine = Engine("topk,clone", experts=4)
    block = nn.Sequential(nn.Linear(6, 6), engine.moe(6, 5))
    model = nn.Sequential(block, copy.deepcopy(block), copy.deepcopy(block))
    engine.attach(model)
    average = torch.optim.swa_utils.AveragedModel(model)
    engine.grow(Growth("1.1", (0,)), followers=average)
    sizes = [layer.spec.experts for layer in (*engine.layers, *Engine("topk").attach(average).layers)]
    assert sizes == [4, 5, 4, 4, 5, 4]


def test_settings_of_one_layer_reach_its_source_but_no_trigger():
    engine = Engine("topk,clone,schedule", experts=3)
    layers = [engine.moe(6, 5, name=f"n{noise}", settings=[f"clone.noise={noise}"]) for noise in (10, 0.001)]
    for layer in layers:
        engine.grow(Growth(layer.name, (1,)))
    far, near = [(one.experts.w_in[3] - one.experts.w_in[1]).norm() for one in layers]
    assert far > 100 * near
    with refused("not-a-layer-plugin", "schedule"):
        engine.moe(6, 5, settings=["schedule.every=3"])


# -- optimizers --------------------------------------------------------------------------------------

OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, 1e-2),
    "adam fused": lambda p: torch.optim.Adam(p, 1e-2, fused=True),
    "amsgrad": lambda p: torch.optim.Adam(p, 1e-2, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2),
    "adamw fused": lambda p: torch.optim.AdamW(p, 1e-2, fused=True),
    "adamw foreach": lambda p: torch.optim.AdamW(p, 1e-2, foreach=True),
    "sgd": lambda p: torch.optim.SGD(p, 1e-2),
    "momentum": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9, nesterov=True),
    "momentum fused": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-2, centered=True, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, 1e-2, initial_accumulator_value=0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p, 1e-1),
    "adamax": lambda p: torch.optim.Adamax(p, 1e-2),
    "nadam": lambda p: torch.optim.NAdam(p, 1e-2),
    "radam": lambda p: torch.optim.RAdam(p, 1e-2),
    "rprop": lambda p: torch.optim.Rprop(p, 1e-3),
    "asgd": lambda p: torch.optim.ASGD(p, 1e-2),
    "adafactor": lambda p: torch.optim.Adafactor(p, 1e-2),
}


@pytest.mark.parametrize("initializer", ["random", "split"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_go_on(name, initializer):
    """Kept state is kept, a newcomer's is finite, and all rows learn."""
    rig = Rig(f"topk,{initializer}", optimizer=lambda model, _: OPTIMIZERS[name](model.parameters())).train(4)
    before = copy.deepcopy(rig.optimizer.state_dict()["state"])
    order = list(rig.optimizer.state)
    rig.grow(1)
    rig.grow(drop=(0,))
    for number, own in rig.optimizer.state_dict()["state"].items():
        parameter = rig.optimizer.param_groups[0]["params"][number]
        for key, value in own.items():
            if isinstance(value, torch.Tensor) and value.dim():
                assert value.isfinite().all(), key
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape != before[number][key].shape:
                assert torch.equal(value[:3], before[number][key][1:]), key
    assert all(one is two for one, two in zip(rig.optimizer.state, order, strict=True))
    rows = rig.layer.router.weight.detach().clone()
    rig.train(10)
    assert rig.layer.router.weight.isfinite().all()
    assert (rig.layer.router.weight != rows).all()


def test_a_state_without_the_parameters_shape_is_refused_by_name():
    rig = Rig("topk", optimizer=lambda model, _: torch.optim.LBFGS(model.parameters()))
    rig.optimizer.state[rig.layer.router.weight]["d"] = torch.zeros(7)
    with pytest.raises(UsageError, match="LBFGS keeps 'd', which no rule can grow; use Adam"):
        rig.grow(0)
    rig = Rig("topk,random").train(2)
    rig.optimizer.state[rig.layer.router.weight]["factor"] = torch.zeros(4, 1)
    with pytest.raises(UsageError, match=r"AdamW keeps 'factor' of shape \[4, 1\] for 'router.weight' \[4, 6\]"):
        rig.grow(0)
    rig = Rig("topk,random").train(2)
    rig.optimizer.state[rig.layer.router.weight]["mystery"] = torch.ones(4, 6)
    with pytest.raises(UsageError, match="AdamW keeps 'mystery' for each weight of 'router.weight'.*such as clone"):
        rig.grow(0)
    rig = Rig("topk,clone").train(2)
    rig.optimizer.state[rig.layer.router.weight]["mystery"] = torch.ones(4, 6)
    rig.grow(0)
    assert rig.optimizer.state[rig.layer.router.weight]["mystery"].shape == (5, 6)
    rig = Rig("topk", experts=1, top_k=1, optimizer=lambda model, _: OPTIMIZERS["adafactor"](model.parameters()))
    with pytest.raises(UsageError, match="Adafactor keeps"):  # with one expert a factor looks like a row
        rig.train(2).grow(0)


def test_a_newcomer_of_adam_steps_further_than_the_others_at_first():
    """Both moments at 0 beside an old step counter: lr (1 - beta1) / sqrt(1 - beta2) = 3.162 lr."""
    rig = Rig("topk,random", optimizer=lambda model, lr: torch.optim.Adam(model.parameters(), 1e-3)).train(1500)
    rig.grow(0)
    before = rig.layer.experts.w_in.detach().clone()
    rig.step()
    moved = (rig.layer.experts.w_in.detach() - before).abs().amax((1, 2))
    assert moved[4].item() == pytest.approx(3.162e-3 / (1 - 0.999**1501) ** -0.5, rel=0.01)
    assert moved[:4].max() < 2e-3


def test_groups_schedulers_and_a_scaler_go_on():
    def groups(model, lr):
        return torch.optim.AdamW(
            [{"params": model[1].parameters(), "weight_decay": 0.1}, {"params": model[0].weight}], lr
        )

    rig = Rig(optimizer=groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(rig.optimizer, 20)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for number in range(10):
        loss = rig.loss(rig.x)
        scaler.scale(loss + rig.engine.aux_loss()).backward()
        rig.engine.after_backward()
        if number == 5:
            with refused("layer-cannot-grow", "after_step"):
                rig.grow(0)
        scaler.unscale_(rig.optimizer)
        nn.utils.clip_grad_norm_(rig.model.parameters(), 1.0)
        scaler.step(rig.optimizer)
        scaler.update()
        rig.engine.after_step()
        if number == 5:
            with refused("layer-cannot-grow", "has a gradient", "optimizer.zero_grad()"):
                rig.grow(0)
        rig.optimizer.zero_grad()
        schedule.step()
        if number in (3, 6):
            rig.grow(0)
    assert [len(group["params"]) for group in rig.optimizer.param_groups] == [5, 1]
    assert rig.optimizer.param_groups[0]["lr"] == pytest.approx(5e-3)
    assert rig.layer.spec.experts == 6


def test_a_held_loss_and_lists_of_parameters_stay_true():
    """A loop's variable `loss` keeps the old graph alive; a list made before is still that of the model."""
    rig = Rig().train(2)
    mine = list(rig.layer.parameters())
    hooked = []
    rig.layer.router.weight.register_post_accumulate_grad_hook(lambda p: hooked.append(p.shape[0]))
    held = rig.loss(rig.x)
    rig.grow(0)
    rig.loss(rig.x).backward()
    assert all(one is two for one, two in zip(mine, rig.layer.parameters(), strict=True))
    assert float(nn.utils.clip_grad_norm_(mine, 1e9)) > 0
    assert hooked == [5]
    assert held.requires_grad


# -- all or nothing ----------------------------------------------------------------------------------


@pytest.fixture
def no_search(monkeypatch):
    """The search for other holders takes most of a growth's time, and finds nobody here."""
    monkeypatch.setattr(optimizers, "live", lambda *kinds: [])


class Fault:
    """Raises at the n-th line that some source files execute."""

    def __init__(self, at, error, *modules):
        self.at, self.error, self.lines = at, error, 0
        self.files = {module.__file__ for module in modules}
        self.where = None

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self._call)
        return self

    def __exit__(self, *_):
        sys.settrace(self.before)

    def _call(self, frame, event, _):
        code = frame.f_code
        return self._line if code.co_filename in self.files and not code.co_name.startswith("<") else None

    def _line(self, frame, event, _):
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                self.where = (frame.f_code.co_name, frame.f_lineno)
                raise self.error(f"line {self.at}")
        return self._line


@pytest.mark.parametrize("plugins", ["hierarchical,saturation,loss_free,split", "topk,saturation,random"])
@pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.long)])
def test_an_error_at_any_line_leaves_everything_as_it_was(plugins, stride, no_search):
    """Every line that growth.py, transaction.py, optimizers.py and parts.py execute in a growth fails once.

    With a stride of 7 the first 120 do, and then every seventh.
    """
    modules = (growth, transaction, optimizers, sys.modules[Part.__module__])

    def trial(at, error):
        rig = Rig(plugins, experts=6).train(3)
        before = rig.everything()
        with Fault(at, error, *modules) as fault:
            try:
                rig.grow(1, drop=(0,))
            except (RuntimeError, KeyboardInterrupt, UsageError):  # one in the router is blamed on it
                same(before, rig.everything())
                sys.settrace(fault.before)
                rig.grow(1)  # it can still grow
                rig.train(1)
                return fault
        return fault

    at = 1
    places = set()
    while (fault := trial(at, (RuntimeError, KeyboardInterrupt)[at % 2])).where:
        places.add(fault.where[0])
        at += stride if at > 120 else 1  # what is in the loops over tensors comes again and again
    assert {"stage", "commit", "put", "staged_state", "reindex", "_staged_tensor", "_newcomers"} <= places


@pytest.mark.parametrize("plugins", ["topk,random", "topk,saturation,random"])
def test_a_backward_through_a_growth_is_an_error_and_not_a_crash(plugins):
    rig = Rig(plugins).train(2)
    loss = rig.loss(rig.x)
    rig.grow(0)
    with pytest.raises(RuntimeError, match="the layer changed its number of experts between this forward and its"):
        loss.backward()
    assert rig.layer.router.weight.grad is None
    rig.optimizer.zero_grad()
    rig.train(1)


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


def test_500_growths_and_removals_leave_memory_flat(no_search):
    rig = Rig().train(2)

    def once():
        rig.grow(0)
        rig.grow(drop=(4,))
        rig.engine.growths.clear()

    for _ in range(25):
        once()
    gc.collect()
    tensors, peak = _tensors(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(500):
        once()
    gc.collect()
    assert _tensors() <= tensors
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 4096  # KiB


def _tensors():
    return sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())


# -- what is refused ---------------------------------------------------------------------------------


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


def test_layers_that_can_not_grow_say_why():
    engine = Engine("topk", experts=4)
    bank = engine.moe(6, modules=[nn.Linear(6, 6) for _ in range(4)], name="bank")
    with refused("layer-cannot-grow", "bank", "ModuleBank"):
        engine.grow(Growth("bank", (0,)))
    with refused("unknown-layer", "bnak", "did you mean 'bank'?"):
        engine.grow(Growth("bnak", (0,)))
    assert engine.layers == [bank]
    rig = Rig()
    nn.utils.parametrizations.weight_norm(rig.layer.experts, "w_in")
    with refused("layer-cannot-grow", "experts.w_in", "parametrised"):
        rig.grow(0)
    rig = Rig()
    nn.utils.prune.random_unstructured(rig.layer.experts, "w_in", 0.5)
    with refused("layer-cannot-grow", "experts.w_in", "pruned"):
        rig.grow(0)
    rig = Rig()
    rig.layer.experts.w_in.data[0, 0, 0] = torch.nan
    with refused("layer-cannot-grow", "experts.w_in", "not finite"):
        rig.grow(0)
    rig = Rig()
    with refused("bad-follower", "Sequential", "0 copies"):
        rig.grow(0, followers=Rig().model)
    average = torch.optim.swa_utils.AveragedModel(rig.model)
    rig.grow(0, followers=average)
    average.module[1].load_state_dict(Rig().layer.state_dict())
    with refused("bad-follower", "4 experts, not 5"):
        rig.grow(0, followers=average)
    with refused("bad-growth", "'moe'"):
        rig.engine.grow("moe", rig.optimizer)
    with refused("bad-growth", "not 3"):
        Growth("moe", parents=3)
    rig = Rig()
    with refused("bad-growth", "twice"):
        rig.grow(drop=(0, 0))
    with refused("layer-cannot-grow", "no expert axis"):  # at once, where a trigger is chosen
        Engine("topk,schedule").moe(6, modules=[nn.Linear(6, 6) for _ in range(4)], experts=4)
    rig = Rig("topk,random", optimizer=adam)
    other = rig.engine.moe(6, 5, bias=True, name="other")
    other.experts.w_in = rig.layer.experts.w_in
    with refused("layer-cannot-grow", "'moe' shares weights with 'other'"):
        rig.grow(0)
    rig = Rig("topk", experts=4)
    rig.engine = Engine("topk", ["topk.groups=2"], experts=4, top_k=1)
    rig.layer = rig.engine.moe(6, 5, name="moe")
    with refused("groups-cannot-grow", "groups=1"):
        rig.grow(0, optimizers=(), probe=None)
    rig = Rig("hierarchical", experts=4)
    with pytest.raises(UsageError, match="at least 2 experts each must remain"):
        rig.grow(drop=(0,))
    with refused("growth-needs-parent", "group"):
        rig.grow(None, of="group")
    with refused("growth-needs-parent", "router.group_of"):
        rig.grow(None)


def test_twins_without_noise_are_refused():
    with refused("mix-refused", "clone.noise=0"):
        Engine("topk,clone", ["clone.noise=0"]).moe(4, 4)


def test_a_source_that_answers_nonsense_is_named(install):
    answers = {}

    @attrs.define(eq=False)
    class Odd:
        @hookimpl
        def moe_new_expert(self, parent, fresh):
            return answers["now"](parent, fresh)

    install("initializer", "odd", Odd)
    rig = Rig("topk,odd").train(1)
    before = rig.everything()
    for answer, words in (
        (lambda parent, fresh: None, "(asked: odd)"),
        (lambda parent, fresh: 3, "'odd' returned 3"),
        (lambda parent, fresh: NewExpert({}), "'odd' leaves out experts.b_in"),
        (lambda parent, fresh: NewExpert({**fresh, "x": fresh["experts.b_in"]}), "row 'x'"),
        (
            lambda parent, fresh: NewExpert({n: r[None] for n, r in fresh.items()}),
            "'router.weight' of shape [1, 6], not [6]",
        ),
        (lambda parent, fresh: NewExpert({n: r * torch.nan for n, r in fresh.items()}), "not finite"),
        (lambda parent, fresh: NewExpert(fresh, parent_values={"y": fresh["experts.b_in"]}), "of the parent 'y'"),
        (lambda parent, fresh: NewExpert({n: r.mul_(0) for n, r in parent.items()}), None),
    ):
        answers["now"] = answer
        if words is None:
            rig.grow(1)  # an initializer is given copies
            assert torch.equal(rig.layer.router.weight[1], before[0]["1.router.weight"][1])
            continue
        with refused("no-initializer" if "asked" in words else "bad-new-expert", words):
            rig.grow(1)
        same(before, rig.everything())


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
    """Gates that do not compete (ReLU, Wang et al., 2024) and a newcomer that answers zero."""
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


# -- who else holds the weights ------------------------------------------------------------------------


def test_an_average_of_the_weights_grows_along():
    rig = Rig("topk,saturation,split").train(3)
    average = torch.optim.swa_utils.AveragedModel(
        rig.model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    )
    average.update_parameters(rig.model)
    rig.train(3)
    average.update_parameters(rig.model)
    with pytest.raises(UsageError, match="a live AveragedModel holds this layer; pass it"):
        rig.grow(1)
    old, live = [model[1].experts.w_in.detach().clone() for model in (average.module, rig.model)]
    rig.grow(1, followers=average)
    grown = average.module[1]
    assert grown.spec.experts == 5
    assert torch.equal(grown.experts.w_in[[0, 2, 3]], old[[0, 2, 3]])
    assert torch.equal(grown.experts.w_in[4], rig.layer.experts.w_in[4])
    torch.testing.assert_close(grown.experts.w_in[1] - old[1], rig.layer.experts.w_in[1] - live[1])
    rig.train(2)
    average.update_parameters(rig.model)
    average(rig.x)


def test_a_dead_optimizer_is_no_holder():
    rig = Rig().train(2)
    dead = torch.optim.Adam(rig.layer.parameters())
    dead.itself = dead  # a cycle, as many schedulers make
    gc.disable()
    try:
        del dead
        assert rig.grow(0).after == 5
    finally:
        gc.enable()


def test_a_wrapper_of_a_passed_optimizer_is_no_other_holder():
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, inner):
            self.inner = inner

        @property
        def param_groups(self):
            return self.inner.param_groups

    rig = Rig().train(2)
    wrapper = Wrapper(rig.optimizer)
    rig.grow(0)
    assert wrapper.param_groups is rig.optimizer.param_groups


# -- copies, compiled and saved -------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_layer_goes_on_past_every_limit_of_recompilation(backend):
    rig = Rig(f"topk,{LOSSES},clone", experts=2)
    compiled = torch.compile(rig.model, fullgraph=True, backend=backend)
    for _ in range(10):
        rig.step(compiled)
        rig.grow(0)
        torch.testing.assert_close(compiled(rig.x), rig.model(rig.x))
        rig.engine.after_backward()
    assert rig.layer.spec.experts == 12


@pytest.mark.parametrize("router", ROUTERS)
def test_a_state_dict_loads_at_any_number_of_experts(router):
    rig = Rig(f"{router},{LOSSES},clone", experts=4).train(3)
    rig.grow(0)
    rig.grow(*((0,) if router != "hierarchical" else (1,)), of="group" if router == "hierarchical" else "expert")
    rig.train(2)
    fresh = Rig(f"{router},{LOSSES},clone", experts=4)
    fresh.model.load_state_dict(rig.model.state_dict())
    fresh.optimizer.load_state_dict(copy.deepcopy(rig.optimizer.state_dict()))
    fresh.random.set_state(rig.random.get_state())
    assert (fresh.layer.sizes, fresh.layer.spec) == (rig.layer.sizes, rig.layer.spec)
    assert [float(rig.step()) for _ in range(4)] == [float(fresh.step()) for _ in range(4)]
    for name, value in rig.model.state_dict().items():
        assert torch.equal(value, fresh.model.state_dict()[name])


def test_loading_other_sizes_drops_the_optimizers_old_state_with_a_warning():
    """A fused optimizer with state of the old shape would kill the process."""
    rig, small = Rig().train(2), Rig().train(2)
    rig.grow(0)
    with pytest.warns(UserWarning, match="AdamW's state of 5 tensors was dropped; load the optimizer's state after"):
        small.model.load_state_dict(rig.model.state_dict())
    small.train(2)


def test_a_state_that_can_not_be_of_this_layer_is_refused_and_changes_nothing():
    rig, small = Rig().train(2), Rig().train(2)
    before = small.everything()
    rig.grow(0)
    state = {name: value for name, value in rig.model.state_dict().items() if "experts" in name}
    with refused("sizes-disagree", "experts.w_in is for 5", "router.weight for 4"):
        small.model.load_state_dict(state, strict=False)
    same(before, small.everything())
    with refused("bad-layer-spec", "top_k=2"):
        small.model.load_state_dict(Rig(experts=1, top_k=1).model.state_dict())
    small.step()


def test_gradients_of_the_old_size_go_with_the_old_size():
    rig, big = Rig("topk,random").train(2), Rig("topk,random", experts=9)
    rig.loss(rig.x).backward()
    with pytest.warns(UserWarning, match="dropped"):
        rig.model.load_state_dict(big.model.state_dict())
    assert rig.layer.experts.w_in.grad is None


def test_deep_copies_of_engine_and_model_grow_apart():
    rig = Rig().train(2)
    rig.grow(0)
    pair = copy.deepcopy({"engine": rig.engine, "model": rig.model})
    twin = copy.copy(rig)
    twin.engine, twin.model, twin.layer = pair["engine"], pair["model"], pair["model"][1]
    twin.optimizer = adam(twin.model, 1e-2)
    assert twin.engine.layers == [twin.layer]
    assert twin.engine.growths == rig.engine.growths
    twin.grow(1)
    assert (twin.layer.spec.experts, rig.layer.spec.experts) == (6, 5)
    twin.train(1)
    rig.train(1)
    assert (len(twin.engine.growths), len(rig.engine.growths)) == (2, 1)
    alone = copy.deepcopy(rig.engine)
    assert alone.layers == []
    assert list(alone.plugins.active) == list(rig.engine.plugins.active)
    assert alone.plugins.active["switch_aux"] is not rig.engine.plugins.active["switch_aux"]


def test_a_layer_used_twice_counts_twice_and_grows_once():
    engine = Engine("topk,switch_aux,random", experts=4)
    layer = engine.moe(6, 5, name="moe")
    optimizer = adam(layer, 1e-3)
    x = torch.randn(8, 6)
    (layer(layer(x)).square().mean() + engine.aux_loss()).backward()
    engine.after_backward()
    once = layer.sums.step.grad.clone()
    assert once[0] == 16
    optimizer.step()
    engine.after_step()
    optimizer.zero_grad()
    record = engine.grow(Growth("moe", (0,)), optimizer, probe=lambda: layer.eval()(layer(x)).mean())
    assert (record.after, layer.train()(layer(x)).shape) == (5, (8, 6))


def test_what_a_state_dict_holds_are_copies():
    rig, other = Rig().train(2), Rig().train(1)
    state = rig.engine.state_dict()
    window = state["layers"]["moe"]["window"].clone()
    other.engine.load_state_dict(state)
    rig.train(1)
    other.train(2)
    assert torch.equal(state["layers"]["moe"]["window"], window)
    odd = Rig("topk,saturation,random")
    with refused("state-of-other-layer", "moe"):
        odd.engine.load_state_dict(state)


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


def test_metrics_begin_anew_with_a_growth():
    """Numbers of four and of five experts do not add up."""
    rig = Rig().train(3)
    rig.grow(0)
    assert rig.engine.metrics() == {}
    rig.train(1)
    assert len(rig.engine.metrics()["moe"]["load"]) == 5


# -- several processes ---------------------------------------------------------------------------------


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
    tokens = rig.engine._take(rig.layer, "train").tokens
    torch.save([said, sizes, tokens, rig.model.state_dict()], f"{folder}/{rank}")
    torch.distributed.destroy_process_group()


def test_two_processes_grow_alike_or_not_at_all(tmp_path):
    torch.multiprocessing.spawn(_process, args=(str(tmp_path),), nprocs=2)
    one, two = (torch.load(tmp_path / str(rank), weights_only=True) for rank in range(2))
    assert "a live DistributedDataParallel holds this layer" in one[0][0]
    assert "build it anew" in two[0][0]
    assert "was not done, because it failed in another process" in one[0][1]
    assert "ZeroDivisionError" in two[0][1]
    assert all(said[2].endswith("was not done, because processes want different things") for said in (one[0], two[0]))
    assert one[1] == two[1] == [4, 5, 6, 7]
    assert one[2] == two[2] == 2 * 2 * 64
    for name, value in one[3].items():
        assert torch.equal(value, two[3][name]), name


def test_no_growth_is_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Rig().train(2).grow(0).after == 5
