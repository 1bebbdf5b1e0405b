"""Send tokens to their experts and combine the outputs.

Assignments are sorted by expert, the bank maps each expert's rows, and a token's outputs are summed by gate. A router
that mixes tokens (`Slots`) has einsums in both places instead.
"""

import torch
from torch import Tensor

from ..contract.numerics import at_least_fp32, without_autocast
from ..contract.parts import Experts
from ..contract.routing import Routing, Slots
from .sharded import gather_for_outputs


def dispatch(experts: Experts, routing: Routing, out: int) -> Tensor:
    """[T, out]: the sum over a token's kept assignments of weight times expert output, in fp32 or better.

    out: the experts' output width. A token without a kept assignment gets 0.
    """
    gather_for_outputs(experts)
    if routing.slots is not None:
        return _soft_dispatch(experts, routing.tokens.x, routing.slots, out)
    return experts.routed(routing.tokens.x, routing.plan, routing.experts)


def _soft_dispatch(experts: Experts, x_TD: Tensor, slots: Slots, out: int) -> Tensor:
    """[T, out] where every slot is a mixture of its group's tokens, and every output a mixture of slots.

    Soft MoE (Puigcerver et al., 2024). G groups of S tokens, n slots per expert in each group.
    """
    groups, size, count, each = slots.dispatch.shape
    counts_E = torch.full((count,), groups * each, device=x_TD.device)
    with without_autocast(x_TD.device):
        x_GSD = x_TD.view(groups, size, x_TD.shape[1]).to(slots.dispatch.dtype)
        slot_EGnD = torch.einsum("gsen,gsd->egnd", slots.dispatch, x_GSD).to(x_TD.dtype)
    out_NO = at_least_fp32(experts.rows(slot_EGnD.flatten(0, 2), counts_E)).to(slots.combine.dtype)
    with without_autocast(x_TD.device):
        y_GSO = torch.einsum("gsen,egno->gso", slots.combine, out_NO.view(count, groups, each, out))
    return y_GSO.reshape(-1, out)
