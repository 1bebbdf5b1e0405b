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
from .bench import EXPERTS, MANY, TOP_K, Bench, Trial, data
from .biases import skewed
from .claims import NotApplicable, claim, demand
from .comparing import distance, same_bits


class FixedBias(Bias):
    """A selection bias with constant values [n]."""

    def __init__(self, values_n: Tensor) -> None:
        super().__init__()
        self.expert_buffer("values", values_n)

    values: Tensor

    def forward(self) -> Tensor:
        return self.values


def _with_logits(bench: Bench) -> Trial:
    trial = bench.trial()
    if not trial.layer.router.levels:
        raise NotApplicable("the router has no logits")
    return trial


def _only_with(bench: Bench, *traits: str) -> None:
    for trait in traits:
        if trait not in provided_by(bench.plugin.cls):
            raise NotApplicable(f"the router does not provide '{trait}'")


def _for_each_top_k(bench: Bench) -> Iterator[tuple[int, Trial]]:
    """A layer for each K that the router supports."""
    for top_k in range(1, EXPERTS + 1):
        trial = bench.trial_or_refusal(top_k=top_k)
        if not isinstance(trial, str):
            yield top_k, trial


@claim("moe_router")
def learns_from_the_task(bench: Bench) -> None:
    """The task's gradient reaches the logits of every level, in training and evaluation, for every K it supports."""
    _with_logits(bench)
    trials = list(_for_each_top_k(bench))
    demand(trials, f"it supports no K from 1 to {EXPERTS}")
    for top_k, trial in trials:
        for training in (True, False):
            trial.layer.train(training)
            for level in trial.route(data()).levels:
                attached = level.logits.requires_grad
                demand(
                    attached, f"the logits of level '{level.name}' have no graph; score(tokens) must not detach them"
                )
            try:
                trial.engine.check_learning(lambda trial=trial: data().loss(trial.forward(data())))  # type: ignore[misc]
            except UsageError as error:
                demand(False, f"at top_k={top_k}: {error}")


@claim("moe_router")
def choices_are_valid(bench: Bench) -> None:
    """Only real tokens choose, only existing experts are chosen, and no token chooses an expert twice."""
    mask = torch.ones(3, 8, dtype=torch.bool)
    mask[1, 4:] = False
    for top_k, trial in _for_each_top_k(bench):
        routing = trial.route(attrs.evolve(data(), mask=mask))
        plan, real = routing.plan, mask.flatten()
        chosen = plan.selected
        inside = (plan.expert >= 0) & (plan.expert < EXPERTS) & (plan.token >= 0) & (plan.token < 24)
        demand(inside.all(), f"at top_k={top_k} it names an expert or a token that does not exist")
        only_real = real[plan.token][chosen].all()
        demand(only_real, f"at top_k={top_k} padding is routed; select only tokens with tokens.mask True")
        demand(not (plan.kept & ~chosen).any(), f"at top_k={top_k} it keeps an assignment that was not selected")
        most = routing.chosen().max() if chosen.any() else torch.zeros(())
        demand(most <= 1, f"at top_k={top_k} a token chooses the same expert twice; choose distinct ones, as topk does")


@claim("moe_router")
def choices_are_made(bench: Bench) -> None:
    """A router that provides 'choices' selects experts for tokens."""
    _only_with(bench, "choices")
    selected = bench.trial().route(data()).plan.selected
    demand(selected.any(), "nothing is selected for 24 tokens; remove 'choices': traits = Traits(provides=...)")


@claim("moe_router")
def top_k_is_kept(bench: Bench) -> None:
    """A router that provides 'top_k' selects K experts for every token, in training and in evaluation."""
    _only_with(bench, "top_k")
    for top_k, trial in _for_each_top_k(bench):
        for training in (True, False):
            trial.layer.train(training)
            per_token = trial.route(data()).chosen().sum(-1)
            found = sorted({int(count) for count in per_token})
            demand(
                found == [top_k],
                f"at top_k={top_k} tokens select {found} experts; "
                "select K, or declare what the router provides: traits = Traits(provides=...)",
            )


