"""The one autograd Function through which counts, signals and auxiliary gradients pass.

A forward that is recomputed (activation checkpointing) runs twice but is gone back through once.
So a layer enters what it counted as the "gradient" of a leaf of zeros, and its auxiliary loss as a
gradient of that loss: both then come to pass once, eager or compiled, in every form of checkpointing.

Limits: torch.autograd.grad sees no auxiliary loss; two backwards of one forward count twice.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

Signals = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


STALE = "the layer changed its number of experts between this forward and its backward"


def invalidate(book: Tensor) -> None:
    """No layer has this book any more: a backward that reaches it has gradients of the old shapes, and raises."""

    def stale(_: Tensor) -> None:
        raise RuntimeError(STALE)

    book.register_hook(stale)


class Ledger(Function):
    """y unchanged. In backward: sums and signals to the leaf `book`, the loss's scale to `aux`.

    aux: None where the layer has no loss term; signals and what they read of the routing: where no bias wants one.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y_TD: Tensor,
        book: Tensor,
        sums: Tensor,
        aux: Tensor | None,
        scale: Tensor,
        token_N: Tensor | None,
        expert_N: Tensor | None,
        weight_N: Tensor | None,
        signals: Signals | None,
    ) -> Tensor:
        ctx.save_for_backward(sums, scale, token_N, expert_N, weight_N)
        ctx.signals, ctx.size = signals, book.shape[0]
        # a copy, not a view: AOTAutograd replays an output that aliases an input outside the graph, and with it
        # the whole Function would be lost; nor may anybody write into a custom Function's view
        return y_TD.clone()

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> Any:
        sums, scale, *routed = ctx.saved_tensors
        if ctx.signals is not None:
            sums = torch.cat([sums, ctx.signals(grad_TD, *routed)])
        if sums.shape[0] != ctx.size:
            raise RuntimeError(STALE)
        if torch.compiler.is_compiling():
            # The scale arrives between forward and backward. What depends on it alone a partitioner may
            # move into the forward, where it is stale: a term of 0 ties it to the incoming gradient.
            scale = scale + 0 * grad_TD.flatten()[:1].nan_to_num(0, 0, 0).sum()
        return grad_TD, sums, None, scale if ctx.needs_input_grad[3] else None, None, None, None, None, None


class Anchor(Function):
    """What `engine.aux_loss()` answers. Its backward runs before the layers' and hands each the loss's scale.

    So a user's 1/M for accumulation and AMP's loss scale reach the auxiliary gradient by themselves.
    """

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, value: Tensor, entered: Callable[[], None], *scales: Tensor) -> Tensor:
        ctx.scales, ctx.entered = scales, entered
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ctx.entered()
        for scale in ctx.scales:
            scale.data.copy_(grad / len(ctx.scales))
        return (None,) * (3 + len(ctx.scales))
