"""The growth that merges experts into one: their shares, and the order of their hidden units."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..contract.growth import Growth, HiddenUnits, Order
from ..contract.parts import Experts
from ..errors import UsageError
from ..layer.experts import StackedMLP
from ..layer.moe import MoE
from .plans import plans_of

OF_STACKED_MLP = {"w_in": HiddenUnits(2), "b_in": HiddenUnits(1), "w_out": HiddenUnits(1)}


def merging(
    layer: MoE, experts: Sequence[int], load: Tensor | Sequence[float] | None = None, align: bool = False
) -> Growth:
    """The growth that merges some experts of a layer into one, for `engine.grow`.

    W = sum_i load_i W_i / sum_i load_i, for the router's rows and the optimizer's state too. load [E]: by default
    that since the layer last grew; without one, or if it is 0 for all of these experts, they count equally.

    align: permute the hidden units of each expert to match those of the first before averaging; that changes no
    expert's output, and states of optimizers and weight averages are permuted alike. A unit is its row of incoming
    weights (gate and up together), its bias and its outgoing weights; where they lie, a bank says itself
    (`HiddenUnits`), and for an adopted block its family (`Stored.hidden`). Units are matched greedily, the
    closest pair first, which finds a permutation of the same units exactly and others approximately: the optimal
    assignment of the source needs a solver that the engine does not depend on. Memory: H x H numbers.

    Sources: Li et al., 2024 (Merge, Then Compress: MC-SMoE), the mean by load; Ainsworth et al., 2023 (Git Re-Basin),
    the alignment. Raises UsageError for experts that can't be merged, and for align in a bank that does not say where
    its hidden units are.
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
    declared = _declared(bank)
    if not declared:
        message = f"align needs to know the hidden units of an expert, and {type(bank).__name__} of layer "
        raise UsageError(f"{message}'{layer.name}' does not declare them", code="cannot-align")
    hidden = min(getattr(bank, name).shape[at.axis] for name, at in declared.items())
    first, *others = (_units(bank, declared, hidden, expert) for expert in group)
    match = {expert: _greedy(first, units) for expert, units in zip(group[1:], others, strict=True)}
    orders = {}
    for name, at in declared.items():
        parts, own = getattr(bank, name).shape[at.axis] // hidden, bank.axes[name].axis
        places = {expert: _places(match_H, parts, at.interleaved) for expert, match_H in match.items()}
        orders[f"experts.{name}"] = Order(at.axis - (at.axis > own), places)
    return orders


def _declared(bank: Experts) -> dict[str, HiddenUnits]:
    """Where a bank has its hidden units, by tensor; empty unless it says so of all that lead into and out of them."""
    plain = isinstance(bank, StackedMLP) and bank.axes.keys() <= OF_STACKED_MLP.keys() | {"b_out"}
    found = OF_STACKED_MLP if plain else getattr(bank, "hidden_units", {})
    declared = {name: at for name, at in found.items() if name in bank.axes}
    inward = {name for name, axis in bank.axes.items() if axis.role == "in"}
    outward = any(bank.axes[name].role == "output" for name in declared)
    return declared if inward and outward and inward <= declared.keys() else {}


def _units(bank: Experts, declared: Mapping[str, HiddenUnits], hidden: int, expert: int) -> Tensor:
    """[H, n]: each hidden unit's weights and biases, incoming and outgoing, in fp32 or better."""
    columns = []
    for name, at in declared.items():
        own = bank.axes[name].axis
        rows = getattr(bank, name).detach().select(own, expert).movedim(at.axis - (at.axis > own), 0)
        parts_Hpn = rows.unflatten(0, (hidden, -1)) if at.interleaved else rows.unflatten(0, (-1, hidden)).movedim(1, 0)
        columns.append(parts_Hpn.flatten(1).to(torch.promote_types(rows.dtype, torch.float32)))
    return torch.cat(columns, 1)


def _places(match_H: Tensor, parts: int, interleaved: bool) -> Tensor:
    """[parts H]: the order of a dimension that has several places for each hidden unit."""
    part_p, hidden = torch.arange(parts, device=match_H.device), len(match_H)
    place_Hp = match_H[:, None] * parts + part_p if interleaved else match_H[:, None] + part_p * hidden
    return place_Hp.flatten() if interleaved else place_Hp.t().flatten()


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
