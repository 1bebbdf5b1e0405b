"""Claims about routers."""

from collections.abc import Iterator
from fractions import Fraction

import attrs
import torch
from torch import Tensor, nn

from ..contract.parts import Bias
from ..contract.routing import Routing
from ..contract.traits import provided_by
from ..errors import UsageError
from .bench import EXPERTS, TOP_K, Bench, Rig, data
from .biases import skewed
from .claims import NotApplicable, claim, demand
from .comparing import distance, same_bits


class Push(Bias):
    """A selection bias of given numbers, which nobody moves."""

    def __init__(self, values_n: Tensor) -> None:
        super().__init__()
        self.expert_buffer("values", values_n)

    values: Tensor

    def forward(self) -> Tensor:
        return self.values


def _with_logits(bench: Bench) -> Rig:
    rig = bench.rig()
    if not rig.layer.router.levels:
        raise NotApplicable("the router has no logits")
    return rig


def _gives(bench: Bench, *traits: str) -> None:
    for trait in traits:
        if trait not in provided_by(bench.subject.cls):
            raise NotApplicable(f"the router does not give '{trait}'")


def _accepted(bench: Bench) -> Iterator[tuple[int, Rig]]:
    """A layer for each K that the router takes."""
    for top_k in range(1, EXPERTS + 1):
        rig = bench.accepted(top_k=top_k)
        if not isinstance(rig, str):
            yield top_k, rig


@claim("moe_router")
def learns_from_the_task(bench: Bench) -> None:
    """The task's gradient reaches the logits of every level, in training and evaluation, for every K that it takes."""
    _with_logits(bench)
    taken = list(_accepted(bench))
    demand(taken, f"it takes no K from 1 to {EXPERTS}")
    for top_k, rig in taken:
        for training in (True, False):
            rig.layer.train(training)
            for level in rig.route(data()).levels:
                advice = "score(tokens) must not detach them"
                demand(level.logits.requires_grad, f"the logits of level '{level.name}' have no graph; {advice}")
            try:
                rig.engine.check_learning(lambda rig=rig: data().loss(rig.forward(data())))  # type: ignore[misc]
            except UsageError as error:
                demand(False, f"at top_k={top_k}: {error}")


@claim("moe_router")
def choices_are_sound(bench: Bench) -> None:
    """Each choice is a real token's, of an expert that there is, and no token chooses one twice."""
    mask = torch.ones(3, 8, dtype=torch.bool)
    mask[1, 4:] = False
    for top_k, rig in _accepted(bench):
        routing = rig.route(attrs.evolve(data(), mask=mask))
        plan, real = routing.plan, mask.flatten()
        chosen = plan.selected
        inside = (plan.expert >= 0) & (plan.expert < EXPERTS) & (plan.token >= 0) & (plan.token < 24)
        demand(inside.all(), f"at top_k={top_k} it names an expert or a token that does not exist")
        demand(
            real[plan.token][chosen].all(), f"at top_k={top_k} padding chooses; select only where tokens.mask is True"
        )
        demand(not (plan.kept & ~chosen).any(), f"at top_k={top_k} it keeps what nobody chose")
        twice = routing.chosen().max() if chosen.any() else torch.zeros(())
        demand(twice <= 1, f"at top_k={top_k} a token chooses the same expert twice; take distinct ones, as topk does")


@claim("moe_router")
def picks_are_as_many_as_said(bench: Bench) -> None:
    """A router that gives 'top_k' picks K experts for every token, in training and in evaluation."""
    _gives(bench, "top_k")
    for top_k, rig in _accepted(bench):
        for training in (True, False):
            rig.layer.train(training)
            per_token = rig.route(data()).chosen().sum(-1)
            found = sorted({int(one) for one in per_token})
            demand(
                found == [top_k],
                f"at top_k={top_k} tokens pick {found} experts; declare what it does provide in its traits",
            )


@claim("moe_router")
def first_choice_is_best(bench: Bench) -> None:
    """Of a router that gives 'top_k', a token's choices are ranked, best first: rank 0 has the largest gate."""
    _gives(bench, "top_k")
    for top_k, rig in _accepted(bench):
        rig.layer.eval()
        plan = rig.route(data()).plan
        if plan.token.numel() != 24 * top_k:
            raise NotApplicable("it does not pick K experts, which another claim says")
        ranked = plan.rank.bincount().tolist() == [24] * top_k
        demand(ranked, f"at top_k={top_k} a token's ranks are not 0 to {top_k - 1}; assign(...) makes them")
        gate_N, first_N = plan.weight.detach(), plan.rank == 0
        largest_T = gate_N.new_zeros(24).scatter_reduce(0, plan.token, gate_N, "amax")
        first_T = gate_N.new_zeros(24).scatter(0, plan.token[first_N], gate_N[first_N])
        best = bool((first_T >= largest_T - 1e-6).all())
        demand(best, f"at top_k={top_k} the first choice has not the largest gate; sort choices, as topk does")


@claim("moe_router")
def logits_are_raw(bench: Bench) -> None:
    """What a router that gives 'logits' scores are raw logits, not probabilities nor their logs."""
    _gives(bench, "logits")
    for level in _with_logits(bench).route(data()).levels:
        raw = level.logits.detach()
        normal = min(distance(torch.ones(24), raw.sum(-1)), distance(torch.zeros(24), raw.logsumexp(-1)))
        demand(normal > 1e-4, f"the scores of level '{level.name}' are normalised already; leave that to select()")


