"""Weights that FSDP2 shards over ranks, where the engine reads them outside a forward."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..processes import full_tensor

FSDP = "torch.distributed.fsdp"


def gather_for_outputs(bank: Any) -> None:
    """Let FSDP2 gather a bank's weights for `outputs` too, not only for its forward."""
    fsdp = sys.modules.get(FSDP)  # without that import nothing is sharded
    if fsdp is not None and isinstance(bank, fsdp.FSDPModule) and "outputs" not in vars(bank):
        fsdp.register_fsdp_forward_method(bank, "outputs")


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Inside, a module's sharded parameters are whole ones with their values. All ranks must enter it."""
    sharded = [
        (owner, name, parameter)
        for owner in module.modules()
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
