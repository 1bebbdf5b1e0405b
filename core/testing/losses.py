"""Claims about auxiliary losses.

A loss says what it is worth at perfect balance by a plain class attribute, `balanced = 1.0` or `0.0`;
`balanced = None`, or no word of it, where that depends on more than balance.
"""

import math

import attrs
import torch
from torch import Tensor

from ..contract.options import options_of
from ..contract.routing import Routing
from ..contract.traits import traits_of
from .bench import Bench, Rig, data
from .biases import balanced
from .claims import NotApplicable, claim, demand
from .comparing import distance


def _terms(bench: Bench, rig: Rig, routing: Routing | None = None) -> dict[str, Tensor]:
    """The subject's own loss terms, unweighted."""
    terms = rig.layer.aux_terms(rig.route(data()) if routing is None else routing)
    name = bench.subject.name
    own = {term: value for term, value in terms.items() if term.partition(".")[0] == name}
    if not own:
        raise NotApplicable("it has no loss here: its weight is 0")
    return own


@claim("moe_aux_loss")
def balance_is_worth_what_it_says(bench: Bench) -> None:
    """At perfect balance it is what its attribute `balanced` says, for any K and any number of tokens."""
    worth = traits_of(bench.subject.cls).balanced
    if worth is None:
        raise NotApplicable("its value at balance is not fixed; if it is, say so: balanced = 1.0")
    for top_k in (1, 2, 3):
        rig = bench.accepted(top_k=top_k)
        if isinstance(rig, str):
            continue
        for batch in (data(4, 6), data(6, 12)):  # each sequence is balanced too
            rig.give_logits(*rig.logits(balanced, batch.x[..., 0].numel()))
            for term, value in _terms(bench, rig, rig.route(batch)).items():
                why = f"'{term}' is {float(value):.4g} at balance with top_k={top_k}, not {worth:g}"
                demand(abs(float(value) - worth) < 1e-3, f"{why}; normalise by E, K and T, or say what it is: balanced")


@claim("moe_aux_loss")
def mean_and_no_sum(bench: Bench) -> None:
    """The same batch twice is worth as much as once: a loss is a mean over tokens, not a sum."""
    rig, batch = bench.rig(), data()
    rig.layer.eval()  # noise would differ
    once = _terms(bench, rig, rig.route(batch))
    twice = _terms(bench, rig, rig.route(batch.map(lambda v: torch.cat([v, v]))))
    for term, value in once.items():
        gap = distance(value, twice[term])
        demand(
            gap < 1e-3, f"'{term}' is {float(value):.4g} and {float(twice[term]):.4g}; divide by the number of tokens"
        )


@claim("moe_aux_loss")
def it_leaves_the_weight_to_the_core(bench: Bench) -> None:
    """Its answer does not depend on its option `weight`, with which the core multiplies it."""
    if "weight" not in options_of(bench.subject.cls):
        raise NotApplicable("it has no option 'weight', so it is weighted by 1")
    one, other = (_terms(bench, bench.rig(options={"weight": weight})) for weight in (1.0, 3.0))
    for term, value in one.items():
        alike = not distance(value, other[term])
        demand(
            alike,
            f"'{term}' is {float(value):.4g} and {float(other[term]):.4g} with weights 1 and 3; leave it unweighted",
        )


@claim("moe_aux_loss")
def gradient_is_of_its_value(bench: Bench) -> None:
    """Its gradient is finite and that of its value, by finite differences in float64."""
    rig = bench.rig()
    rig.layer.double()
    routing = _cut(rig.route(data().to(torch.float64)))
    leaves = {**dict(rig.layer.named_parameters()), **_leaves(routing)}
    random, size = torch.Generator().manual_seed(3), 1e-6
    for term, value in _terms(bench, rig, routing).items():
        grads = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, retain_graph=True)
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
            way = torch.randn(leaf.shape, generator=random, dtype=torch.float64)
            said = 0.0 if grad is None else float((grad * way).sum())
            demand(math.isfinite(said), f"the gradient of '{term}' at {name} is not finite; clamp before log and sqrt")
            ahead, behind = (_beside(bench, rig, routing, leaf, sign * size * way)[term] for sign in (1, -1))
            found = float(ahead - behind) / (2 * size)
            why = f"along a direction of {name} '{term}' changes by {found:.4g}, its gradient says {said:.4g}"
            alike = abs(said - found) <= 1e-3 * max(abs(said), abs(found), 1e-3)
            demand(alike, f"{why}; detach nothing that the value depends on")


def _cut(routing: Routing) -> Routing:
    """The same routing with every tensor that a loss may learn through as a leaf of its own."""

    def leaf(values: Tensor) -> Tensor:
        return values.detach().clone().requires_grad_()

    levels = tuple(attrs.evolve(one, logits=(raw := leaf(one.logits)), biased=raw) for one in routing.levels)
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
def _beside(bench: Bench, rig: Rig, routing: Routing, leaf: Tensor, by: Tensor) -> dict[str, Tensor]:
    """The terms with one leaf moved, which is then put back."""
    before = leaf.clone()
    leaf += by
    terms = _terms(bench, rig, routing)
    leaf.copy_(before)
    return terms