@claim("moe_router")
def probabilities_are_a_distribution(bench: Bench) -> None:
    """A router that gives 'probs' answers probabilities over all experts that sum to 1 for each token."""
    _gives(bench, "probs")
    for top_k, rig in _accepted(bench):
        for deep in (False, True) if rig.layer.router.levels else (False,):
            if deep:
                rig.give_logits(*rig.logits(lambda tokens, units: torch.full((tokens, units), -50.0)))
            probs, when = rig.route(data()).probs, f"at top_k={top_k}{' for logits of -50' * deep}"
            demand(probs is not None and probs.shape == (24, EXPERTS), f"{when} probs are no [T, E] tensor")
            assert probs is not None
            demand(bool((probs >= 0).all()), f"{when} a probability is below 0; normalise, as softmax does")
            gap = distance(torch.ones(24), probs.sum(-1))
            demand(gap < 1e-4, f"{when} a token's probabilities sum to 1 only within {gap:.2g}; normalise over all E")


@claim("moe_router")
def chances_are_what_happens(bench: Bench) -> None:
    """A router that gives 'smooth_load' estimates how often its own noise would choose each expert."""
    if "smooth_load" not in provided_by(bench.subject.cls):
        raise NotApplicable("the router does not give 'smooth_load'")
    rig = bench.rig()
    with torch.no_grad():
        routings = [rig.route(data(), seed) for seed in range(400)]
        found, said = (torch.stack(several).mean(0) for several in zip(*map(_loads, routings), strict=True))
    gap = float((found - said).abs().max())
    demand(
        gap < 1.0,
        f"an expert's estimated load is off by {gap:.2g} of 24 tokens; compare noisy logits with noisy logits",
    )


def _loads(routing: Routing) -> tuple[Tensor, Tensor]:
    """What was chosen, and the estimate of it."""
    demand(routing.smooth_load is not None, "it gives no smooth_load in training; pass chances= to assign(...)")
    assert routing.smooth_load is not None
    return routing.load, routing.smooth_load


@claim("moe_router")
def ties_are_shared(bench: Bench) -> None:
    """Equal logits do not send every token to the same experts."""
    _gives(bench, "logits", "load")
    rig = _with_logits(bench)
    rig.give_logits(*rig.logits(torch.zeros))
    for training in (True, False):
        rig.layer.train(training)
        load = rig.route(data()).load
        shared = bool((load > 0).all()) or not load.any()
        demand(shared, f"the load of equal logits is {load.tolist()}; take the top of level.select_by(...)")


@claim("moe_router")
def bias_moves_choices_and_no_gate(bench: Bench) -> None:
    """A selection bias moves the choice, and neither a gate nor a probability."""
    _gives(bench, "logits", "load")
    rig = _with_logits(bench)
    rig.layer.eval()
    free = rig.route(data())
    for level, biases in zip(rig.layer.router.levels, rig.layer.biases, strict=True):
        assert isinstance(biases, nn.ModuleDict)
        biases["push"] = Push(torch.linspace(-1, 1, level.size))
    pushed = rig.route(data())
    chosen = [one.chosen() for one in (free, pushed)]
    advice = "take the top of level.select_by(scores), and make gates of level.biased"
    demand(not torch.equal(*chosen), f"a bias of up to 1 moves no choice; {advice}")
    if free.probs is not None and pushed.probs is not None:
        demand(same_bits(free.probs, pushed.probs), f"a selection bias moves probabilities; {advice}")
    same_T = (chosen[0] == chosen[1]).all(-1)  # a normalised gate depends on what else was chosen
    gap = distance(free.gates()[same_T], pushed.gates()[same_T])
    demand(gap < 1e-6, f"a selection bias moves gates by {gap:.2g}; {advice}")


@claim("moe_router")
def capacity_holds(bench: Bench) -> str | None:
    """No expert keeps more than ceil(C T K / E) of T tokens, nor more than T, whatever the capacity C."""
    mask = torch.ones(3, 8, dtype=torch.bool)
    mask[2, 3:] = False
    for capacity in (0.3, 1.0, 100.0):
        rig = bench.accepted(capacity=capacity)
        if isinstance(rig, str):
            return rig
        if rig.layer.router.levels:
            rig.give_logits(*rig.logits(skewed))
        routing = rig.route(attrs.evolve(data(), mask=mask))
        kept = torch.bincount(routing.plan.expert[routing.plan.kept], minlength=EXPERTS)
        limit = min(-(-Fraction(str(capacity)) * 19 * TOP_K // EXPERTS), 19)
        demand(
            int(kept.max()) <= limit,
            f"with capacity {capacity} an expert keeps {int(kept.max())} of 19; {limit} is all",
        )
    return None


@claim("moe_router", "moe_experts")
def causal_sees_no_future(bench: Bench) -> str | None:
    """In a causal layer no token's output depends on a later token; or such a layer is refused."""
    one, other = data(1, 8, seed=1), data(1, 8, seed=2)
    changed = one.map(lambda v: v.clone())
    for mine, its in ((changed.x, 3 * other.x), (changed.ids, other.ids)):
        mine[:, 4:] = its[:, 4:]
    advice = "a causal layer must not see it: refuse it in moe_check by moe_engine.causal_problem"
    for capacity in (None, 1.0):
        rig = bench.accepted(causal=True, capacity=capacity)
        if isinstance(rig, str):
            return rig
        for training in (True, False):
            rig.layer.train(training)
            gap = distance(rig.forward(one)[:, :4], rig.forward(changed)[:, :4])
            demand(gap < 1e-5, f"a later token changes an output by {gap:.2g}; {advice}")
        gap = distance(rig.evaluate(one)[:, :4], rig.evaluate(one.map(lambda v: v[:, :4])))
        demand(gap < 1e-5, f"whether there are later tokens changes an output by {gap:.2g}; {advice}")
    return None
