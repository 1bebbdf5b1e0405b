"""Claims about metrics."""

import copy
import json
from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import Tensor

from ..contract.growth import Growth
from ..contract.stats import Stats, plain
from .bench import Bench, Data, Rig, data
from .biases import balanced, skewed
from .claims import claim, demand
from .comparing import same_bits

Answers = dict[str, Any]  # by name, as JSON holds them
Make = Callable[[int, int], Tensor]  # logits for so many tokens and units
SPLITS = ("train", "eval")


def _see(rig: Rig, batch: Data, make: Make | None = None) -> None:
    """A step of training and a forward of evaluation, with given logits or the router's own."""
    if make is not None and rig.layer.router.levels:
        rig.give_logits(*rig.logits(make, batch.x[..., 0].numel()))
    rig.step(batch)
    with torch.no_grad():
        rig.evaluate(batch)
    rig.own_logits()


def _ask(rig: Rig, split: str, probe: Data | None = None) -> Answers:
    """What is said of the rig's layer, as JSON holds it, without what the core itself says of losses."""
    torch.manual_seed(0)
    run = None if probe is None else lambda: probe.loss(rig.evaluate(probe))
    said = rig.engine.metrics(split, run).get(rig.layer.name, {})
    return {name: _json(name, value) for name, value in said.items() if not name.startswith("loss.")}


def _json(name: str, value: Any) -> Any:
    try:
        return json.loads(json.dumps(plain(value), allow_nan=False))
    except (TypeError, ValueError) as error:
        demand(False, f"'{name}' can't be written as JSON ({error}); answer numbers, arrays or findings")


@claim("moe_metrics")
def every_load_has_an_answer(bench: Bench) -> str | None:
    """A balanced load, a collapsed one, one token, one expert, no labels, no probe: it answers what JSON can hold."""
    names, refused = set[str](), None
    bare: dict[str, Any] = {"vocab": None, "classes": None}
    for spec in ({}, {"experts": 1, "top_k": 1}, bare):
        for make in (balanced, skewed, None):
            rig = bench.accepted(**spec)
            if isinstance(rig, str):
                refused = rig
                break
            for given in (data(), data(1)):
                batch = attrs.evolve(given, bare=spec is bare)
                _see(rig, batch, make)
                for split in SPLITS:
                    names |= _ask(rig, split, None if spec is bare else batch).keys()
    return refused if names else "it answered nothing in any of these cases"


@claim("moe_metrics")
def stats_stay(bench: Bench) -> None:
    """The sums that it reads are not changed in place, nor is the layer."""
    rig, read = bench.rig(), list[tuple[Stats, dict[str, Tensor]]]()
    take = rig.engine._take

    def kept(*arguments: Any) -> Stats | None:
        stats = take(*arguments)
        if stats is not None:
            read.append((stats, {name: value.clone() for name, value in stats.sums.items()}))
        return stats

    rig.engine._take = kept  # type: ignore[method-assign, assignment]
    _see(rig, data())
    before = rig.state()
    for split in SPLITS:
        _ask(rig, split, data())
    for stats, sums in read:
        for name, was in sums.items():
            why = f"stats['{name}'] is not what it was; write a / b and not a /= b"
            demand(same_bits(was, stats.sums[name]), why)
    rig.demand_still(before, "while it measured; change nothing but its own memory")


@claim("moe_metrics")
def answers_do_not_depend_on_order(bench: Bench) -> None:
    """What it says of a layer and of a split does not depend on what it was asked before."""
    answers = []
    for order in (SPLITS, SPLITS[::-1]):
        rig = bench.rig()
        for number in range(2):
            _see(rig, data(seed=number + 1))
            answers.append({split: _ask(rig, split, data()) for split in order})
    advice = "keep what it remembers in memory, which is of one layer and one split"
    for one, other in zip(answers[:2], answers[2:], strict=True):
        for split in SPLITS:
            _demand_same(one[split], other[split], split, advice)


def _demand_same(one: Answers, other: Answers, split: str, advice: str) -> None:
    for name in sorted({*one, *other}):
        mine, its = one.get(name), other.get(name)
        demand(mine == its, f"in {split} it says '{name}' is {mine!r}, and then {its!r}; {advice}")


@claim("moe_metrics")
def memory_survives_a_checkpoint(bench: Bench) -> None:
    """A run that was saved and resumed says what it would have said; after growth it begins anew."""
    rig, other = bench.rig(), bench.rig(seed=1)
    _see(rig, data())
    for split in SPLITS:
        _ask(rig, split, data())
    for part in ("layer", "optimizer", "engine"):
        getattr(other, part).load_state_dict(copy.deepcopy(getattr(rig, part).state_dict()))
    for one in (rig, other):
        _see(one, data(seed=2))
    for split in SPLITS:
        mine, its = (_ask(one, split, data()) for one in (rig, other))
        _demand_same(mine, its, split, "keep what it remembers in memory, which is saved")
    rig.optimizer.zero_grad()
    rig.engine.grow(Growth(rig.layer.name, parents=(0,)), rig.optimizer)
    _see(rig, data(seed=3))
    for split in SPLITS:
        _ask(rig, split, data())


@claim("moe_metrics")
def measuring_draws_nothing(bench: Bench) -> None:
    """Measuring draws no random number from a generator that training draws from."""
    rig = bench.rig()
    _see(rig, data())
    for split in SPLITS:
        torch.manual_seed(0)
        before = torch.get_rng_state()
        _ask(rig, split)
        drawn = not same_bits(before, torch.get_rng_state())
        demand(not drawn, "it moved torch's own generator, and with it the rest of the run; draw from one of its own")
