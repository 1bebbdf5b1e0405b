"""An upcycled layer: a bank of copies of a dense block, and what the model around the layer tells it.

Suffixes: N assignments, D model, H hidden, W entering the hidden units, E experts.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..contract.families import DenseBlock, part_of
from ..contract.routing import Spec
from ..errors import UsageError
from ..layer.experts import StackedMLP
from ..layer.moe import MoE
from .calls import Calls

# functions for which the engine's own activations exist: without and with a gate
ENGINES = {"relu": torch.relu, "gelu": F.gelu}, {"swiglu": F.silu}


@attrs.frozen(eq=False)
class Activation:
    """[N, W] -> [N, H]: a block's own activation, of the gate's half times the up projection's if it is gated."""

    act: Callable[[Tensor], Tensor]
    gated: bool

    def __call__(self, a_NW: Tensor) -> Tensor:
        if not self.gated:
            return self.act(a_NW)
        gate_NH, up_NH = a_NW.chunk(2, dim=-1)
        return self.act(gate_NH) * up_NH


@attrs.frozen(eq=False)
class DenseWeights:
    """A dense block's weights as one expert's rows of a StackedMLP, w_in [D, W] and w_out [H, D], and biases.

    activation: the name of the spec's activation. own: the block's, if that is another one.
    """

    rows: Mapping[str, Tensor]
    activation: str
    own: Activation | None

    @property
    def sizes(self) -> dict[str, Any]:
        """What a layer's spec needs of them."""
        hidden, dim = self.rows["w_out"].shape
        return {"dim": dim, "hidden": hidden, "activation": self.activation, "bias": "b_in" in self.rows}


@torch.no_grad()
def weights_of(block: DenseBlock) -> DenseWeights:
    """The weights of a dense block, on the CPU. Raises UsageError for weights that can't be copied."""
    maps = {name: _linear(block, name) for name in block.at.maps}
    *into, out = maps.values()
    rows = {"w_in": torch.cat([weight for weight, _ in into], 1), "w_out": out[0]}
    if any(bias is not None for _, bias in maps.values()):
        b_in = [weight.new_zeros(weight.shape[1]) if bias is None else bias for weight, bias in into]
        rows["b_in"] = torch.cat(b_in)
        rows["b_out"] = out[0].new_zeros(out[0].shape[1]) if out[1] is None else out[1]
    act, gated = getattr(block.module, block.at.act), bool(block.at.gate)
    grid = torch.linspace(-8, 8, 257)
    known = [name for name, function in ENGINES[gated].items() if torch.equal(act(grid), function(grid))]
    name = next(iter(known or ENGINES[gated]))
    return DenseWeights(rows, name, None if known else Activation(act, gated))


def _linear(block: DenseBlock, name: str) -> tuple[Tensor, Tensor | None]:
    """(weight [in, out], bias or None) of a linear map in a block."""
    module, where = part_of(block.module, name), f"{block.name}.{name}"
    conv = type(module).__name__ == "Conv1D"  # of transformers, which stores [in, out]
    weight = getattr(module, "weight", None)
    if hasattr(module, "base_layer"):
        raise UsageError(f"{where} has an adapter; merge it before you upcycle the model", code="adapter-in-the-way")
    if isinstance(weight, Tensor) and weight.device.type == "meta":
        raise UsageError("upcycle() needs a model with weights, not one on the meta device", code="meta-model")
    plain = isinstance(module, nn.Linear) or conv
    if not plain or type(module.weight.data) is not Tensor or module.weight.dtype not in _FLOATS:
        kind = f"{type(module).__name__} of {getattr(weight, 'dtype', 'unknown weights')}"
        message = f"{where} is a {kind}, whose weights can't be copied; load the model without quantisation"
        raise UsageError(message, code="quantised-weights")
    weight_IO = module.weight if conv else module.weight.t()
    return weight_IO.detach().cpu(), None if module.bias is None else module.bias.detach().cpu()


_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class DenseCopies(StackedMLP):
    """Experts that start as copies of a dense block, with its own activation. They are built in fp32."""

    def __init__(self, spec: Spec, dense: DenseWeights) -> None:
        with torch.device("meta"):  # nothing is drawn
            super().__init__(spec)
        for name, row in dense.rows.items():
            setattr(self, name, nn.Parameter(row.float().expand(spec.experts, *row.shape).clone()))
        if dense.own is not None:
            self.activate = dense.own  # type: ignore[method-assign]


class Surroundings:
    """A hook before an upcycled layer's forward: gives it the mask and the ids of its tokens. Copied with the layer."""

    def __init__(self, calls: Calls) -> None:
        self.calls = calls

    def __call__(self, _: nn.Module, given: tuple[Any, ...], more: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        if len(given) > 1:  # the engine calls its layers with its mask and ids
            return given, more
        _, mask, ids = self.calls.around(given[0])
        return given, {"mask": mask, "ids": ids, **more}


def upcycled_layers(model: nn.Module) -> Iterator[tuple[str, MoE]]:
    """The upcycled layers of a model by name, in order."""
    for name, module in model.named_modules():
        if isinstance(module, MoE) and isinstance(module.experts, DenseCopies):
            yield name, module
