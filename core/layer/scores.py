"""What enters a decision: the tokens, each level's scores with their biases, and what the layer before passes on."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..contract.parts import Bias
from ..contract.routing import Level, Spec, Tokens
from ..errors import UsageError

Column = Tensor | None  # a value for each token, or nothing


def tokens_of(
    layer: str, spec: Spec, carries: int, x: Tensor, mask: Column, ids: Column, labels: Column, carried: Column
) -> Tokens:
    """A forward's arguments, checked and flattened, padding set to 0."""
    _check_arguments(layer, spec.dim, x, {"mask": mask, "ids": ids, "labels": labels})
    tokens = Tokens(x.reshape(-1, x.shape[-1]), tuple(x.shape[:-1]), None if mask is None else mask.reshape(-1))
    tokens.x = tokens.real(tokens.x)  # not even a NaN at padding may leak
    tokens.ids = None if ids is None else tokens.real(ids.reshape(-1))
    if tokens.ids is not None and spec.vocab:
        _check_ids(layer, spec.vocab, tokens.ids)
    tokens.labels = None if labels is None else tokens.real(labels.reshape(-1))
    tokens.carried = carried_by(tokens, carries, carried, f"layer '{layer}'")
    return tokens


def _check_arguments(layer: str, dim: int, x: Tensor, others: Mapping[str, Tensor | None]) -> None:
    """Raise ValueError unless x is [..., dim], the others have its leading shape, and the mask is bool."""
    if x.shape[-1] != dim:
        raise ValueError(f"layer '{layer}' takes [..., {dim}], not {list(x.shape)}")
    for name, value in others.items():
        if value is not None and value.shape != x.shape[:-1]:
            raise ValueError(f"layer '{layer}': {name} is {list(value.shape)}, the tokens are {list(x.shape[:-1])}")
    mask = others["mask"]
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"layer '{layer}': mask is {mask.dtype}; it must be bool, True = a real token")


def _check_ids(layer: str, vocab: int, ids: Tensor) -> None:
    """Raise ValueError for an id that is none of the vocabulary; on a GPU that would mean to wait for it."""
    if ids.device.type == "cpu" and not torch.compiler.is_compiling() and ids.numel():
        low, high = ids.aminmax()
        if low < 0 or high >= vocab:
            raise ValueError(f"layer '{layer}': token ids must be 0 to {vocab - 1}, not {int(low)} to {int(high)}")


def biased_level(name: str, index: int, raw_Tn: Tensor, tokens: Tokens, biases: Iterable[Bias]) -> Level:
    """A level of the router with the biases that gates see added, and the selection-only ones next to them."""
    biased_Tn, selection_n = raw_Tn, None
    for bias in biases:
        if bias.selection_only:
            selection_n = bias() if selection_n is None else selection_n + bias()
        else:
            biased_Tn = biased_Tn + bias()
    return Level(name, raw_Tn, biased_Tn, tokens, index, selection_n)


def carried_by(tokens: Tokens, width: int, carried: Tensor | None, who: str) -> Tensor | None:
    """What a router carries, as [T, width], 0 at padding; zeros if nothing came; None for a router without.

    who: for the UsageError about another shape.
    """
    count = tokens.x.shape[0]
    if carried is None:
        return tokens.x.new_zeros(count, width) if width else None
    if not width:
        raise UsageError(f"{who} is given carried=, but its router carries nothing", code="nothing-is-carried")
    if carried.shape[-1] != width or carried.shape[:-1] not in (tokens.shape, (count,)):
        shape = [*tokens.shape, width]
        raise UsageError(f"{who}: carried is {list(carried.shape)}; it must be {shape}", code="carried-of-wrong-shape")
    return tokens.real(carried.reshape(-1, width))
