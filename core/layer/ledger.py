"""Carry a layer's sums, signals and auxiliary loss through backward.

Under activation checkpointing a forward runs twice, but its backward once. What must happen once per forward therefore
happens in backward, in a Function that passes the layer's output through unchanged:

- the layer's sums (tokens, load, measurements, loss values) arrive as the "gradient" of a leaf of zeros, `step`, in
  which autograd adds up all forwards of a step;
- the biases' signals, which need the gradient at the layer's output, follow them in the same leaf;
- the auxiliary loss gets its gradient here, so it reaches the router without being part of the task loss.

This holds eager and compiled, under every form of checkpointing. Limits: torch.autograd.grad leaves out the auxiliary
loss; two backwards of one forward count twice.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

Signals = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (grad_TD, token_N, expert_N, weight_N) -> flat signals

STALE = "the layer changed its number of experts between this forward and its backward"


def invalidate(step: Tensor) -> None:
    """Make every backward that still reaches this leaf raise RuntimeError: the layer's shapes have changed since."""

    def raise_stale(_: Tensor) -> None:
        raise RuntimeError(STALE)

    step.register_hook(raise_stale)


class Ledger(Function):
    """Return y unchanged. In backward, add sums and signals to the leaf `step`, and give `aux` its gradient `scale`.

    step: the leaf, as long as sums and signals together. sums: of this forward, flat. aux: the weighted auxiliary loss,
    None if the layer has no loss term. scale: a scalar that `Anchor` fills before this backward. token_N, expert_N,
    weight_N, signals: None if no bias wants a signal. Raises RuntimeError in backward if `step` has the wrong length.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y_TD: Tensor,
        step: Tensor,
        sums: Tensor,
        aux: Tensor | None,
        scale: Tensor,
        token_N: Tensor | None,
        expert_N: Tensor | None,
        weight_N: Tensor | None,
        signals: Signals | None,
    ) -> Tensor:
        ctx.save_for_backward(sums, scale, token_N, expert_N, weight_N)
        ctx.signals, ctx.size = signals, step.shape[0]
        # A copy, not a view: AOTAutograd replays an output that aliases an input outside the graph, which would lose
        # the whole Function; and the view of a custom Function must not be written to in place.
        return y_TD.clone()

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> Any:
        sums, scale, *routed = ctx.saved_tensors
        if ctx.signals is not None:
            sums = torch.cat([sums, ctx.signals(grad_TD, *routed)])
        if sums.shape[0] != ctx.size:
            raise RuntimeError(STALE)
        if torch.compiler.is_compiling():
            # `scale` is filled between forward and backward. A partitioner may move whatever depends on it alone
            # into the forward, where it is stale: adding 0 times the incoming gradient prevents that.
            scale = scale + 0 * grad_TD.flatten()[:1].nan_to_num(0, 0, 0).sum()
        return grad_TD, sums, None, scale if ctx.needs_input_grad[3] else None, None, None, None, None, None


class Anchor(Function):
    """The value that `engine.aux_loss()` returns. Its backward runs before the layers' and fills their scales.

    Whatever the user multiplies the loss by, 1/M for accumulation or AMP's loss scale, thereby scales the auxiliary
    gradients too. leaf: any leaf that requires a gradient. on_backward: called first in backward. scales: the layers'.
    """

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, value: Tensor, on_backward: Callable[[], None], *scales: Tensor) -> Tensor:
        ctx.scales, ctx.on_backward = scales, on_backward
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ctx.on_backward()
        for scale in ctx.scales:
            scale.data.copy_(grad / len(ctx.scales))
        return (None,) * (3 + len(ctx.scales))