@claim("moe_router")
def first_choice_has_the_largest_gate(bench: Bench) -> None:
    """If a router provides 'top_k', a token's choices are ranked, and rank 0 has the largest gate."""
    _only_with(bench, "top_k")
    for top_k, trial in _for_each_top_k(bench):
        trial.layer.eval()
        plan = trial.route(data()).plan
        if plan.token.numel() != 24 * top_k:
            raise NotApplicable("it does not select K experts, which top_k_is_kept reports")
        ranked = plan.rank.bincount().tolist() == [24] * top_k
        demand(ranked, f"at top_k={top_k} a token's ranks are not 0 to {top_k - 1}; assign(...) makes them")
        gate_N, first_N = plan.weight.detach(), plan.rank == 0
        largest_T = gate_N.new_zeros(24).scatter_reduce(0, plan.token, gate_N, "amax")
        first_T = gate_N.new_zeros(24).scatter(0, plan.token[first_N], gate_N[first_N])
        best = bool((first_T >= largest_T - 1e-6).all())
        demand(best, f"at top_k={top_k} the first choice does not have the largest gate; sort choices, as topk does")


@claim("moe_router")
def logits_are_raw(bench: Bench) -> None:
    """A router that provides 'logits' scores tokens with raw logits, not probabilities or their logs."""
    _only_with(bench, "logits")
    trial = bench.trial()
    levels = trial.route(data()).levels
    demand(levels, "it has no level, and so no logits; declare what it provides: traits = Traits(provides=...)")
    for level in levels:
        raw = level.logits.detach()
        gap = min(distance(torch.ones(24), raw.sum(-1)), distance(torch.zeros(24), raw.logsumexp(-1)))
        demand(gap > 1e-4, f"the scores of level '{level.name}' are normalised; normalise in select(), not in score()")


@claim("moe_router")
def probabilities_are_a_distribution(bench: Bench) -> None:
    """If a router provides 'probs', each token's probabilities over all experts are not negative and sum to 1."""
    _only_with(bench, "probs")
    for top_k, trial in _for_each_top_k(bench):
        for low in (False, True) if trial.layer.router.levels else (False,):
            if low:
                trial.set_logits(*trial.logits(lambda tokens, units: torch.full((tokens, units), -50.0)))
            probs, when = trial.route(data()).probs, f"at top_k={top_k}{' for logits of -50' * low}"
            demand(probs is not None and probs.shape == (24, EXPERTS), f"{when} probs is not a [T, E] tensor")
            assert probs is not None
            demand(bool((probs >= 0).all()), f"{when} a probability is negative; normalise, as softmax does")
            gap = distance(torch.ones(24), probs.sum(-1))
            demand(gap < 1e-4, f"{when} a token's probabilities sum to 1 only within {gap:.2g}; normalise over all E")


@claim("moe_router")
def smooth_load_matches_the_load(bench: Bench) -> None:
    """If a router provides 'smooth_load', it estimates the mean load over draws of the router's noise."""
    _only_with(bench, "smooth_load")
    trial = bench.trial()
    with torch.no_grad():
        routings = [trial.route(data(), seed) for seed in range(400)]
        load, estimate = (torch.stack(draws).mean(0) for draws in zip(*map(_loads, routings), strict=True))
    gap = float((load - estimate).abs().max())
    demand(
        gap < 1.0,
        f"an expert's estimated load is off by {gap:.2g} of 24 tokens; compare noisy logits with noisy logits",
    )


def _loads(routing: Routing) -> tuple[Tensor, Tensor]:
    """The load and its estimate, [E] each."""
    demand(routing.smooth_load is not None, "smooth_load is None in training; pass chances= to assign(...)")
    assert routing.smooth_load is not None
    return routing.load, routing.smooth_load


