import math

import attrs
import torch

from moe_engine import Finding, all_reduce_sum, hookimpl, option


@attrs.define(eq=False)
class Health:
    """A verdict on a layer's balance, with a reason and advice.

    collapsed: the load's effective number of experts exp(H) is at most max(1.25 K, E / 4), and at most (K + E) / 2.
    dead experts: some expert has less than `dead` of the mean load. imbalanced: cv is above `imbalance` and above
    twice what chance gives, sqrt(E / (T K)). oscillating: single forwards are imbalanced by more than `swing` beyond
    chance, and more than twice as much as the whole. healthy: none of these. Without routed tokens there is no
    verdict.

    Source: this project.
    """

    imbalance: float = option(0.3, help="cv above which the load is imbalanced", min=0)
    dead: float = option(0.1, help="share of the mean load below which an expert is dead", min=0, max=1)
    swing: float = option(0.3, help="cv of single forwards above which the load oscillates", min=0)

    @hookimpl
    def moe_measure(self, routing, layer):
        load = all_reduce_sum(routing.load) if layer.training else routing.load  # in evaluation, ranks go separate ways
        share = routing.load.sum() / load.sum().clamp(min=1)  # of this forward's, which the ranks add up
        std, mean = torch.std_mean(load, 0, correction=0, keepdim=True)
        return {"cv": share * std / mean.clamp(min=1e-30), "forwards": share * (mean > 0)}

    @hookimpl
    def moe_metrics(self, stats):
        load, spec = stats.load, stats.spec
        if not load.sum() or spec.experts == 1:
            return {}
        sums = stats.of("health") or {"cv": 0.0, "forwards": 1.0}  # counts alone say nothing about single forwards
        forwards = float(sums["forwards"])
        return {"verdict": self.judge(load, spec.top_k, stats.tokens, float(sums["cv"]) / forwards, forwards)}

    def judge(self, load, top_k, tokens, forward_cv=0.0, forwards=1.0):
        """The finding for the load [E] of `tokens` tokens at K = top_k; forward_cv: mean cv of single forwards."""
        size, mean = load.numel(), load.mean()
        f = load / load.sum()
        cv = float(load.std(correction=0) / mean)
        effective = float((-torch.special.xlogy(f, f).sum()).exp())
        limit = min(max(1.25 * top_k, size / 4), (top_k + size) / 2)
        dead = (load < self.dead * mean).nonzero().flatten().tolist()
        chance = math.sqrt(size / (tokens * top_k))
        swing = math.sqrt(max(forward_cv**2 - chance**2 * forwards, 0.0))
        if top_k < size and effective <= limit:
            why = f"effectively {effective:.1f} of {size} experts are used (limit {limit:.1f})"
            return Finding("collapsed", 2, why, "strengthen the balancing loss or bias, or add one")
        if dead:
            named = ", ".join(map(str, dead[:8])) + (f" and {len(dead) - 8} more" if len(dead) > 8 else "")
            why = f"{len(dead)} of {size} experts get less than {self.dead:g} of the mean load: {named}"
            advice = "strengthen the balancing loss or bias, add one, or use fewer experts"
            return Finding("dead experts", 2, why, advice)
        if cv > max(self.imbalance, 2 * chance):
            why = f"the cv of the load is {cv:.3f} (limit {self.imbalance:g})"
            return Finding("imbalanced", 1, why, "strengthen the balancing loss or bias, or add one")
        if swing > self.swing and swing > 2 * cv:
            why = f"single forwards have cv {swing:.2f} beyond chance (limit {self.swing:g}), together {cv:.2f}"
            return Finding("oscillating", 1, why, "weaken the balancing loss or bias, or shuffle the data")
        why = f"the cv of the load is {cv:.3f} (limit {self.imbalance:g}), and all {size} experts are active"
        if float(load.min()) >= tokens:
            why = f"each token goes to all {size} experts, so nothing is routed"
        return Finding("healthy", 0, why)
