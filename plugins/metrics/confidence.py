import math

import attrs
import torch

from moe_engine import Level, Traits, evaluating, hookimpl


@attrs.define(eq=False)
class Confidence:
    """How sure the router is of its choices.

    confidence: mean_t max_i p_ti, at least 1 / E. margin: mean_t s_(K) - s_(K+1), the K-th largest score minus the
    next. Both on the held-out batch in eval mode. s are the router's selection scores in their own units, with
    selection biases: a small margin is easily overturned. The margin is null where a choice is not the top K of one
    list of scores: K = E, groups, two levels, or a varying number of choices.

    Source: this project.
    """

    traits = Traits(requires=("probs",))

    @hookimpl
    def moe_metrics(self, probe, layer):
        if probe is None or probe.probs is None:
            return {}
        return {"confidence": probe.mean(probe.probs.detach().amax(-1)), "margin": margin(probe, layer.router)}


@attrs.define(eq=False)
class Recorded(Level):
    """A level that keeps what the choice took the top of."""

    by: torch.Tensor | None = None

    def select_by(self, scores):
        self.by = Level.select_by(self, scores)
        return self.by


@torch.no_grad()
def margin(probe, router):
    """The mean margin over the real tokens of a routing, or nan where it is undefined."""
    levels = tuple(Recorded(**attrs.asdict(level, recurse=False)) for level in probe.levels)
    if len(levels) != 1 or not 0 < router.levels[0].top_k < probe.experts:
        return math.nan
    with evaluating(router):
        router.select(probe.tokens, levels)
    by_TE, top_k = levels[0].by, router.levels[0].top_k
    if by_TE is None or by_TE.shape != probe.chosen().shape:
        return math.nan
    best_TK = by_TE.topk(top_k + 1, dim=-1)
    top_TE = torch.zeros_like(probe.chosen()).scatter(1, best_TK.indices[:, :top_k], 1.0)
    if not torch.equal(probe.tokens.real(top_TE), probe.chosen()):
        return math.nan
    edge_TK = best_TK.values.float()
    return probe.mean(edge_TK[:, -2] - edge_TK[:, -1])
