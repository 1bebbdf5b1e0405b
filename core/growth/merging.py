"""The growth that merges experts into one: their shares, and the order of their hidden units."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..contract.growth import Growth, Order
from ..errors import UsageError
from ..layer.experts import StackedMLP
from ..layer.moe import MoE
from .plans import plans_of


def merging(
    layer: MoE, experts: Sequence[int], load: Tensor | Sequence[float] | None = None, align: bool = False
) -> Growth:
    """The growth that merges some experts of a layer into one, for `engine.grow`.

    W = sum_i load_i W_i / sum_i load_i, for the router's rows and the optimizer's state too. load [E]: by default
    that since the layer last grew; without one, or if it is 0 for all of these experts, they count equally.

    align: permute the hidden units of each expert to match those of the first before averaging; that changes no
    expert's output, and states of optimizers and weight averages are permuted alike. A unit is its row of incoming
    weights (gate and up together for swiglu), its bias and its outgoing weights. Units are matched greedily, the
    closest pair first, which finds a permutation of the same units exactly and others approximately: the optimal
    assignment of the source needs a solver that is no dependency here. Memory: H x H numbers.

    Sources: Li et al., 2024 (Merge, Then Compress: MC-SMoE), the mean by load; Ainsworth et al., 2023 (Git Re-Basin),
    the alignment. Raises UsageError for experts that can't be merged, and for align with experts that are no plain
    StackedMLP.
    """
    group, load = tuple(experts), layer.load_since_growth if load is None else torch.as_tensor(load)
    if load is not None and load.shape != (layer.spec.experts,):
        message = f"the load for a merge in layer '{layer.name}' is [{layer.spec.experts}], not {list(load.shape)}"
        raise UsageError(message, code="bad-growth")
    growth = Growth(layer.name, (group,), drop=group)
    plans_of(layer, growth)
    why = f"experts {', '.join(map(str, group))} merged"
    weights = {expert: float(load[expert]) for expert in group} if load is not None else {}
    shares = weights if sum(weights.values()) != 0 else {}
    orders = _orders(layer, group) if align else {}
    growth = Growth(layer.name, (group,), drop=group, shares=shares, orders=orders, why=why)
    plans_of(layer, growth)
    return growth


@torch.no_grad()
def _orders(layer: MoE, group: Sequence[int]) -> dict[str, Order]:
    """For each tensor with hidden units, the order of each expert's that matches the first one's."""
    bank = layer.experts
    if not isinstance(bank, StackedMLP) or not bank.axes.keys() <= {"w_in", "b_in", "w_out", "b_out"}:
        message = f"align matches hidden units of a StackedMLP; layer '{layer.name}' has a {type(bank).__name__}"
        raise UsageError(message, code="cannot-align")
    first, *others = (_units(bank, expert) for expert in group)
    match = {expert: _greedy(first, units) for expert, units in zip(group[1:], others, strict=True)}
    hidden = bank.w_out.shape[1]
    wide = bank.w_in.shape[2] // hidden  # 2 for swiglu: the gates' columns, then those of the up projection
    columns = {e: torch.cat([index_H + part * hidden for part in range(wide)]) for e, index_H in match.items()}
    orders = {"experts.w_in": Order(1, columns), "experts.w_out": Order(0, match)}
    return orders | ({"experts.b_in": Order(0, columns)} if bank.b_in is not None else {})


def _units(bank: StackedMLP, expert: int) -> Tensor:
    """[H, n]: each hidden unit's incoming weights, biases and outgoing weights, in fp32 or better."""
    hidden = bank.w_out.shape[1]
    inside = bank.w_in[expert].unflatten(1, (-1, hidden)).flatten(0, 1).t()  # [H, D] or [H, 2D]
    bias = [] if bank.b_in is None else [bank.b_in[expert].unflatten(0, (-1, hidden)).t()]
    units_Hn = torch.cat([inside, *bias, bank.w_out[expert]], 1)
    return units_Hn.to(torch.promote_types(units_Hn.dtype, torch.float32))


def _greedy(first_Hn: Tensor, other_Hn: Tensor) -> Tensor:
    """[H]: for each unit of the first expert, its unit of the other one; the closest pairs are matched first."""
    score_HH = first_Hn @ other_Hn.t()  # less half of both squared lengths: minus half of the squared distance
    score_HH -= (first_Hn.square().sum(1)[:, None] + other_Hn.square().sum(1)) / 2
    rest_n, free_n = torch.arange(len(first_Hn)), torch.arange(len(other_Hn))
    rest_n, free_n = rest_n.to(score_HH.device), free_n.to(score_HH.device)
    match_H = torch.empty_like(rest_n)
    while len(rest_n):  # pairs that are each other's closest; the closest of all is always one
        score_nn = score_HH[rest_n][:, free_n]
        best_n = score_nn.argmax(1)
        mutual_n = score_nn.argmax(0)[best_n] == torch.arange(len(rest_n), device=best_n.device)
        match_H[rest_n[mutual_n]] = free_n[best_n[mutual_n]]
        open_n = torch.ones_like(mutual_n).index_fill(0, best_n[mutual_n], False)
        rest_n, free_n = rest_n[~mutual_n], free_n[open_n]
    return match_H
