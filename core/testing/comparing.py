"""What is the same: bit for bit, up to a tolerance, or at least finite."""

from collections.abc import Mapping

import torch
from torch import Tensor

from .claims import demand


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same bit for bit, NaN like NaN."""
    return one.shape == other.shape and one.dtype == other.dtype and bool(torch.equal(_bits(one), _bits(other)))


def _bits(values: Tensor) -> Tensor:
    return values.detach().contiguous().reshape(-1).view(torch.uint8)


def agree(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], why: str, tolerance: float = 1e-5) -> None:
    """Demand that both hold the same, up to the tolerance; `why` says what else must be wrong."""
    for name, wanted in expected.items():
        demand(name in found, f"{name} is gone; {why}")
        got = found[name]
        demand(got.shape == wanted.shape, f"{name} is {list(got.shape)}, not {list(wanted.shape)}; {why}")
        gap = distance(wanted, got)
        demand(gap <= tolerance, f"{name} differs by {gap:.2g}; {why}")
    demand(not (new := found.keys() - expected.keys()), f"{min(new, default='')} is new; {why}")


def distance(expected: Tensor, found: Tensor) -> float:
    """The largest difference, over the largest value or 1; NaN and infinity agree with themselves only."""
    one, other = expected.detach().double(), found.detach().double()
    if not one.numel():
        return 0.0
    different = torch.where((one == other) | (one.isnan() & other.isnan()), 0, (one - other).abs())
    scale = max(float(one[one.isfinite()].abs().max()) if one.isfinite().any() else 1.0, 1.0)
    return float(different.nan_to_num(torch.inf).max()) / scale


def finite(seen: Mapping[str, Tensor], when: str, advice: str) -> None:
    """Demand that everything seen is finite."""
    for name, value in seen.items():
        demand(not value.is_floating_point() or bool(value.isfinite().all()), f"{name} is not finite {when}; {advice}")
