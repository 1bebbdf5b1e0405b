"""Claims about biases."""

import torch
from torch import Tensor

from .bench import Bench, Data, Trial, data
from .claims import claim, demand
from .comparing import distance

STEPS = 10


def balanced(tokens: int, units: int) -> Tensor:
    """Logits [tokens, units] for which token t prefers units t, t + 1, ... in turn: every unit gets an equal load."""
    place = (torch.arange(units) - torch.arange(tokens)[:, None]) % units
    return 60 * (units - place) / units


def skewed(tokens: int, units: int) -> Tensor:
    """Logits [tokens, units] for which every token prefers the first units."""
    return 20 * torch.arange(units, 0, -1).repeat(tokens, 1) / units


def _symmetric(bench: Bench) -> tuple[Trial, Data]:
    """A layer of identical experts and a batch of identical tokens: only loads and gates make gradients differ."""
    trial, token = bench.trial(), data(1, 1)
    with torch.no_grad():
        for name, axis in trial.layer.experts.axes.items():
            tensor = getattr(trial.layer.experts, name)
            tensor.copy_(tensor.select(axis.axis, 0).unsqueeze(axis.axis).expand_as(tensor))
    return trial, token.map(lambda v: v.expand(3, 8, *v.shape[2:]).clone())


def _biases(bench: Bench, trial: Trial) -> list[Tensor]:
    """The plugin's bias [n] at each level that has one."""
    name = bench.plugin.name
    return [level[name]().detach().clone() for level in trial.layer.bias_levels() if name in level]


@claim("moe_bias")
def equal_load_leaves_the_bias_alone(bench: Bench) -> None:
    """Under equal loads, gates and gradients, the differences between the units' biases do not change."""
    trial, batch = _symmetric(bench)
    before = _biases(bench, trial)
    trial.set_logits(*trial.logits(balanced))
    for _ in range(3):
        trial.step(batch)
    for old, new in zip(before, _biases(bench, trial), strict=True):
        gap = distance(old - old.mean(), new - new.mean())
        demand(gap < 1e-3, f"equal loads move biases apart by {gap:.2g}; compare each load with step.relative(...)")


@claim("moe_bias")
def overload_lowers_the_bias(bench: Bench) -> None:
    """The bias of a unit that gets every token falls below that of a unit that gets none."""
    trial, batch = _symmetric(bench)
    trial.set_logits(*trial.logits(skewed))
    before = _biases(bench, trial)
    for _ in range(STEPS):
        trial.step(batch)
    for old, new in zip(before, _biases(bench, trial), strict=True):
        gap = float((new[0] - new[-1]) - (old[0] - old[-1]))
        change = "rises above" if gap > 0 else "stays equal to"
        seen = f"after {STEPS} steps in which unit 0 got every token, its bias {change} that of an idle unit"
        demand(gap < 0, f"{seen}; lower it, because the bias is added to the scores")


@claim("moe_bias")
def bias_has_no_gradient(bench: Bench) -> None:
    """The bias is a controller: it gets no gradient, and no optimizer updates it."""
    trial = bench.trial()
    for level in trial.layer.bias_levels():
        bias = level.get(bench.plugin.name)
        if bias is not None:
            named = [name for name, _ in bias.named_parameters()]
            demand(not named, f"{', '.join(named)} is a parameter; make it a buffer with expert_buffer")
            demand(not bias().requires_grad, "forward returns a tensor that requires a gradient; detach it")
