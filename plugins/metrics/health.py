"""A verdict in words."""

import math

import attrs
import torch

from moe_engine import Finding, hookimpl, option


@attrs.define(eq=False)
class Health:
    """One named verdict on a layer's balance, with the threshold it rests on and advice.

    collapsed: the load's effective number of experts exp(H) is at most max(1.25 K, E / 4), nor more than
    (K + E) / 2.
    dead experts: some expert has less than `dead` of the mean load. imbalanced: cv above `imbalance`
    and above twice what chance gives, sqrt(E / (T K)). oscillating: single forwards are imbalanced by
    more than `swing` beyond chance, and more than twice as much as the whole. healthy: none of these.
    Where nothing was routed there is no verdict.
    """

    imbalance: float = option(0.3, help="cv from which the load is imbalanced", min=0)
    dead: float = option(0.1, help="share of the mean load below which an expert is dead", min=0, max=1)
    swing: float = option(0.3, help="cv of single forwards from which the load oscillates", min=0)

    @hookimpl
    def moe_measure(self, routing):
        std, mean = torch.std_mean(routing.load, 0, correction=0, keepdim=True)
        return {"cv": std / mean.clamp(min=1e-30), "forwards": mean > 0}

    @hookimpl
    def moe_metrics(self, stats):
        load, spec = stats.load, stats.spec
        if not load.sum() or spec.experts == 1:
            return {}
        own = stats.of("health") or {"cv": 0.0, "forwards": 1.0}  # of counts alone: single forwards were not seen
        forwards = float(own["forwards"])
        return {"verdict": self.judge(load, spec.top_k, stats.tokens, float(own["cv"]) / forwards, forwards)}

    def judge(self, load, top_k, tokens, forward_cv=0.0, forwards=1.0):
        """The finding for a load [E] of `tokens` tokens with K = top_k; forward_cv: mean cv of single forwards."""
        size, mean = load.numel(), load.mean()
        f = load / load.sum()
        cv = float(load.std(correction=0) / mean)
        effective = float((-torch.special.xlogy(f, f).sum()).exp())
        few = min(max(1.25 * top_k, size / 4), (top_k + size) / 2)
        dead = (load < self.dead * mean).nonzero().flatten().tolist()
        chance = math.sqrt(size / (tokens * top_k))
        swing = math.sqrt(max(forward_cv**2 - chance**2 * forwards, 0.0))
        if top_k < size and effective <= few:
            why = f"the load of {size} experts is worth {effective:.1f} of them (limit {few:.1f})"
            return Finding(
                "collapsed", 2, why, "add a balancing plugin, such as switch_aux or saturation, or raise its strength"
            )
        if dead:
            named = ", ".join(map(str, dead[:8]))
            why = f"{len(dead)} of {size} experts get under {self.dead:g} of the mean load: {named}"
            return Finding("dead experts", 2, why, "add a balancing plugin, raise its strength, or use fewer experts")
        if cv > max(self.imbalance, 2 * chance):
            why = f"cv of the load is {cv:.2f} (limit {self.imbalance:g})"
            return Finding("imbalanced", 1, why, "add a balancing plugin, or raise its strength")
        if swing > self.swing and swing > 2 * cv:
            why = f"single forwards have cv {swing:.2f} beyond chance (limit {self.swing:g}), the whole {cv:.2f}"
            return Finding("oscillating", 1, why, "lower the balancing plugin's step or strength, or shuffle the data")
        return Finding(
            "healthy", 0, f"cv of the load is {cv:.2f} (limit {self.imbalance:g}), all {size} experts are active"
        )
