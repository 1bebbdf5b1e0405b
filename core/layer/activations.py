"""Activations of the experts' MLPs, with manual gradients.

ACTIVATIONS are for autograd. MANUAL_ACTIVATIONS are the same functions for the fused kernel, which does not use it.
"""

from collections.abc import Callable

import attrs
import torch
from torch import Tensor
from torch.nn import functional as F


def swiglu(a_NJ: Tensor) -> Tensor:
    """silu(first half) * second half (Shazeer, 2020)."""
    gate, up = a_NJ.chunk(2, dim=-1)
    return F.silu(gate) * up


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": torch.relu, "gelu": F.gelu, "swiglu": swiglu}


@attrs.frozen
class ManualActivation:
    """An activation and its gradient without autograd.

    forward(a): h [n, H] from the preactivations a [n, W]. It may overwrite a; the kernel saves the resulting a (for
    ReLU that is h). recompute(saved): h again. backward(saved, d): the gradient [n, W] with respect to a, given the
    gradient d [n, H] with respect to h, which it may overwrite.
    """

    forward: Callable[[Tensor], Tensor]
    recompute: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


def _relu_backward(h: Tensor, d: Tensor) -> Tensor:
    grad: Tensor = torch.ops.aten.threshold_backward.grad_input(d, h, 0, grad_input=d)
    return grad


def _gelu_backward(a: Tensor, d: Tensor) -> Tensor:
    grad: Tensor = torch.ops.aten.gelu_backward.grad_input(d, a, grad_input=d)
    return grad


def _swiglu_backward(a: Tensor, d: Tensor) -> Tensor:
    gate, up = a.chunk(2, dim=-1)
    return torch.cat([torch.ops.aten.silu_backward(d * up, gate), d.mul_(F.silu(gate))], dim=-1)


MANUAL_ACTIVATIONS = {
    "relu": ManualActivation(torch.relu_, lambda h: h, _relu_backward),
    "gelu": ManualActivation(F.gelu, F.gelu, _gelu_backward),
    "swiglu": ManualActivation(swiglu, swiglu, _swiglu_backward),
}
