"""What is not finite is named with its step, by layer and term, and never replaces a good checkpoint."""

import math

import attrs
import pytest
import torch
from torch import nn

from moe_engine import Bias, Engine, RunError, hookimpl
from moe_engine.run.finite import FiniteCheck
from moe_engine.run.scores import ScoreSums
from moe_engine.run.training import Training
from moe_engine.run.trees import read_tree
from run.test_training import SETTINGS, SMALL, RunConfig, train
from support import refused

LAZY = {"log_every": 1000, "steps": 12, "checkpoint_every": 2}  # no log point before the end


@attrs.define(eq=False)
class Turns:
    """A bias that is NaN from a step on."""

    at: int = 5

    @hookimpl
    def moe_bias(self, spec, level):
        return TurnsBias(level.size, self.at)


class TurnsBias(Bias):
    def __init__(self, size, at):
        super().__init__()
        self.at = at
        self.register_buffer("steps", torch.zeros(()))
        self.expert_buffer("zero", torch.zeros(size), new=0.0)

    def forward(self):
        return torch.where(self.steps >= self.at, math.nan, self.zero)

    def after_step(self, step):
        self.steps += 1


def tensors_of(tree):
    if isinstance(tree, torch.Tensor):
        yield tree
    for child in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from tensors_of(child)


def assert_good(folder):
    """All checkpoints are of steps before anything went wrong."""
    paths = sorted((folder / "checkpoints").glob("*.safetensors"))
    assert paths
    for path in paths:
        assert all(bool(tensor.isfinite().all()) for tensor in tensors_of(read_tree(path)))
    return [path.stem for path in paths]


def test_a_bias_that_turns_nan_is_named_with_its_step(tmp_path, install):
    install("bias", "turns", Turns)
    with refused("not-finite", "the bias turns of layer moe stopped being finite at step 5", kind=RunError):
        train(tmp_path / "run", plugins=("turns",), **LAZY)
    assert assert_good(tmp_path / "run") == ["step-00000002", "step-00000004"]


def test_a_loss_that_explodes_between_log_points_is_named_and_not_saved(tmp_path):
    with refused("not-finite", "the task loss", "stopped being finite at step 2;", kind=RunError):
        train(tmp_path / "run", lr=1e30, **LAZY)
    assert not [*tmp_path.glob("run/checkpoints/*")]


@pytest.mark.parametrize("every", [1, 1000])
def test_a_gradient_is_named_with_its_step(tmp_path, every):
    training = Training(RunConfig(**{**SMALL, **LAZY, "log_every": every}), SETTINGS, tmp_path / "run")
    name, parameter = next(iter(training.model.named_parameters()))
    parameter.register_hook(lambda grad: grad * (math.inf if training.step == 6 else 1))
    with refused("not-finite", f"the gradient of {name} stopped being finite at step 7", kind=RunError):
        training.run()
    assert assert_good(tmp_path / "run")[-1] == "step-00000006"


def test_gradients_that_are_absent_in_some_steps_are_left_out():
    """As those of an expert that is a module, and got no token."""
    parts = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
    check = FiniteCheck(Engine(), parts, torch.optim.SGD(parts.parameters(), 0.1), torch.device("cpu"))
    for used, scale in (((0, 1), 1.0), ((1,), math.inf), ((0,), 1.0)):
        parts.zero_grad()
        (sum(parts[index](torch.ones(1, 2)).sum() for index in used) * scale).backward()
        check.after_step()
    with refused("not-finite", "the gradient of 1.weight", "at step 11;", kind=RunError):
        check.check(ScoreSums(), 12)


def checked(change):
    """A check of a layer's state after a step, and after a change of it."""
    engine = Engine("saturation,switch_aux", experts=3, top_k=1)
    model = nn.Sequential(engine.moe(4, 5, name="moe"), nn.Linear(4, 1))
    engine.attach(model)
    optimizer = torch.optim.AdamW(model.parameters())
    (model(torch.randn(8, 4)).mean() + engine.aux_loss()).backward()
    engine.after_backward()
    optimizer.step()
    engine.after_step()
    check = FiniteCheck(engine, model, optimizer, torch.device("cpu"))
    check.after_step()
    check.check(ScoreSums(), 1)
    check.check_state(1)
    with torch.no_grad():
        change(model, optimizer)
    with pytest.raises(RunError) as error:
        check.check_state(1)
    assert error.value.code == "not-finite"
    return str(error.value)


def test_weights_moments_and_states_are_named():
    def weight(model, _):
        model[0].experts.w_in[2, 0, 0] = -math.inf  # of an expert that may get no token for long

    def moment(model, optimizer):
        optimizer.state[model[1].weight]["exp_avg_sq"][0, 1] = math.nan

    def state(model, _):
        next(model[0].buffers())[0] = math.nan

    assert checked(weight).startswith("the weight 0.experts.w_in stopped being finite by step 1")
    assert checked(moment).startswith("the moment exp_avg_sq of 1.weight stopped being finite by step 1")
    assert checked(state).startswith("the state of layer 0: biases.0.saturation.")
