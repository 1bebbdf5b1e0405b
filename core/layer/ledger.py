"""Carry sums, signals and auxiliary loss through backward, so that a recomputed forward counts once.

Under activation checkpointing a forward runs twice, but its backward once. Therefore everything that must happen once
per forward happens in backward, in a Function that passes the layer's output through unchanged:

- the layer's sums (tokens, load, measurements, loss values) are the "gradient" of a leaf of zeros, `step`, in which
  autograd adds up all forwards of a step;
- the biases' signals, which need the gradient at the layer's output, come after them in the same leaf;
- the auxiliary loss gets its gradient here, so it reaches the router without being part of the task loss.

This works in eager and compiled mode, under every form of checkpointing. Limits: torch.autograd.grad leaves out the
auxiliary loss; two backwards of one forward count twice.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

Signals = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (grad_TD, token_N, expert_N, weight_N) -> flat signals

STALE = "the layer changed its number of experts between this forward and its backward"


def invalidate(step: Tensor) -> None:
    """Make later backwards that reach this leaf raise RuntimeError, because the layer's shapes have changed."""

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
        # A copy, not a view: AOTAutograd replays an output that aliases an input outside the graph, which would drop
        # the whole Function; also, a view from a custom Function must not be modified in place.
        return y_TD.clone()

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> Any:
        sums, scale, *routed = ctx.saved_tensors
        if ctx.signals is not None:
            sums = torch.cat([sums, ctx.signals(grad_TD, *routed).to(sums.dtype)])
        if sums.shape[0] != ctx.size:
            raise RuntimeError(STALE)
        if torch.compiler.is_compiling():
            # `scale` is filled between forward and backward. A partitioner may move anything that depends only on
            # `scale` into the forward, where it is stale; adding 0 times the incoming gradient prevents that.
            scale = scale + 0 * grad_TD.flatten()[:1].nan_to_num(0, 0, 0).sum()
        return grad_TD, sums, None, scale if ctx.needs_input_grad[3] else None, None, None, None, None, None


class Anchor(Function):
    """The value that `engine.aux_loss()` returns. Its backward runs before the layers' and fills their scales.

    So any factor on the loss, such as 1/M for accumulation or AMP's loss scale, also scales the auxiliary gradients.
    leaf: any leaf that requires a gradient. on_backward: called first in backward. scales: the layers' scales.
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
