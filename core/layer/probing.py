"""Run forwards that are not counted: on held-out batches, or of single layers."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..contract.routing import Routing, Tokens
from .moe import MoE


def observe(layers: Sequence[MoE], run: Callable[[], Tensor]) -> tuple[Tensor, dict[MoE, Routing]]:
    """Run a forward, uncounted: (the task loss that `run` returns, with its graph; the last routing of each layer)."""
    with uncounted(layers):
        # eagerly: a compiled graph's logits have no path to the loss
        with torch.compiler.set_stance("force_eager"), torch.enable_grad():
            loss = run()
        return loss, {layer: layer.watched[-1] for layer in layers if layer.watched}


@contextmanager
def uncounted(layers: Sequence[MoE]) -> Iterator[None]:
    """Do not count forwards inside: each layer collects their routings in `watched` instead."""
    for layer in layers:
        layer.watched = []
    try:
        yield
    finally:
        for layer in layers:
            layer.watched = None


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module in eval mode; on exit, restore the mode of each of its submodules."""
    training = [submodule for submodule in module.modules() if submodule.training]
    module.eval()
    try:
        yield
    finally:
        for submodule in training:
            submodule.training = True


@torch.no_grad()
def output_on(layer: MoE, tokens: Tokens) -> Tensor:
    """A layer's output [..., out] on these tokens, in eval mode, uncounted."""

    def unflattened(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.view(*tokens.shape, *values.shape[1:])

    layer.watched = []
    try:
        x = tokens.x.detach().view(*tokens.shape, -1)
        with evaluating(layer):
            columns = map(unflattened, (tokens.mask, tokens.ids, tokens.labels, tokens.carried))
            y: Tensor = output(layer(x, *columns))
        return y.detach()
    finally:
        layer.watched = None


def output(answer: Any) -> Tensor:
    """A layer's output from what its forward returned: a router that carries adds a second value."""
    y: Tensor = answer[0] if isinstance(answer, tuple) else answer
    return y
