"""Capacity: how many assignments an expert keeps."""

from fractions import Fraction

import attrs
import torch

from ..contract.numerics import rows_of
from ..contract.routing import Assignments, Spec, Tokens


def within_capacity(plan: Assignments, spec: Spec, tokens: Tokens) -> Assignments:
    """Keep at most ceil(capacity * T * K / E) assignments of each expert, T counting real tokens.

    First choices go before second ones, then earlier tokens before later ones; in a causal layer only
    the latter, so that no token's fate depends on a later one's choice. Gates are not renormalised after a
    drop. The limit is computed in whole numbers: in floating point 1.1 * 100 / 10 is above 11, and its ceiling 12.
    """
    factor = Fraction(str(spec.capacity)).limit_denominator(10**6)  # int64 holds it times T * K
    limit = -(-(tokens.count * spec.top_k * factor.numerator) // (spec.experts * factor.denominator))
    by_expert = torch.where(plan.selected, plan.expert, spec.experts)
    key = by_expert if spec.causal else by_expert * spec.top_k + plan.rank.clamp(max=spec.top_k - 1)
    order = torch.argsort(key, stable=True)
    load = rows_of(by_expert, spec.experts + 1)
    place = torch.arange(order.shape[0], device=order.device) - (load.cumsum(0) - load)[by_expert[order]]
    kept = torch.empty_like(plan.kept).index_copy(0, order, place < limit)
    return attrs.evolve(plan, kept=plan.selected & kept)
