"""One layer's sums: of a step, since the last log point, in evaluation, and since it last grew."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..contract.numerics import at_least_fp32
from ..contract.protocols import Layer
from ..contract.routing import Routing
from ..contract.setup import Bound
from ..errors import UsageError
from ..processes import all_reduce_sum, world_size

Layout = dict[str, torch.Size]  # names and shapes of the sums in a flat vector, in order
HELD = ("since_log", "load_since_growth", "evaluated")  # the sums that a state_dict contains


class LayerSums(nn.Module):
    """One layer's sums as flat vectors, in fp32 or better: float64 if the layer is.

    layout: names and shapes of the sums of every forward. step_layout: those of a training forward, which has more.
    signal_sizes: length of each bias's signal, by (index of the level, plugin).

    step: a leaf of zeros, whose gradient holds the sums of this step's backward passes by step_layout, then the
    signals. aux_value: the auxiliary loss of the forwards since it was last read. aux_scale: the factor of its
    gradient. since_log: the sums of the steps since the last log point, by step_layout. evaluated: those of forwards
    in eval mode, by layout. load_since_growth [E]: only if a trigger needs it. last_terms: the loss terms of the
    last step by name.
    """

    step: Tensor
    aux_value: Tensor
    aux_scale: Tensor

    def __init__(
        self, layout: Layout, step_layout: Layout, signal_sizes: Mapping[tuple[int, str], int], like: Tensor
    ) -> None:
        super().__init__()
        self.layout, self.step_layout, self.signal_sizes = layout, step_layout, dict(signal_sizes)
        self.since_log: Tensor | None = None
        self.load_since_growth: Tensor | None = None
        self.last_terms: dict[str, Tensor] = {}
        self._open(like.device, at_least_fp32(like).dtype)

    def _open(self, device: torch.device, dtype: torch.dtype) -> None:
        # Not buffers: DistributedDataParallel would overwrite them with the first process's, and what materialises a
        # model from the meta device would replace the leaf by a tensor that needs no gradient.
        size = numel(self.step_layout) + sum(self.signal_sizes.values())
        self.step = torch.zeros(size, requires_grad=True, dtype=dtype, device=device)
        self.aux_value = torch.zeros((), dtype=dtype, device=device)
        self.aux_scale = torch.zeros((), dtype=dtype, device=device)
        wide = torch.float32 if device.type == "mps" else torch.float64  # fp32 would stop counting at 2^24
        self.evaluated = torch.zeros(numel(self.layout), dtype=wide, device=device)

    def move(self, device: torch.device, dtype: torch.dtype | None = None) -> None:
        """Move to a device and dtype; the sums of a step that has begun are dropped. Does nothing if they fit."""
        dtype = dtype or self.step.dtype
        if (self.step.device, self.step.dtype) == (device, dtype):
            return
        evaluated = self.evaluated
        self._open(device, dtype)
        if evaluated.device.type != "meta":
            self.evaluated.copy_(evaluated)

    def _apply(self, fn: Any, recurse: bool = True) -> "LayerSums":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        like = fn(torch.empty(0, dtype=self.step.dtype, device=self.step.device))
        self.move(like.device, at_least_fp32(like).dtype)
        return self

    # -- a step ----------------------------------------------------------------------------------

    def of_step(self) -> Tensor | None:
        """The sums of this step's backward passes so far; None if there was no backward pass."""
        return None if self.step.grad is None else self.step.grad.detach()

    def take_step(self) -> Tensor:
        """Take the sums of this step, which restart at zero; zeros if there was no backward pass."""
        sums = self.of_step()
        self.step.grad = None
        return torch.zeros_like(self.step) if sums is None else sums

    def add_step(self, flat: Tensor, with_load: bool) -> None:
        """Add a step's sums to those since the last log point. with_load: add the load to that since growth too."""
        if self.since_log is None:
            self.since_log = torch.zeros(len(flat), dtype=self.evaluated.dtype, device=flat.device)
        self.since_log += flat
        if with_load:
            load_E = unflat(flat, self.step_layout)["load"].to(self.evaluated.dtype)
            self.load_since_growth = load_E if self.load_since_growth is None else self.load_since_growth + load_E

    def signals(self, flat: Tensor) -> dict[tuple[int, str], Tensor]:
        """The biases' signals from a step's sums."""
        flat = flat[numel(self.step_layout) :]
        parts = flat.split(list(self.signal_sizes.values())) if self.signal_sizes else ()
        return dict(zip(self.signal_sizes, parts, strict=True))

    # -- reading and clearing --------------------------------------------------------------------

    def add_evaluated(self, sums: Mapping[str, Tensor]) -> None:
        """Add the sums of a forward in eval mode."""
        self.evaluated.add_(flat(sums, self.layout, self.evaluated.dtype))

    def take_evaluated(self) -> dict[str, Tensor]:
        """Take the sums of forwards in eval mode over all processes, by name; they restart at zero."""
        taken = all_reduce_sum(self.evaluated).clone()
        self.evaluated.zero_()
        return unflat(taken, self.layout)

    def take_since_log(self) -> dict[str, Tensor] | None:
        """Take the sums of the steps since the last call, by name; None if there were none."""
        taken, self.since_log = self.since_log, None
        return None if taken is None else unflat(taken, self.step_layout)

    # -- saving ----------------------------------------------------------------------------------

    def held(self) -> dict[str, Tensor | None]:
        """Copies of the sums that were not taken yet; with several ranks without `evaluated`, each rank's own."""
        values = {name: getattr(self, name) for name in HELD}
        held = {name: None if value is None else value.clone() for name, value in values.items()}
        return held if world_size() == 1 else {**held, "evaluated": torch.zeros_like(self.evaluated)}

    def check_held(self, held: Mapping[str, Tensor | None], layer: str, experts: int) -> None:
        """Raise UsageError if `held` comes from another layer, or from this one with other plugins or experts."""
        sizes = (numel(self.step_layout), experts, numel(self.layout))
        for name, size in zip(HELD, sizes, strict=True):
            value = held[name]
            if value is not None and value.numel() != size:
                message = f"the state of layer '{layer}' was saved with other plugins or experts; load the model first"
                raise UsageError(message, code="state-of-other-layer")

    def load_held(self, held: Mapping[str, Tensor | None]) -> None:
        """Restore what `held` returned."""
        for name in HELD:
            value = held[name]
            setattr(self, name, None if value is None else value.to(self.evaluated, copy=True))


