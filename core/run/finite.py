"""Is everything finite? Each step asks the device, and the next log point or checkpoint reads the answers."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from ..engine.engine import Engine
from ..errors import RunError, listed
from ..processes import agreed, is_cut
from .scores import ScoreSums

MOST = 3  # names in a message


@attrs.define(eq=False)
class FiniteCheck:
    """Finds the first step at which a loss, a gradient or a bias of a run was not finite, without waiting for it.

    steps: for each step since the last check, the names of what was asked, and the sum of each, on the device.
    """

    engine: Engine
    model: nn.Module
    optimizer: torch.optim.Optimizer
    device: torch.device
    steps: list[tuple[tuple[str, ...], Tensor]] = attrs.field(factory=list)

    def after_step(self) -> None:
        """Ask about the gradients of a step and the biases after it."""
        grads = [(f"the gradient of {name}", p.grad) for name, p in self.model.named_parameters() if p.grad is not None]
        names, asked = zip(*grads, *self._biases(), strict=True)  # a parameter may have no gradient in some steps
        self.steps.append((names, _sums(asked)))

    def check(self, scores: ScoreSums, step: int) -> None:
        """Raise RunError for the first step since the last check at which anything was not finite, on every rank.

        step: the last one.
        """
        steps, self.steps = self.steps, []
        with agreed("checking that numbers are finite", self.device):
            losses = [*scores.not_finite()]
            asked = [(index - len(steps), name) for index, (names, _) in enumerate(steps) for name in names]
            flags = torch.cat([sums for _, sums in steps]).isfinite().tolist() if steps else []  # waits for the device
            found = losses + [one for one, finite in zip(asked, flags, strict=True) if not finite]
            if found:
                first = min(back for back, _ in found)
                causes = [name for back, name in losses if back == first]  # whose gradients are not finite either
                told = _some(causes or [name for back, name in found if back == first])
                message = f"{told} stopped being finite at step {step + first + 1}; lower --lr, or a loss's weight"
                raise RunError(message, code="not-finite")

    def check_state(self, step: int) -> None:
        """Raise RunError, on every rank, unless all weights, moments and states of the engine are finite."""
        state = dict(self._state())
        with agreed("checking that the state is finite", self.device):
            finite = _sums(state.values()).isfinite().tolist()
            bad = [name for name, fine in zip(state, finite, strict=True) if not fine]
            if bad:
                message = f"{_some(bad)} stopped being finite by step {step}; lower --lr, or a loss's weight"
                raise RunError(message, code="not-finite")

    def _biases(self) -> Iterator[tuple[str, Tensor]]:
        for layer in self.engine.layers:
            for level in layer.bias_levels():
                for plugin, bias in level.items():
                    yield f"the bias {plugin} of layer {layer.name}", bias().detach()

    def _state(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.model.named_parameters():
            yield f"the weight {name}", parameter.detach()
            for kind, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    yield f"the moment {kind} of {name}", value
        yield from _tensors("the state", self.engine.state_dict())
        for layer in self.engine.layers:
            yield from _tensors(f"the state of layer {layer.name}:", dict(layer.named_buffers()))


def _tensors(where: str, tree: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of floating-point numbers in a tree, by their places."""
    if isinstance(tree, Tensor):
        if tree.is_floating_point():
            yield where, tree
        return
    items = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list | tuple) else ()
    for name, child in items:
        yield from _tensors(f"{where} {name}", child)


def _sums(tensors: Iterable[Any]) -> Tensor:
    """[n]: the sum of each tensor, of which this rank sees its own part; not finite if any of its numbers is not."""
    own = [tensor.to_local() if is_cut(tensor) else tensor for tensor in tensors]
    half = (torch.float16, torch.bfloat16)  # whose sums may overflow
    return torch.stack([one.sum(dtype=torch.float32) if one.dtype in half else one.sum() for one in own])


def _some(names: Iterable[str]) -> str:
    known = [*names]
    more = [f"{len(known) - MOST} more"] if len(known) > MOST else []
    return listed([*known[:MOST], *more])
