"""Capacity: how many assignments an expert keeps."""

from fractions import Fraction

import attrs
import torch
from torch import Tensor

from ..contract.numerics import rows_of
from ..contract.routing import Assignments, Spec, Tokens


def within_capacity(plan: Assignments, spec: Spec, tokens: Tokens, capacity: float) -> Assignments:
    """Keep at most ceil(capacity * T * K / E) assignments of each expert, T counting real tokens.

    T is that of the whole batch or, if `spec.capacity_per` says so, of each sequence, whose assignments then have that
    limit for themselves. Expert capacity of GShard (Lepikhin et al., 2021) and Switch Transformer (Fedus et al., 2022).
    First choices take precedence over second ones, then earlier tokens over later ones. In a causal layer only the
    order of tokens counts, because whether a token is dropped must not depend on later tokens. Gates are not
    renormalised after a drop. The limit is computed in integers: in floating point 1.1 * 100 / 10 is above 11, and its
    ceiling is 12.
    """
    factor = Fraction(str(capacity)).limit_denominator(10**6)  # times T * K it still fits int64
    group_N, real_G = _groups(plan, spec, tokens)
    limit_G = -(-(real_G * spec.top_k * factor.numerator) // (spec.experts * factor.denominator))
    places = real_G.shape[0] * spec.experts  # an expert has one for each group
    place_N = torch.where(
        plan.selected, group_N * spec.experts + plan.expert, places
    )  # not selected: sorted to the end
    key_N = place_N if spec.causal else place_N * spec.top_k + plan.rank.clamp(max=spec.top_k - 1)
    order_N = torch.argsort(key_N, stable=True)
    load = rows_of(place_N, places + 1)
    position_N = torch.arange(order_N.shape[0], device=order_N.device) - (load.cumsum(0) - load)[place_N[order_N]]
    kept_N = torch.empty_like(plan.kept).index_copy(0, order_N, position_N < limit_G[group_N[order_N]])
    return attrs.evolve(plan, kept=plan.selected & kept_N)


def _groups(plan: Assignments, spec: Spec, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """(the group [N] of each assignment, the number [G] of real tokens of each group)."""
    if spec.capacity_per == "batch" or len(tokens.shape) < 2:
        return torch.zeros_like(plan.token), tokens.count.view(1)
    length = max(tokens.shape[-1], 1)
    real_T = torch.ones(tokens.x.shape[:1], dtype=torch.long, device=tokens.x.device)
    if tokens.mask is not None:
        real_T = tokens.mask.long()
    return plan.token // length, real_T.view(-1, length).sum(1)
