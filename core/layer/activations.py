"""What happens between an expert's two products, as functions that autograd knows and with gradients by hand."""

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
    """An activation without autograd.

    of(a): h [n, H] of a product a [n, W], which it may overwrite; what a is then is kept, so h itself for ReLU.
    again(kept): h. back(kept, d): the gradient of a [n, W] of that of h, d [n, H], which it may overwrite.
    """

    of: Callable[[Tensor], Tensor]
    again: Callable[[Tensor], Tensor]
    back: Callable[[Tensor, Tensor], Tensor]


def _relu_back(h: Tensor, d: Tensor) -> Tensor:
    back: Tensor = torch.ops.aten.threshold_backward.grad_input(d, h, 0, grad_input=d)
    return back


def _gelu_back(a: Tensor, d: Tensor) -> Tensor:
    back: Tensor = torch.ops.aten.gelu_backward.grad_input(d, a, grad_input=d)
    return back


def _swiglu_back(a: Tensor, d: Tensor) -> Tensor:
    gate, up = a.chunk(2, dim=-1)
    return torch.cat([torch.ops.aten.silu_backward(d * up, gate), d.mul_(F.silu(gate))], dim=-1)


MANUAL_ACTIVATIONS = {
    "relu": ManualActivation(torch.relu_, lambda h: h, _relu_back),
    "gelu": ManualActivation(F.gelu, F.gelu, _gelu_back),
    "swiglu": ManualActivation(swiglu, swiglu, _swiglu_back),
}
