"""Claims about biases."""

import torch
from torch import Tensor

from .bench import Bench, Data, Rig, data
from .claims import claim, demand
from .comparing import distance

STEPS = 10


def balanced(tokens: int, units: int) -> Tensor:
    """Logits [tokens, units] with which token t chooses t, t + 1, ... best first: all are chosen equally often."""
    place = (torch.arange(units) - torch.arange(tokens)[:, None]) % units
    return 60 * (units - place) / units


def skewed(tokens: int, units: int) -> Tensor:
    """Logits [tokens, units] with which every token chooses the first units best."""
    return 20 * torch.arange(units, 0, -1).repeat(tokens, 1) / units


def _symmetric(bench: Bench) -> tuple[Rig, Data]:
    """A layer of identical experts and a batch of identical tokens: gradients differ only as loads and gates do."""
    rig, one = bench.rig(), data(1, 1)
    with torch.no_grad():
        for name, axis in rig.layer.experts.axes.items():
            tensor = getattr(rig.layer.experts, name)
            tensor.copy_(tensor.select(axis.axis, 0).unsqueeze(axis.axis).expand_as(tensor))
    return rig, one.map(lambda v: v.expand(3, 8, *v.shape[2:]).clone())


def _biases(bench: Bench, rig: Rig) -> list[Tensor]:
    """The subject's bias at each level that has one."""
    own = [level[bench.subject.name]() for level in rig.layer.bias_levels() if bench.subject.name in level]
    return [one.detach().clone() for one in own]


@claim("moe_bias")
def equal_loads_leave_it(bench: Bench) -> None:
    """Equal loads, gates and gradients leave differences between units as they are: at 0."""
    rig, batch = _symmetric(bench)
    before = _biases(bench, rig)
    rig.give_logits(*rig.logits(balanced))
    for _ in range(3):
        rig.step(batch)
    for old, new in zip(before, _biases(bench, rig), strict=True):
        gap = distance(old - old.mean(), new - new.mean())
        demand(gap < 1e-3, f"with equal loads it moves units apart by {gap:.2g}; compare each with step.relative(...)")


@claim("moe_bias")
def overload_is_pushed_down(bench: Bench) -> None:
    """The bias of a unit that gets every token falls below that of one that gets none."""
    rig, batch = _symmetric(bench)
    rig.give_logits(*rig.logits(skewed))
    before = _biases(bench, rig)
    for _ in range(STEPS):
        rig.step(batch)
    for old, new in zip(before, _biases(bench, rig), strict=True):
        gap = float((new[0] - new[-1]) - (old[0] - old[-1]))
        what = "rises above" if gap > 0 else "stays at"
        why = f"after {STEPS} steps in which unit 0 got every token, its bias {what} that of a unit that got none"
        demand(gap < 0, f"{why}; it must fall, for it is added to scores")


@claim("moe_bias")
def no_gradient_reaches_it(bench: Bench) -> None:
    """It is a controller: no gradient reaches it, and no optimizer moves it."""
    rig = bench.rig()
    for level in rig.layer.bias_levels():
        bias = level.get(bench.subject.name)
        if bias is not None:
            named = [name for name, _ in bias.named_parameters()]
            demand(not named, f"{', '.join(named)} is a parameter; make it a buffer (expert_buffer)")
            demand(not bias().requires_grad, "what it answers has a graph; answer what is detached")
