"""Claims about metrics."""

import copy
import json
from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import Tensor

from ..contract.growth import Growth
from ..contract.setup import Bound
from ..contract.stats import Stats, plain
from .bench import Bench, Data, Trial, data
from .biases import balanced, skewed
from .claims import claim, demand
from .comparing import same_bits

Values = dict[str, Any]  # metrics by name, as JSON holds them
MakeLogits = Callable[[int, int], Tensor]  # (tokens, units) -> logits
SPLITS = ("train", "eval")


def _train_and_evaluate(trial: Trial, batch: Data, make: MakeLogits | None = None) -> None:
    """A training step and a forward in eval mode, with the given logits or the router's."""
    if make is not None and trial.layer.router.levels:
        trial.set_logits(*trial.logits(make, batch.x[..., 0].numel()))
    trial.step(batch)
    with torch.no_grad():
        trial.evaluate(batch)
    trial.reset_logits()


def _metrics(trial: Trial, split: str, probe: Data | None = None) -> Values:
    """The layer's metrics as JSON values, without the losses that the core adds."""
    torch.default_generator.manual_seed(0)
    run_probe = None if probe is None else lambda: probe.loss(trial.evaluate(probe))
    values = trial.engine.metrics(split, run_probe).get(trial.layer.name, {})
    return {name: _json(name, value) for name, value in values.items() if not name.startswith("loss.")}


def _json(name: str, value: Any) -> Any:
    try:
        return json.loads(json.dumps(plain(value), allow_nan=False))
    except (TypeError, ValueError) as error:
        demand(False, f"'{name}' can't be written as JSON ({error}); return finite numbers, arrays or findings")


@claim("moe_metrics")
def handles_every_load(bench: Bench) -> str | None:
    """The metric returns valid JSON values for any load, one token, one expert, no ids or labels, and no probe."""
    names, refused = set[str](), None
    bare: dict[str, Any] = {"vocab": None, "classes": None}
    for spec in ({}, {"experts": 1, "top_k": 1}, bare):
        for make in (balanced, skewed, None):
            trial = bench.trial_or_refusal(**spec)
            if isinstance(trial, str):
                refused = trial
                break
            for given in (data(), data(1)):
                batch = attrs.evolve(given, bare=spec is bare)
                _train_and_evaluate(trial, batch, make)
                for split in SPLITS:
                    names |= _metrics(trial, split, None if spec is bare else batch).keys()
    return refused if names else "it returned nothing in any of these cases"


@claim("moe_metrics")
def stats_are_not_modified(bench: Bench) -> None:
    """The metric modifies neither the sums that it reads nor the layer."""
    trial, read = bench.trial(), list[tuple[Stats, dict[str, Tensor]]]()
    bind = trial.engine.plugins.bind

    def recording(bound: Bound) -> Bound:
        def call(**offer: Any) -> Any:
            if "stats" in offer:
                sums: dict[str, Tensor] = offer["stats"].sums
                read.append((offer["stats"], {name: value.clone() for name, value in sums.items()}))
            return bound.function(**offer)

        return bound._replace(function=call)

    trial.engine.plugins.bind = lambda *given: tuple(map(recording, bind(*given)))  # type: ignore[method-assign]
    _train_and_evaluate(trial, data())
    before = trial.state()
    for split in SPLITS:
        _metrics(trial, split, data())
    for stats, sums in read:
        for name, original in sums.items():
            unchanged = same_bits(original, stats.sums[name])
            demand(unchanged, f"stats['{name}'] was modified in place; write a / b, not a /= b")
    trial.demand_unchanged(before, "while metrics were computed; change nothing but `memory`")


@claim("moe_metrics")
def order_of_calls_changes_nothing(bench: Bench) -> None:
    """The metrics of a layer and a split do not depend on earlier calls for other layers or splits."""
    values = []
    for order in (SPLITS, SPLITS[::-1]):
        trial = bench.trial()
        for number in range(2):
            _train_and_evaluate(trial, data(seed=number + 1))
            values.append({split: _metrics(trial, split, data()) for split in order})
    advice = "keep state in `memory`, which belongs to one layer and one split"
    for first, second in zip(values[:2], values[2:], strict=True):
        for split in SPLITS:
            _demand_equal(first[split], second[split], split, f"if splits are measured in another order; {advice}")


def _demand_equal(first: Values, second: Values, split: str, message: str) -> None:
    for name in sorted({*first, *second}):
        expected, found = first.get(name), second.get(name)
        demand(expected == found, f"'{name}' in {split} is {found!r}, not {expected!r}, {message}")


@claim("moe_metrics")
def memory_survives_a_checkpoint(bench: Bench) -> None:
    """A resumed run reports the same metrics as an uninterrupted one; after growth the metrics start afresh."""
    trial, resumed = bench.trial(), bench.trial(seed=1)
    _train_and_evaluate(trial, data())
    for split in SPLITS:
        _metrics(trial, split, data())
    for part in ("layer", "optimizer", "engine"):
        getattr(resumed, part).load_state_dict(copy.deepcopy(getattr(trial, part).state_dict()))
    for run in (trial, resumed):
        _train_and_evaluate(run, data(seed=2))
    for split in SPLITS:
        expected, found = (_metrics(run, split, data()) for run in (trial, resumed))
        _demand_equal(expected, found, split, "in a resumed run; keep state in `memory`, which is saved")
    trial.optimizer.zero_grad()
    trial.engine.grow(Growth(trial.layer.name, parents=(0,)), trial.optimizer)
    _train_and_evaluate(trial, data(seed=3))
    for split in SPLITS:
        _metrics(trial, split, data())


@claim("moe_metrics")
def measuring_draws_no_random_numbers(bench: Bench) -> None:
    """Computing metrics does not draw from torch's global generator, which training uses."""
    trial = bench.trial()
    _train_and_evaluate(trial, data())
    for split in SPLITS:
        torch.default_generator.manual_seed(0)
        before = torch.get_rng_state()
        _metrics(trial, split)
        untouched = same_bits(before, torch.get_rng_state())
        demand(untouched, "it advanced torch's global generator, which changes the run; use a separate torch.Generator")
