"""Claims about auxiliary losses.

The trait `balanced` is the value of a loss at perfect balance, for example `traits = Traits(balanced=1.0)`; None, the
default, means that its value there depends on more than balance.
"""

import math

import attrs
import torch
from torch import Tensor

from ..contract.options import options_of
from ..contract.routing import Routing
from ..contract.traits import traits_of
from .bench import Bench, Trial, data
from .biases import balanced
from .claims import NotApplicable, claim, demand
from .comparing import distance


def _terms(bench: Bench, trial: Trial, routing: Routing | None = None) -> dict[str, Tensor]:
    """The plugin's loss terms by name, unweighted."""
    terms = trial.layer.aux_terms(trial.route(data()) if routing is None else routing)
    name = bench.plugin.name
    found = {term: value for term, value in terms.items() if term.partition(".")[0] == name}
    if not found:
        raise NotApplicable("it has no loss here: its weight is 0")
    return found


@claim("moe_aux_loss")
def value_at_balance_is_as_declared(bench: Bench) -> None:
    """At perfect balance the loss equals its trait `balanced`, for any K and any number of tokens."""
    declared = traits_of(bench.plugin.cls).balanced
    if declared is None:
        raise NotApplicable("its traits declare no value at balance; if it has one, declare Traits(balanced=1.0)")
    for top_k in (1, 2, 3):
        trial = bench.trial_or_refusal(top_k=top_k)
        if isinstance(trial, str):
            continue
        for batch in (data(4, 6), data(6, 12)):  # each sequence is balanced too
            trial.set_logits(*trial.logits(balanced, batch.x[..., 0].numel()))
            for term, value in _terms(bench, trial, trial.route(batch)).items():
                seen = f"'{term}' is {float(value):.4g} at balance with top_k={top_k}, not {declared:g}"
                equal = abs(float(value) - declared) < 1e-3
                demand(equal, f"{seen}; normalise it by E, K and T, or declare its value: Traits(balanced=...)")


@claim("moe_aux_loss")
def loss_is_a_mean_over_tokens(bench: Bench) -> None:
    """A batch that contains every token twice has the same loss: the loss is a mean over tokens, not a sum."""
    trial, batch = bench.trial(), data()
    trial.layer.eval()  # noise would differ
    once = _terms(bench, trial, trial.route(batch))
    twice = _terms(bench, trial, trial.route(batch.map(lambda v: torch.cat([v, v]))))
    for term, value in once.items():
        seen = f"'{term}' is {float(value):.4g} for a batch and {float(twice[term]):.4g} for the batch twice"
        demand(distance(value, twice[term]) < 1e-3, f"{seen}; divide by the number of tokens")


@claim("moe_aux_loss")
def loss_is_unweighted(bench: Bench) -> None:
    """The loss does not depend on the option `weight`: the core multiplies by it."""
    if "weight" not in options_of(bench.plugin.cls):
        raise NotApplicable("it has no option 'weight', so its weight is 1")
    first, second = (_terms(bench, bench.trial(options={"weight": weight})) for weight in (1.0, 3.0))
    for term, value in first.items():
        seen = f"'{term}' is {float(value):.4g} with weight=1 and {float(second[term]):.4g} with weight=3"
        demand(not distance(value, second[term]), f"{seen}; return it unweighted")


@claim("moe_aux_loss")
def gradient_matches_finite_differences(bench: Bench) -> None:
    """The gradient is finite and agrees with finite differences of the value, in float64."""
    trial = bench.trial()
    trial.layer.double()
    routing = _with_leaves(trial.route(data().to(torch.float64)))
    leaves = {**dict(trial.layer.named_parameters()), **_leaves(routing)}
    random, size = torch.Generator().manual_seed(3), 1e-6
    for term, value in _terms(bench, trial, routing).items():
        grads = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, retain_graph=True)
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
            direction = torch.randn(leaf.shape, generator=random, dtype=torch.float64)
            slope = 0.0 if grad is None else float((grad * direction).sum())
            finite = math.isfinite(slope)
            demand(finite, f"the gradient of '{term}' with respect to {name} is not finite; clamp before log and sqrt")
            ahead, behind = (_moved(bench, trial, routing, leaf, sign * size * direction)[term] for sign in (1, -1))
            measured = float(ahead - behind) / (2 * size)
            agree = abs(slope - measured) <= 1e-3 * max(abs(slope), abs(measured), 1e-3)
            seen = f"along a direction of {name}, '{term}' has slope {measured:.4g} but gradient {slope:.4g}"
            demand(agree, f"{seen}; detach nothing that the value depends on")


def _with_leaves(routing: Routing) -> Routing:
    """The same routing, in which every tensor that a loss may differentiate is a leaf."""

    def leaf(values: Tensor) -> Tensor:
        return values.detach().clone().requires_grad_()

    levels = tuple(attrs.evolve(level, logits=(raw := leaf(level.logits)), biased=raw) for level in routing.levels)
    plan = attrs.evolve(routing.plan, weight=leaf(routing.plan.weight))
    if plan.chances is not None:
        chances_TE = leaf(plan.chances())
        plan = attrs.evolve(plan, chances=lambda: chances_TE)
    probs_TE = None if routing.probs is None else leaf(routing.probs)
    return attrs.evolve(routing, levels=levels, plan=plan, probs=probs_TE)


def _leaves(routing: Routing) -> dict[str, Tensor]:
    found = {f"the logits of level '{level.name}'": level.logits for level in routing.levels}
    found["the gates"] = routing.plan.weight
    if routing.probs is not None:
        found["the probabilities"] = routing.probs
    if routing.plan.chances is not None:
        found["the chances"] = routing.plan.chances()
    return found


@torch.no_grad()
def _moved(bench: Bench, trial: Trial, routing: Routing, leaf: Tensor, by: Tensor) -> dict[str, Tensor]:
    """The terms with one leaf moved; the leaf is restored."""
    before = leaf.clone()
    leaf += by
    terms = _terms(bench, trial, routing)
    leaf.copy_(before)
    return terms
