"""Spread a model over ranks: weights replicated or sharded over all of them, experts cut over some."""

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from ..engine.engine import Engine
from ..errors import UsageError
from ..layer.exchange import Exchange, refuse_exchange
from ..layer.moe import MoE
from ..processes import all_reduce_sum, distributed, is_cut, world_size

CONTAINERS = (nn.ModuleList, nn.ModuleDict)  # which are never called


def expert_mesh(experts: int = 1, device: str | None = None) -> DeviceMesh:
    """A DeviceMesh of ("data", "experts"): all W ranks as W / experts rows of `experts` ranks.

    device: "cuda" or "cpu"; None: GPUs if the process group communicates through NCCL. Raises UsageError if W is not
    a multiple of `experts`.
    """
    ranks = world_size()
    if experts < 1 or ranks % experts:
        message = f"experts can't be spread over {experts} of {ranks} ranks; use a divisor of {ranks}"
        raise UsageError(message, code="bad-mesh")
    device = device or ("cuda" if "nccl" in torch.distributed.get_backend_config() else "cpu")
    return init_device_mesh(device, (ranks // experts, experts), mesh_dim_names=("data", "experts"))


def parallelize(engine: Engine, model: nn.Module, mesh: DeviceMesh | None = None, shard: bool = True) -> nn.Module:
    """Spread a model with the engine's layers over the ranks of a mesh; returns the model to call in training.

    mesh: as `expert_mesh` makes it; None: all ranks see their own data, and hold all experts. Experts are cut over
    "experts", and every rank trains on its own data. shard: cut all other weights over all ranks, layer by layer
    (`torch.distributed.fsdp.fully_shard`), and return the same model; otherwise each rank holds them whole, and the
    answer is a DistributedDataParallel, which must be made again from `.module` after a growth. Weights and buffers
    become those of rank 0 first. Make optimizers afterwards. All ranks must call it. Raises UsageError.
    """
    from torch.distributed.fsdp import FSDPModule

    if not distributed():
        raise UsageError("parallelize() needs several ranks: start with torchrun", code="one-process")
    if isinstance(model, DistributedDataParallel | FSDPModule):
        message = "the model is spread over ranks already; give parallelize() the model as it was"
        raise UsageError(message, code="already-parallel")
    layers = [layer for layer in engine.layers if any(layer is one for one in model.modules())]
    mesh = mesh or expert_mesh(device=next(model.parameters()).device.type)
    spread = "experts" in (mesh.mesh_dim_names or ()) and mesh["experts"].size() > 1
    if spread:
        for layer in layers:
            refuse_exchange(layer.experts, layer.name)
    _copy_first(model)
    for layer in layers if spread else ():
        if layer.experts.exchange is None:  # not cut by an earlier call
            Exchange(mesh, layer.spec.out_dim).cut(layer.experts)
    cut = {one for layer in layers for one in layer.experts.parameters() if layer.experts.exchange and is_cut(one)}
    return _sharded(model, layers, mesh, cut) if shard else _replicated(model, cut)


@torch.no_grad()
def _copy_first(model: nn.Module) -> None:
    """Give every rank the weights and buffers of the first."""
    for tensor in (*model.parameters(), *model.buffers()):
        if not is_cut(tensor):
            torch.distributed.broadcast(tensor.detach(), 0)


def _replicated(model: nn.Module, cut: set[nn.Parameter]) -> nn.Module:
    """A DistributedDataParallel, which leaves cut experts to their exchange."""
    names = [name for name, parameter in model.named_parameters() if parameter in cut]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    return DistributedDataParallel(model)


def _sharded(model: nn.Module, layers: Iterable[MoE], mesh: DeviceMesh, cut: set[nn.Parameter]) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    # a layer's output is a view of [T, out]; it is never changed in place
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    scalars = {parameter for parameter in model.parameters() if parameter.dim() == 0}  # fully_shard takes none
    for scalar in scalars:
        if scalar.requires_grad:
            scalar.register_hook(lambda grad: all_reduce_sum(grad) / world_size())
    for parameter in model.parameters():  # nor any that is not contiguous, such as a transposed copy
        if not is_cut(parameter):
            parameter.data = parameter.data.contiguous()
    everywhere = init_device_mesh(mesh.device_type, (world_size(),))
    options: dict[str, Any] = {"mesh": everywhere, "ignored_params": cut | scalars}
    for module in _units(model, list(layers)):
        fully_shard(module, **options)
    fully_shard(model, **options)
    return model


def _units(model: nn.Module, layers: list[MoE]) -> Iterator[nn.Module]:
    """What is gathered at a time, inner ones first: each layer, and each block of a list of blocks."""
    inside = {id(module) for layer in layers for module in layer.modules()}
    yield from (layer for layer in layers if layer is not model)
    for module in reversed(list(model.modules())):
        if isinstance(module, nn.ModuleList) and id(module) not in inside:
            yield from (block for block in module if id(block) not in inside and not isinstance(block, CONTAINERS))