@claim("moe_router")
def ties_are_spread(bench: Bench) -> None:
    """Equal logits send different tokens to all experts alike, and identical tokens to the same ones."""
    _only_with(bench, "logits", "load")
    advice = "take the top of level.select_by(...), on each level"
    for experts in (EXPERTS, MANY):
        trial = bench.trial_or_refusal(experts=experts)
        if isinstance(trial, str):
            continue
        if not trial.layer.router.levels:
            raise NotApplicable("the router has no logits")
        batch = data(1, 100 * experts)
        trial.set_logits(*trial.logits(torch.zeros, 100 * experts))
        for training in (True, False):
            trial.layer.train(training)
            load = trial.route(batch).load
            if not load.any():
                continue
            most = float(load.max() / load.mean())
            demand(
                bool(load.min() > 0) and most < 3,
                f"for equal logits {int((load == 0).sum())} of {experts} experts get no token, and one gets "
                f"{most:.3g} times the mean; {advice}",
            )
        alike = trial.route(batch.map(lambda v: v[:, :1].expand(v.shape))).chosen()
        same = bool((alike == alike[0]).all())
        demand(same, "identical tokens with equal logits choose different experts in evaluation; " + advice)


@claim("moe_router")
def bias_changes_choices_but_no_gate(bench: Bench) -> None:
    """A selection bias changes choices, but neither gates nor probabilities."""
    _only_with(bench, "logits", "load")
    trial = _with_logits(bench)
    trial.layer.eval()
    free = trial.route(data())
    for level, biases in zip(trial.layer.router.levels, trial.layer.biases, strict=True):
        assert isinstance(biases, nn.ModuleDict)
        biases["fixed"] = FixedBias(torch.linspace(-1, 1, level.size))
    biased = trial.route(data())
    chosen = [routing.chosen() for routing in (free, biased)]
    advice = "choose by level.select_by(scores), and compute gates from level.biased"
    demand(not torch.equal(*chosen), f"a selection bias of up to 1 changes no choice; {advice}")
    if free.probs is not None and biased.probs is not None:
        demand(same_bits(free.probs, biased.probs), f"a selection bias changes probabilities; {advice}")
    same_T = (chosen[0] == chosen[1]).all(-1)  # a normalised gate depends on the token's other choices
    gap = distance(free.gates()[same_T], biased.gates()[same_T])
    demand(gap < 1e-6, f"a selection bias changes gates by {gap:.2g}; {advice}")


@claim("moe_router")
def capacity_is_respected(bench: Bench) -> str | None:
    """No expert keeps more than min(ceil(C T K / E), T) of T tokens, for any capacity C, in training and evaluation."""
    mask = torch.ones(3, 8, dtype=torch.bool)
    mask[2, 3:] = False
    for capacity in (0.3, 1.0, 100.0):
        trial = bench.trial_or_refusal(capacity=capacity, eval_capacity=capacity)
        if isinstance(trial, str):
            return trial
        if trial.layer.router.levels:
            trial.set_logits(*trial.logits(skewed))
        limit = min(-(-Fraction(str(capacity)) * 19 * TOP_K // EXPERTS), 19)
        for training in (True, False):
            trial.layer.train(training)
            routing = trial.route(attrs.evolve(data(), mask=mask))
            most = int(torch.bincount(routing.plan.expert[routing.plan.kept], minlength=EXPERTS).max())
            demand(most <= limit, f"with capacity {capacity} an expert keeps {most} of 19 tokens; its limit is {limit}")
    return None


@claim("moe_router", "moe_experts")
def causal_layer_sees_no_future(bench: Bench) -> str | None:
    """In a causal layer no token's output depends on a later token, or the layer is refused."""
    batch, other = data(1, 8, seed=1), data(1, 8, seed=2)
    changed = batch.map(lambda v: v.clone())
    for tensor, values in ((changed.x, 3 * other.x), (changed.ids, other.ids)):
        tensor[:, 4:] = values[:, 4:]
    advice = "refuse a causal layer in moe_check, with moe_engine.causal_problem"
    for capacity in (None, 1.0):
        trial = bench.trial_or_refusal(causal=True, capacity=capacity)
        if isinstance(trial, str):
            return trial
        for training in (True, False):
            trial.layer.train(training)
            gap = distance(trial.forward(batch)[:, :4], trial.forward(changed)[:, :4])
            demand(gap < 1e-5, f"a later token changes an output by {gap:.2g}; {advice}")
        gap = distance(trial.evaluate(batch)[:, :4], trial.evaluate(batch.map(lambda v: v[:, :4])))
        demand(gap < 1e-5, f"the presence of later tokens changes an output by {gap:.2g}; {advice}")
    return None
