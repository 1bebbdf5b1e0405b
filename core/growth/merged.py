"""The rows of a merged expert: the mean over its parents."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..contract.growth import Growth, Order
from ..contract.parts import Axis
from ..errors import UsageError, listed


def mean_row(tensor: Tensor, axis: int, shares: Mapping[int, float], order: Order | None) -> Tensor:
    """The mean of rows along an axis, in fp32 or better, by their shares, which sum to 1.

    order: if some rows are reordered first; a tensor of length 1 there (a factor of Adafactor) stays as it is.
    """
    wide = torch.promote_types(tensor.dtype, torch.float32)
    rows = []
    for unit, share in shares.items():
        row = tensor.detach().select(axis, unit)
        if order is not None and unit in order.of and row.shape[order.dim] > 1:
            row = row.index_select(order.dim, order.of[unit].to(row.device))
        rows.append(row.to(wide) * share)
    return torch.stack(rows).sum(0).to(tensor.dtype)


def merged_row(where: str, tensor: Tensor, axis: int, shares: Mapping[int, float], order: Order | None) -> Tensor:
    """A merged expert's row of a declared tensor. Raises UsageError for whole numbers that differ."""
    if tensor.is_floating_point():
        return mean_row(tensor, axis, shares, order)
    first, *others = (tensor.select(axis, unit) for unit in shares)
    if not all(torch.equal(first, other) for other in others):
        message = f"experts {listed(shares)} can't be merged: {where} holds whole numbers, which differ between them"
        raise UsageError(message, code="bad-growth")
    return first


def check_orders(growth: Growth, declared: Mapping[str, tuple[Tensor, Axis]]) -> None:
    """Raise UsageError for an order of a tensor that does not exist, or one that is not a permutation."""
    for where, order in growth.orders.items():
        if where not in declared:
            of = f"an order of the growth of '{growth.layer}'"
            message = f"{of} is for '{where}', which is not a tensor of its experts"
            raise UsageError(message, code="bad-growth")
        tensor, axis = declared[where]
        sizes = [size for dim, size in enumerate(tensor.shape) if dim != axis.axis % tensor.dim()]
        size = sizes[order.dim] if -len(sizes) <= order.dim < len(sizes) else -1
        if any(sorted(index.tolist()) != list(range(size)) for index in order.of.values()):
            message = f"an order of '{where}' in the growth of '{growth.layer}' is not a permutation of its places"
            raise UsageError(message, code="bad-growth")
