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


def mutual_information(counts: Tensor) -> Tensor:
    """I(row; column) / min(H(row), H(column)) of counts [R, C]: 0 if independent, 1 if one determines the other.

    I is reduced by its bias (R - 1)(C - 1) / (2N) for N counts, R and C those that occur, and at least 0; nan if a
    side has a single value. Source: Miller, 1955 (Note on the Bias of Information Estimates).
    """
    joint = counts / counts.sum()
    rows, columns = joint.sum(1), joint.sum(0)
    information = _entropy(rows) + _entropy(columns) - _entropy(joint)
    bias = ((rows > 0).sum() - 1) * ((columns > 0).sum() - 1) / (2 * counts.sum())
    return (information - bias).clamp(min=0) / torch.minimum(_entropy(rows), _entropy(columns))


def _entropy(p: Tensor) -> Tensor:
    negative: Tensor = torch.special.xlogy(p, p).sum()
    return -negative


def linear_cka(y_ESO: Tensor) -> Tensor:
    """[E, E]: linear CKA of each pair of experts in y [E, S, O], S > 3; nan where an expert's outputs do not vary.

    CKA(Y, Z) = HSIC(YY', ZZ') / sqrt(HSIC(YY', YY') HSIC(ZZ', ZZ')) with the unbiased HSIC: that of two Gram matrices
    is the product of their U-centred forms, summed, over S (S - 3). 1 for equal outputs, also rotated and scaled ones,
    near 0 for unrelated ones. Sources: Kornblith et al., 2019 (Similarity of Neural Network Representations
    Revisited); Song et al., 2012 (unbiased HSIC).
    """
    size = y_ESO.shape[1]
    gram_ESS = y_ESO @ y_ESO.mT
    gram_ESS = gram_ESS - torch.diag_embed(gram_ESS.diagonal(dim1=1, dim2=2))
    rows_ES1 = gram_ESS.sum(2, keepdim=True) / (size - 2)
    total_E11 = gram_ESS.sum((1, 2), keepdim=True) / ((size - 1) * (size - 2))
    centred_ESS = gram_ESS - rows_ES1 - rows_ES1.mT + total_E11
    centred_ESS = centred_ESS - torch.diag_embed(centred_ESS.diagonal(dim1=1, dim2=2))
    flat, norm_E = centred_ESS.flatten(1), centred_ESS.flatten(1).norm(dim=1)
    norm_E = torch.where(norm_E > 1e-12 * gram_ESS.flatten(1).norm(dim=1), norm_E, torch.nan)  # the rest is rounding
    return flat @ flat.T / (norm_E[:, None] * norm_E)
