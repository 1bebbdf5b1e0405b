"""Forwards that are not counted: on held-out batches, and of single layers."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..contract.routing import Routing, Tokens
from .moe import MoE


def observe(layers: Sequence[MoE], run: Callable[[], Tensor]) -> tuple[Tensor, dict[MoE, Routing]]:
    """Run a forward with its graph, uncounted: (the task loss that it answers, the routing of each layer)."""
    with uncounted(layers):
        # eagerly: from a compiled graph's logits no path leads to the loss
        with torch.compiler.set_stance("force_eager"), torch.enable_grad():
            loss = run()
        return loss, {layer: layer.watched[-1] for layer in layers if layer.watched}


@contextmanager
def uncounted(layers: Sequence[MoE]) -> Iterator[None]:
    """Forwards in this context are not counted: each layer keeps its routings in `watched` instead."""
    for layer in layers:
        layer.watched = []
    try:
        yield
    finally:
        for layer in layers:
            layer.watched = None


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Inside, the module is in eval mode; then each of its modules is as it was."""
    training = [one for one in module.modules() if one.training]
    module.eval()
    try:
        yield
    finally:
        for one in training:
            one.training = True


@torch.no_grad()
def output_on(layer: MoE, tokens: Tokens) -> Tensor:
    """A layer's output on given tokens, in eval mode, uncounted."""

    def shaped(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.view(*tokens.shape, *values.shape[1:])

    layer.watched = []
    try:
        x = tokens.x.detach().view(*tokens.shape, -1)
        with evaluating(layer):
            y: Tensor = layer(x, shaped(tokens.mask), shaped(tokens.ids), shaped(tokens.labels))
        return y.detach()
    finally:
        layer.watched = None
