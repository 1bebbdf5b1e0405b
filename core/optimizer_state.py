"""Optimizer state under growth: which optimizers hold a layer, and a new expert's initial state."""

import gc
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import compress
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from .errors import UsageError
from .processes import shard_like

Moments = Literal["fresh", "copy", "mean"]

# The initial state of a weight without history. Adam's squared averages start at 0 although the step counter is old, so
# a new expert's first steps are 3 to 6.5 times lr; it is drawn at random and has nothing to lose. The mean over experts
# would remember the large gradients of early training for a thousand steps; measured, it leaves new experts behind.
# Optimizers without bias correction (RMSprop, Adagrad, Adafactor) would take far longer steps from 0.
FRESH: dict[str, Literal["zero", "mean", "weight"]] = {
    **dict.fromkeys(("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "grad_avg", "prev"), "zero"),
    **dict.fromkeys(("square_avg", "acc_delta", "sum", "exp_inf"), "mean"),
    **dict.fromkeys(("step_size", "row_var", "col_var", "variance"), "mean"),
    "ax": "weight",  # an average of the weight itself
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
    means: Mapping[int, Callable[[Tensor], Tensor]],
) -> dict[str, Any]:
    """An optimizer's state of a parameter after its rows are replaced by those of `origins`.

    value: the parameter's new value. moments: position of each new expert -> its initial state. means: position of
    each merged one -> what averages its parents' rows in any tensor of the parameter's rank. Raises UsageError for a
    state that is not shaped like the parameter.
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
            if position in means:  # only these have several parents; without them, "mean" is "copy"
                new.select(axis, position).copy_(means[position](state))
            elif how == "fresh" or origins[position] is None:
                new.select(axis, position).copy_(_fresh(optimizer, name, key, state, axis, value, position))
        staged[key] = new
    return staged


def refuse_odd_state(optimizer: Optimizer) -> None:
    """Raise UsageError for an optimizer that stores the state of several parameters in one, as LBFGS does."""
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            other_rank = isinstance(value, Tensor) and value.dim() and value.dim() != parameter.dim()
            if other_rank or isinstance(value, list):
                raise UsageError(
                    f"{type(optimizer).__name__} keeps '{key}', which can't grow; use Adam, AdamW or SGD",
                    code="unsupported-optimizer",
                )


def _kept_whole(optimizer: Optimizer, name: str, key: str, state: Tensor, parameter: Tensor, axis: int) -> bool:
    """Whether a state has no expert axis (a factor of Adafactor); growth leaves such a state as it is."""
    if key in FACTORS and state.dim() == parameter.dim() and parameter.shape[axis] > 1:
        return state.shape[axis] == 1
    if key not in FACTORS and state.shape == parameter.shape:
        return False
    raise UsageError(
        f"{type(optimizer).__name__} keeps '{key}' of shape {list(state.shape)} for '{name}' "
        f"{list(parameter.shape)}, which can't grow; use Adam, AdamW or SGD",
        code="unsupported-optimizer",
    )


def _fresh(optimizer: Optimizer, name: str, key: str, state: Tensor, axis: int, value: Tensor, position: int) -> Tensor:
    how = FRESH.get(key)
    if how == "zero":
        return torch.zeros_like(state.select(axis, 0))
    if how == "mean":
        return state.mean(axis)
    if how == "weight":
        return value.select(axis, position)
    raise UsageError(
        f"{type(optimizer).__name__} keeps '{key}' for each weight of '{name}', and no rule says where a new expert's "
        "starts; use an initializer that copies the parent's state, such as clone",
        code="unsupported-optimizer",
    )


def reindex(tensor: Tensor, axis: int, origins: Sequence[int | None]) -> Tensor:
    """A tensor's rows along an axis, selected by their origins; None gives a placeholder row."""
    index = torch.tensor([origin or 0 for origin in origins], device=tensor.device)
    return tensor.index_select(axis, index)


# -- holders of a layer's parameters -----------------------------------------------------------------


def refuse_holders(layer: Any, optimizers: Sequence[Optimizer], followers: Sequence[nn.Module]) -> None:
    """Raise UsageError if a live optimizer, DistributedDataParallel or AveragedModel would keep the old shapes.

    A fused optimizer with state of the old shape kills the process at its next step; a DDP wrapper that is not
    rebuilt lets its ranks drift apart silently.
    """
    if not _forgotten(layer, optimizers, followers):
        return
    gc.collect()  # a dead one may still be part of a reference cycle
    for holder in _forgotten(layer, optimizers, followers):
        kind = type(holder).__name__
        if isinstance(holder, Optimizer):
            message = f"a live {kind} holds this layer's weights; pass it to grow(..., optimizers=...)"
            raise UsageError(message, code="forgotten-optimizer")
        more = ", and rebuild it after the growth" if isinstance(holder, DistributedDataParallel) else ""
        message = f"a live {kind} holds this layer; pass it to grow(..., followers=...){more}"
        raise UsageError(message, code="forgotten-follower")


def _forgotten(layer: Any, optimizers: Sequence[Optimizer], followers: Sequence[nn.Module]) -> list[Any]:
    """Live objects that hold the layer's parameters, or a copy of the layer, and were not passed to the growth."""
    passed = {id(holder) for holder in (*optimizers, *followers)}
    passed |= {id(optimizer.param_groups) for optimizer in optimizers}  # a wrapper shares them with what it wraps
    parameters = {id(parameter) for parameter in layer.all_parameters()}
    copy_id = layer.copy_id

    def holds(candidate: Any) -> bool:
        if isinstance(candidate, Optimizer):
            groups = getattr(candidate, "param_groups", [])
            return id(groups) not in passed and any(id(p) in parameters for group in groups for p in group["params"])
        return any(getattr(module, "copy_id", None) == copy_id for module in candidate.modules())

    candidates = live(Optimizer, DistributedDataParallel, AveragedModel)
    return [candidate for candidate in candidates if id(candidate) not in passed and holds(candidate)]


def live(*kinds: type) -> list[Any]:
    """Every live object of these classes and their subclasses."""
    classes = set(kinds)
    for kind in kinds:
        waiting = [kind]
        while waiting:
            subclasses: list[type] = type.__subclasses__(waiting.pop())
            classes.update(subclasses)
            waiting.extend(subclasses)
    objects = gc.get_objects()
    return list(compress(objects, map(classes.__contains__, map(type, objects))))  # there may be a million


def forget_old_shapes(parameters: Iterable[Tensor]) -> None:
    """Drop every live optimizer's state of parameters whose shape has changed, with a warning."""
    by_id = {id(parameter): parameter for parameter in parameters}
    for optimizer in live(Optimizer):
        held = [by_id[id(p)] for group in optimizer.param_groups for p in group["params"] if id(p) in by_id]
        stale = [p for p in held if optimizer.state.get(p) and wrong_shape(p, optimizer.state[p]) is not None]
        for parameter in stale:
            del optimizer.state[parameter]
        if stale:
            warnings.warn(
                f"the number of experts changed, so {type(optimizer).__name__}'s state of {len(stale)} tensors was "
                "dropped; load the optimizer's state after the model's",
                stacklevel=2,
            )


def restore(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """`load_state_dict` that gives each state the memory layout of its weight.

    A checkpoint does not keep strides, and fused optimizers read a weight and its state in memory order.
    """
    optimizer.load_state_dict(state)
    for parameter, held in optimizer.state.items():
        for name, value in held.items():
            if not isinstance(value, Tensor) or value.shape != parameter.shape:
                continue
            if hasattr(parameter, "full_tensor"):
                held[name] = shard_like(value, parameter)
            elif value.stride() != parameter.stride():
                held[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def wrong_shape(parameter: Tensor, state: Mapping[str, Any]) -> str | None:
    """The key of a state that should have the parameter's shape but does not, or None."""
    for key, value in state.items():
        if key not in FRESH or not isinstance(value, Tensor) or value.dim() == 0 or value.shape == parameter.shape:
            continue
        factor = key in FACTORS and value.dim() == parameter.dim()
        if not (factor and all(size in (1, full) for size, full in zip(value.shape, parameter.shape, strict=True))):
            return key
    return None