def sums_of(routing: Routing) -> dict[str, Tensor]:
    """The sums of one forward: tokens, load, dropped; prob and slots if the router has them."""
    tokens = routing.tokens
    sums = {"tokens": tokens.count.view(1), "load": routing.load, "dropped": routing.dropped}
    if routing.probs is not None:
        sums["prob"] = tokens.real(routing.probs.detach()).sum(0)
    if routing.slots is not None:
        sums["slots"] = torch.stack([routing.work, tokens.count * routing.slots.each])
    return sums


def measured(routing: Routing, measures: Iterable[Bound], layer: Layer) -> dict[str, Tensor]:
    """The plugins' measurements of one forward, as "PLUGIN.NAME"."""
    sums: dict[str, Tensor] = {}
    for bound in measures:
        answer = bound({"routing": routing, "layer": layer, "state": layer.state_of(bound.plugin)})
        if not isinstance(answer, Mapping) or not all(isinstance(value, Tensor) for value in answer.values()):
            message = f"layer '{layer.name}': moe_measure of '{bound.plugin}' returned {answer!r}, not tensors by name"
            raise UsageError(message, code="measure-not-tensors")
        sums.update({f"{bound.plugin}.{name}": value.detach() for name, value in answer.items()})
    return sums


def layouts_of(
    counted: Mapping[str, Tensor], of_biases: Mapping[str, Tensor], terms: Iterable[str]
) -> tuple[Layout, Layout]:
    """(layout, step_layout) of a layer with these sums, biases' measurements and loss terms."""
    layout = {name: value.shape for name, value in counted.items()}
    scalar = torch.Size([1])
    losses = {f"loss.{name}": scalar for name in terms}
    return layout, {**layout, "forwards": scalar, **{name: value.shape for name, value in of_biases.items()}, **losses}


def flat(sums: Mapping[str, Tensor], layout: Layout, dtype: torch.dtype = torch.float32) -> Tensor:
    """Sums by name as one vector of a dtype. Raises ValueError if the names are not those of the layout."""
    if sums.keys() != layout.keys():
        changed = sorted(sums.keys() ^ layout.keys())
        raise ValueError(f"measured names must be the same in every forward; {changed} changed")
    return torch.cat([value.reshape(-1) for value in sums.values()]).to(dtype)


def unflat(vector: Tensor, layout: Layout) -> dict[str, Tensor]:
    """Sums by name from the flat vector of a layout."""
    sums, start = {}, 0
    for name, shape in layout.items():
        sums[name] = vector[start : start + shape.numel()].view(shape)
        start += shape.numel()
    return sums


def numel(layout: Layout) -> int:
    """The length of the flat vector of a layout."""
    return sum(shape.numel() for shape in layout.values())
