"""Sums, precisions and statistics that routers, losses and metrics share."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def count_by(index_N: Tensor, value_N: Tensor, size: int) -> Tensor:
    """Sums of value_N by index_N, [size], in fp32 or better."""
    value_N = at_least_fp32(value_N)
    return torch.zeros(size, dtype=value_N.dtype, device=index_N.device).index_add(0, index_N, value_N)


def at_least_fp32(values: Tensor) -> Tensor:
    """values as fp32, or float64 if they are float64."""
    return values if values.dtype == torch.float64 else values.float()


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Run the body in the precision of its operands. Costs nothing if autocast is off anyway."""
    kind = device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)  # not available: meta
    return torch.autocast(kind, enabled=False) if on else nullcontext()


def rows_of(index_N: Tensor, size: int) -> Tensor:
    """[size] integers: how often each index occurs."""
    return torch.zeros(size, dtype=torch.long, device=index_N.device).index_add(0, index_N, torch.ones_like(index_N))


def cv2(values_E: Tensor) -> Tensor:
    """CV^2 = population variance / mean^2: 0 for equal values, E / K - 1 for K equal ones of E, 0 for all 0."""
    return values_E.var(correction=0) / (values_E.mean().square() + 1e-10)


def entropy_of(probs: Tensor) -> Tensor:
    """-sum p ln p over the last dimension, in nats, with a gradient that is finite where p is 0."""
    return -(probs * probs.clamp(min=torch.finfo(probs.dtype).tiny).log()).sum(-1)


def centred_log(values: Tensor, eps: float) -> Tensor:
    """log(r + eps) minus its mean, r = values over their mean: 0 for equal values, whatever their scale."""
    log = (values / values.mean().clamp(min=torch.finfo(values.dtype).tiny) + eps).log()
    return log - log.mean()
