"""What growth does to the state of optimizers, and whose layers they hold."""

import copy
import gc

import pytest
import torch
from torch import nn

from moe_engine import UsageError
from rig import Rig
from support import refused


def test_moments_of_a_new_expert():
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


@pytest.mark.parametrize("initializer", ["random", pytest.param("split", marks=pytest.mark.long)])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_go_on(name, initializer):
    """Kept state is kept, a new expert's is finite, and all rows learn."""
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
    with pytest.raises(UsageError, match="LBFGS keeps 'd', which can't grow; use Adam"):
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


def test_a_new_expert_of_adam_steps_further_than_the_others_at_first():
    """Both moments at 0 beside an old step counter: lr (1 - beta1) / sqrt(1 - beta2) = 3.162 lr."""
    rig = Rig("topk,random", optimizer=lambda model, lr: torch.optim.Adam(model.parameters(), 1e-3)).train(100)
    for state in rig.optimizer.state.values():  # as after 1500 steps, which take 10 s
        state["exp_avg_sq"] *= (1 - 0.999**1500) / (1 - 0.999**100)
        state["step"].fill_(1500)
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


def test_loading_other_sizes_drops_the_optimizers_old_state_with_a_warning():
    """A fused optimizer with state of the old shape would kill the process."""
    rig, small = Rig().train(2), Rig().train(2)
    rig.grow(0)
    with pytest.warns(UserWarning, match="AdamW's state of 5 tensors was dropped; load the optimizer's state after"):
        small.model.load_state_dict(rig.model.state_dict())
    small.train(2)
