"""What growth must know of optimizers: whose they are, and what their state of a newcomer starts as."""

import gc
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from .errors import UsageError

Moments = Literal["fresh", "copy"]

# What the state of a weight without history starts as. Adam's squares start at 0 beside an old step counter, so that a
# newcomer's first steps are 3 to 6.5 times lr: it is drawn anew and has nothing to lose. The mean over experts holds
# the large gradients of the start for a thousand steps, and was measured to leave newcomers behind. Where no bias is
# corrected for (RMSprop, Adagrad, Adafactor) a start at 0 would be a far longer step.
FRESH: dict[str, Literal["zero", "mean", "own"]] = {
    **dict.fromkeys(("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "grad_avg", "prev"), "zero"),
    **dict.fromkeys(("square_avg", "acc_delta", "sum", "exp_inf"), "mean"),
    **dict.fromkeys(("step_size", "row_var", "col_var", "variance"), "mean"),
    "ax": "own",  # an average of the weight itself
}
FACTORS = ("row_var", "col_var")  # Adafactor's, of the parameter's rank, with length 1 along one axis


def staged_state(
    optimizer: Optimizer,
    name: str,
    parameter: Tensor,
    value: Tensor,
    axis: int,
    origins: Sequence[int | None],
    moments: Mapping[int, Moments],
) -> dict[str, Any]:
    """An optimizer's state of a parameter whose rows come to be those of `origins`.

    value: the parameter's new value. moments: position of each newcomer -> what its state starts as.
    Raises UsageError for a state that is not shaped like the parameter.
    """
    staged = {}
    for key, state in optimizer.state[parameter].items():
        if (
            not isinstance(state, Tensor)
            or state.dim() == 0
            or _kept_whole(optimizer, name, key, state, parameter, axis)
        ):
            staged[key] = state
            continue
        new = reindex(state, axis, origins)
        for position, how in moments.items():
            if how == "fresh" or origins[position] is None:
                new.select(axis, position).copy_(_fresh(optimizer, name, key, state, axis, value, position))
        staged[key] = new
    return staged


def refuse_odd_state(optimizer: Optimizer) -> None:
    """Raise UsageError for an optimizer that keeps several parameters' state under one of them, as LBFGS does."""
    for parameter, own in optimizer.state.items():
        for key, value in own.items():
            whole = isinstance(value, Tensor) and value.dim() and value.dim() != parameter.dim()
            if whole or isinstance(value, list):
                raise UsageError(
                    f"{type(optimizer).__name__} keeps '{key}', which no rule can grow; use Adam, AdamW or SGD"
                )


def _kept_whole(optimizer: Optimizer, name: str, key: str, state: Tensor, parameter: Tensor, axis: int) -> bool:
    """Whether a state has no expert axis of its own (a factor of Adafactor), so that growth leaves it as it is."""
    if key in FACTORS and state.dim() == parameter.dim() and parameter.shape[axis] > 1:
        return state.shape[axis] == 1
    if key not in FACTORS and state.shape == parameter.shape:
        return False
    raise UsageError(
        f"{type(optimizer).__name__} keeps '{key}' of shape {list(state.shape)} for '{name}' "
        f"{list(parameter.shape)}, and no rule says what growth makes of it; use Adam, AdamW or SGD"
    )


def _fresh(optimizer: Optimizer, name: str, key: str, state: Tensor, axis: int, value: Tensor, position: int) -> Tensor:
    how = FRESH.get(key)
    if how == "zero":
        return torch.zeros_like(state.select(axis, 0))
    if how == "mean":
        return state.mean(axis)
    if how == "own":
        return value.select(axis, position)
    raise UsageError(
        f"{type(optimizer).__name__} keeps '{key}' for each weight of '{name}', and no rule says what a newcomer's "
        "starts at; use an initializer that copies its parent's, such as clone"
    )


def reindex(tensor: Tensor, axis: int, origins: Sequence[int | None]) -> Tensor:
    """Rows of a tensor along an axis, by where each comes from; None gives a row that is still to be filled."""
    index = torch.tensor([origin or 0 for origin in origins], device=tensor.device)
    return tensor.index_select(axis, index)


# -- who else holds a layer's parameters -------------------------------------------------------------


def refuse_holders(layer: Any, optimizers: Sequence[Optimizer], followers: Sequence[nn.Module]) -> None:
    """Raise UsageError if a live optimizer, DistributedDataParallel or AveragedModel would be left behind.

    An optimizer with state of the old shape kills the process at its next step if it is fused; a DDP
    that is not built anew lets its processes drift apart without a word.
    """
    if not _forgotten(layer, optimizers, followers):
        return
    gc.collect()  # a dead one may still be waiting in a cycle
    for one in _forgotten(layer, optimizers, followers):
        kind = type(one).__name__
        if isinstance(one, Optimizer):
            raise UsageError(f"a live {kind} holds this layer's weights; pass it to grow(..., optimizers=...)")
        more = ", and build it anew after the growth" if isinstance(one, DistributedDataParallel) else ""
        raise UsageError(f"a live {kind} holds this layer; pass it to grow(..., followers=...){more}")


def _forgotten(layer: Any, optimizers: Sequence[Optimizer], followers: Sequence[nn.Module]) -> list[Any]:
    known = {id(one) for one in (*optimizers, *followers)}
    known |= {id(one.param_groups) for one in optimizers}  # a wrapper shares them with the optimizer it wraps
    wanted = {id(parameter) for parameter in layer.parameters()}
    copy_id = layer.copy_id

    def holds(one: Any) -> bool:
        if isinstance(one, Optimizer):
            groups = getattr(one, "param_groups", [])
            return id(groups) not in known and any(id(p) in wanted for group in groups for p in group["params"])
        return any(getattr(module, "copy_id", None) == copy_id for module in one.modules())

    return [
        one for one in live(Optimizer, DistributedDataParallel, AveragedModel) if id(one) not in known and holds(one)
    ]


def live(*kinds: type) -> list[Any]:
    """Every living object of these classes and their subclasses."""
    classes = set(kinds)
    for kind in kinds:
        waiting = [kind]
        while waiting:
            below: list[type] = type.__subclasses__(waiting.pop())
            classes.update(below)
            waiting.extend(below)
    return [one for one in gc.get_objects() if type(one) in classes]


def forget_old_shapes(parameters: Iterable[Tensor]) -> None:
    """Drop every live optimizer's state of parameters that have another shape now, with a warning."""
    wanted = {id(parameter): parameter for parameter in parameters}
    for optimizer in live(Optimizer):
        mine = [wanted[id(p)] for group in optimizer.param_groups for p in group["params"] if id(p) in wanted]
        stale = [p for p in mine if optimizer.state.get(p) and wrong_shape(p, optimizer.state[p]) is not None]
        for parameter in stale:
            del optimizer.state[parameter]
        if stale:
            warnings.warn(
                f"the number of experts changed, so {type(optimizer).__name__}'s state of {len(stale)} tensors was "
                "dropped; load the optimizer's state after the model's",
                stacklevel=2,
            )


def restore(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """`load_state_dict`, with every state in the order in memory of its weight.

    A checkpoint's file keeps no strides, and fused optimizers walk a weight and its state through memory side by side.
    """
    optimizer.load_state_dict(state)
    for parameter, own in optimizer.state.items():
        for name, value in own.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                own[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def wrong_shape(parameter: Tensor, state: Mapping[str, Any]) -> str | None:
    """The key of a state that should have the parameter's shape and has not, or None."""
    for key, value in state.items():
        if key not in FRESH or not isinstance(value, Tensor) or value.dim() == 0 or value.shape == parameter.shape:
            continue
        factor = key in FACTORS and value.dim() == parameter.dim()
        if not (factor and all(has in (1, wants) for has, wants in zip(value.shape, parameter.shape, strict=True))):
            return key
    return None
