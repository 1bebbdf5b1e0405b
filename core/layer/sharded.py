"""Weights that are cut over ranks, where the engine reads or changes them outside a forward."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..contract.parts import Part
from ..errors import UsageError
from ..optimizer_state import live
from ..processes import full_tensor, shard_like

FSDP = "torch.distributed.fsdp"
Swap = tuple[nn.Parameter, nn.Parameter]  # (what a parameter was, what it is now)


def gather_for_outputs(bank: Any) -> None:
    """Let FSDP2 gather a bank's weights for `outputs` too, not only for its forward."""
    fsdp = sys.modules.get(FSDP)  # without that import nothing is sharded
    if fsdp is not None and isinstance(bank, fsdp.FSDPModule) and "outputs" not in vars(bank):
        fsdp.register_fsdp_forward_method(bank, "outputs")


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Inside, a module's sharded parameters, and those it borrows, are whole ones. All ranks must enter it."""
    homes = [module, *(part.home for part in module.modules() if isinstance(part, Part))]
    sharded = [
        (owner, name, parameter)
        for owner in dict.fromkeys(owner for home in homes for owner in home.modules())
        for name, parameter in owner._parameters.items()
        if hasattr(parameter, "full_tensor")
    ]
    for owner, name, parameter in sharded:
        whole: Tensor = full_tensor(parameter.detach())  # type: ignore[union-attr]
        owner._parameters[name] = nn.Parameter(whole, parameter.requires_grad)  # type: ignore[union-attr]
    try:
        yield
    finally:
        for owner, name, parameter in sharded:
            owner._parameters[name] = parameter


# -- whole for a while -------------------------------------------------------------------------------


@contextmanager
def whole(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, the layers' weights, and every optimizer's state of them, are plain tensors on every rank.

    Weights that `fully_shard` cut are made whole with all that it cut together with them, experts of an `Exchange`
    alone; afterwards they are cut again as they were, at whatever size they have then. Parameters are other objects
    inside and afterwards; every live optimizer follows. All ranks must enter it. Raises UsageError where this version
    of torch keeps the cut of `fully_shard` in another way.
    """
    banks: list[Any] = [module for layer in layers for module in layer.modules() if getattr(module, "exchange", None)]
    cutters = [bank.exchange for bank in banks]
    trees = _sharded_with(layers)
    try:
        plans = [_Sharding(module) for module in reversed(trees)]
    except (AttributeError, ImportError, KeyError) as error:
        message = f"a layer that fully_shard has cut can't grow with torch {torch.__version__}; gather its weights"
        raise UsageError(message, code="layer-cannot-grow") from error
    swaps = [swap for plan in plans for swap in plan.undo()]
    swaps += [swap for bank, exchange in zip(banks, cutters, strict=True) for swap in exchange.uncut(bank)]
    _follow(swaps)
    try:
        yield
    finally:
        swaps = [swap for bank, exchange in zip(banks, cutters, strict=True) for swap in exchange.cut(bank)]
        swaps += [swap for plan in plans for swap in plan.again()]
        _follow(swaps)


def _sharded_with(layers: Sequence[nn.Module]) -> list[nn.Module]:
    """Every module that `fully_shard` was called with, outer ones first, in the trees that hold the layers."""
    fsdp = sys.modules.get(FSDP)  # without that import nothing is sharded
    if fsdp is None:
        return []
    inside = {id(module) for layer in layers for module in layer.modules()}
    holders = [one for one in live(fsdp.FSDPModule) if any(id(module) in inside for module in one.modules())]
    roots = max(holders, key=lambda one: sum(1 for _ in one.modules()), default=None)
    return [] if roots is None else [module for module in roots.modules() if isinstance(module, fsdp.FSDPModule)]


class _Sharding:
    """How `fully_shard` cut one module. torch has no call that undoes it, so this reads what it has noted."""

    def __init__(self, module: Any) -> None:
        from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY
        from torch.distributed._composable_state import _module_state_mapping

        self.states = _module_state_mapping
        self.module, self.keys, self.state = module, (STATE_KEY, REGISTRY_KEY), module._get_fsdp_state()
        groups = getattr(self.state, "_fsdp_param_groups", None)
        self.groups = [self.state._fsdp_param_group] if groups is None else groups  # older versions have one
        self.groups = [group for group in self.groups if group is not None]
        self.cut = [one for group in self.groups for one in group.fsdp_params]
        self.hooks = [self.state._pre_forward_hook_handle, self.state._post_forward_hook_handle]
        self.hooks += [one._post_load_hook_handle for one in self.cut if hasattr(one, "_post_load_hook_handle")]
        for group in self.groups:
            self.hooks += group._module_to_pre_save_state_dict_hook_handle.values()
            self.hooks += group._module_to_pre_load_state_dict_hook_handle.values()
        self.whole: dict[nn.Parameter, Any] = {}  # each parameter, whole -> its placement

    def undo(self) -> Iterator[Swap]:
        """Make the module what it was before `fully_shard`, with the present weights."""
        self.module.reshard()
        for one in self.cut:
            sharded = one.sharded_param
            parameter = nn.Parameter(sharded.detach().full_tensor(), sharded.requires_grad)
            one._setattr_on_modules(parameter)
            self.whole[parameter] = one.fsdp_placement
            yield sharded, parameter
        for handle in self.hooks:
            handle.remove()
        for key in self.keys:
            vars(self.module).pop(key)
        self.states.pop(self.module)
        self.module.__class__ = type(self.module).__mro__[2]  # fully_shard puts two classes before the original
        vars(self.module).pop("outputs", None)  # see gather_for_outputs

    def again(self) -> Iterator[Swap]:
        """Call `fully_shard` as it was called."""
        from torch.distributed.fsdp import fully_shard

        options: dict[str, Any] = {"ignored_params": {one for one in self.module.parameters() if one not in self.whole}}
        if self.groups:
            group = self.groups[0]
            options |= {"mesh": group.mesh_info.mesh, "offload_policy": group.offload_policy}
        if not self.state._auto_reshard_after_forward:
            options["reshard_after_forward"] = bool(self.groups and self.groups[0].post_forward_mesh_info)
        before = dict(self.module.named_parameters())
        place = self.whole.get
        fully_shard(self.module, mp_policy=self.state._mp_policy, shard_placement_fn=place, **options)
        after = dict(self.module.named_parameters())
        yield from ((old, after[name]) for name, old in before.items() if old in self.whole)


def _follow(swaps: Sequence[Swap]) -> None:
    """Let every live optimizer hold the new parameters, with its state of the old ones cut as they are."""
    new_of = dict(swaps)
    for optimizer in live(Optimizer) if new_of else ():
        for group in optimizer.param_groups:
            group["params"][:] = [new_of.get(parameter, parameter) for parameter in group["params"]]
        for old in [parameter for parameter in optimizer.state if parameter in new_of]:
            new = new_of[old]
            state = {name: full_tensor(value) for name, value in optimizer.state.pop(old).items()}
            optimizer.state[new] = {
                name: shard_like(value, new) if isinstance(value, Tensor) and value.shape == new.shape else value
                for name, value in state.items()
            }
