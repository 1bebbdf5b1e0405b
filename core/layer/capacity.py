"""Capacity: how many assignments an expert keeps."""

from fractions import Fraction

import attrs
import torch

from ..contract.numerics import rows_of
from ..contract.routing import Assignments, Spec, Tokens


def within_capacity(plan: Assignments, spec: Spec, tokens: Tokens) -> Assignments:
    """Keep at most ceil(capacity * T * K / E) assignments of each expert, T counting real tokens.

    Expert capacity of GShard (Lepikhin et al., 2021) and Switch Transformer (Fedus et al., 2022). First choices take
    precedence over second ones, then earlier tokens over later ones. In a causal layer only the order of tokens
    counts, because whether a token is dropped must not depend on later tokens. Gates are not renormalised after a
    drop. The limit is computed in integers: in floating point 1.1 * 100 / 10 is above 11, and its ceiling is 12.
    """
    factor = Fraction(str(spec.capacity)).limit_denominator(10**6)  # times T * K it still fits int64
    limit = -(-(tokens.count * spec.top_k * factor.numerator) // (spec.experts * factor.denominator))
    expert_N = torch.where(plan.selected, plan.expert, spec.experts)  # not selected: sorted to the end
    key_N = expert_N if spec.causal else expert_N * spec.top_k + plan.rank.clamp(max=spec.top_k - 1)
    order_N = torch.argsort(key_N, stable=True)
    load = rows_of(expert_N, spec.experts + 1)
    position_N = torch.arange(order_N.shape[0], device=order_N.device) - (load.cumsum(0) - load)[expert_N[order_N]]
    kept_N = torch.empty_like(plan.kept).index_copy(0, order_N, position_N < limit)
    return attrs.evolve(plan, kept=plan.selected & kept_N)
