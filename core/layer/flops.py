"""Forward FLOPs: of a layer per token, in closed form; of a whole model per sample, counted by torch.

A multiply-add is 2. Only matmuls are counted, as by torch's FlopCounterMode. Biases, activations, softmax, sorting
and the weighting of outputs are left out; they are of lower order (H, E or D, against H D and E D).
"""

from collections.abc import Callable, Mapping

import attrs
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..contract.parts import Experts
from ..contract.routing import Routing, Spec
from .dense import DenseExpert, DenseTwin
from .experts import StackedMLP
from .moe import MoE
from .probing import evaluating, uncounted
from .sharded import gathered


@attrs.frozen
class Parameters:
    """Numbers of learned parameters. active: without the E - K experts of each layer that a token does not use."""

    active: int
    total: int


@attrs.frozen
class Flops:
    """Forward FLOPs per token or sample. active: with the experts it is sent to; total: with all experts."""

    active: float
    total: float

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.active + other.active, self.total + other.total)


def mlp_flops(spec: Spec, hidden: int) -> int:
    """FLOPs of an MLP for one token: 2 D H + 2 H out; for swiglu, with its wider first matrix, 4 D H + 2 H out."""
    wide = 2 * hidden if spec.activation == "swiglu" else hidden
    return 2 * spec.dim * wide + 2 * hidden * spec.out_dim


def layer_flops(layer: MoE, rows: float | None = None, slots: float = 0.0) -> Flops:
    """FLOPs of a layer for one token: router + shared + mixing + rows * expert; for the total, E * expert.

    router: 2 per weight of its matrices; linear scores take 2 E D at the level of E experts and 2 n D at a level of
    n groups. mixing: 2 (D + out) per slot that a token is mixed into. rows, slots: measured (`Stats.work`) for
    routers that choose a varying number; rows is K by default.
    """
    spec, each = layer.spec, _expert_flops(layer)
    always: float = 2 * _weights(layer.router) + mlp_flops(spec, spec.hidden * spec.shared)
    always += 2 * (spec.dim + spec.out_dim) * slots
    return Flops(always + (spec.top_k if rows is None else rows) * each, always + spec.experts * each)


def model_flops(model: nn.Module, work: Mapping[str, Mapping[str, float]]) -> Flops:
    """The FLOPs of a model's MoE layers for one token, or of the MLPs that replace them in a dense model.

    work: measured `Stats.work` by layer. The rest of the model, such as attention or a head, is left out.
    """
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    counted = [layer_flops(layer, **work.get(layer.name, {})) for layer in layers]
    if not layers:
        twins = [_dense_flops(module) for module in model.modules() if isinstance(module, DenseTwin | DenseExpert)]
        counted = [Flops(flops, flops) for flops in twins]
    return sum(counted, Flops(0, 0))


def forward_flops(model: nn.Module, run: Callable[[], object], samples: int = 1) -> Flops:
    """Whole-model forward FLOPs per sample, counted by torch in eval mode.

    run: a forward of the model on `samples` samples. The total assumes that each token goes to all E experts of a
    layer. Runs eagerly, because the custom matmuls of a compiled graph would count as 0.
    """
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    with torch.no_grad(), evaluating(model), uncounted(layers), torch.compiler.set_stance("force_eager"):
        with FlopCounterMode(display=False) as counter:
            run()
        idle = sum(_idle_rows(routing) * _expert_flops(layer) for layer in layers for routing in layer.watched or ())
    active = float(counter.get_total_flops())
    return Flops(active / samples, (active + idle) / samples)


def parameters_of(model: nn.Module) -> Parameters:
    """The number of a model's parameters, and of those that a token uses."""
    total = sum(parameter.numel() for parameter in model.parameters())
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    idle = sum((layer.spec.experts - layer.spec.top_k) * _expert_parameters(layer) for layer in layers)
    return Parameters(total - round(idle), total)


def _idle_rows(routing: Routing) -> float:
    """The number of additional rows if each token went to all experts."""
    return float(routing.tokens.count * routing.experts - routing.work)


def _expert_parameters(layer: MoE) -> float:
    """Parameters of one expert; the mean over experts if they are modules that differ."""
    bank = layer.experts
    tensors = [getattr(bank, name) for name in bank.axes] if bank.axes else list(bank.parameters())
    return sum(tensor.numel() for tensor in tensors if isinstance(tensor, nn.Parameter)) / layer.spec.experts


def _dense_flops(module: DenseTwin | DenseExpert) -> float:
    return _bank_flops(module.bank, module.dim) if isinstance(module, DenseExpert) else 2 * _weights(module)


def _expert_flops(layer: MoE) -> float:
    """FLOPs of one expert for one token; a bank without a closed form, such as modules, is counted by torch."""
    bank, spec = layer.experts, layer.spec
    return mlp_flops(spec, spec.hidden) if isinstance(bank, StackedMLP) else _bank_flops(bank, spec.dim) / spec.experts


def _bank_flops(bank: Experts, dim: int) -> float:
    """FLOPs of all experts of a bank for one token, counted by torch."""
    with torch.no_grad(), evaluating(bank), gathered(bank), FlopCounterMode(display=False) as counter:
        like = next(bank.home.parameters(), torch.zeros(()))
        bank.outputs(like.new_zeros(1, dim))
    return float(counter.get_total_flops())


def _weights(module: nn.Module) -> int:
    """The number of weights in a module's matrices; vectors are biases and gains."""
    return sum(tensor.numel() for tensor in module.parameters() if tensor.dim() > 1)
