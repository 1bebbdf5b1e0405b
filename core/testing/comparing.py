"""Comparing tensors: bit for bit, up to a tolerance, or for finiteness."""

from collections.abc import Mapping

import torch
from torch import Tensor

from .claims import demand


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors have equal shape, dtype and bits; NaN equals NaN."""
    return (
        first.shape == second.shape and first.dtype == second.dtype and bool(torch.equal(_bits(first), _bits(second)))
    )


def _bits(values: Tensor) -> Tensor:
    return values.detach().contiguous().reshape(-1).view(torch.uint8)


def demand_close(
    expected: Mapping[str, Tensor], found: Mapping[str, Tensor], message: str, tolerance: float = 1e-5
) -> None:
    """Demand equal names and shapes, and equal values up to the tolerance; the message follows the difference."""
    for name, wanted in expected.items():
        demand(name in found, f"{name} is missing {message}")
        got = found[name]
        demand(got.shape == wanted.shape, f"{name} is {list(got.shape)}, not {list(wanted.shape)}, {message}")
        gap = distance(wanted, got)
        demand(gap <= tolerance, f"{name} differs by {gap:.2g} {message}")
    demand(not (new := found.keys() - expected.keys()), f"{min(new, default='')} is new {message}")


def distance(expected: Tensor, found: Tensor) -> float:
    """The largest difference relative to the larger of max |value| and 1; NaN and infinity equal only themselves."""
    first, second = expected.detach().double(), found.detach().double()
    if not first.numel():
        return 0.0
    different = torch.where((first == second) | (first.isnan() & second.isnan()), 0, (first - second).abs())
    scale = max(float(first[first.isfinite()].abs().max()) if first.isfinite().any() else 1.0, 1.0)
    return float(different.nan_to_num(torch.inf).max()) / scale


def demand_finite(tensors: Mapping[str, Tensor], when: str, advice: str) -> None:
    """Demand that every floating-point tensor is finite."""
    for name, value in tensors.items():
        finite = not value.is_floating_point() or bool(value.isfinite().all())
        demand(finite, f"{name} is not finite {when}; {advice}")
