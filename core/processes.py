"""Sums, means and votes over ranks, the processes that train one model; and one thread per process."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from .errors import RunError


def distributed() -> bool:
    """Whether there are several ranks."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def rank() -> int:
    """This process among the ranks; 0 without a process group."""
    return torch.distributed.get_rank() if distributed() else 0


def world_size() -> int:
    """The number of ranks; 1 without a process group."""
    return torch.distributed.get_world_size() if distributed() else 1


def all_reduce_sum(local: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, which all must call. `local` stays what it is; the sum has no gradient."""
    if not distributed():
        return local
    total = local.detach().clone()
    torch.distributed.all_reduce(total)
    return total


def is_cut(tensor: Any) -> bool:
    """Whether a tensor is cut over ranks (a DTensor)."""
    return hasattr(tensor, "full_tensor")


def full_tensor(tensor: Any) -> Any:
    """A tensor that is cut over ranks, gathered, for which all must call it; anything else as it is."""
    return tensor.full_tensor() if is_cut(tensor) else tensor


def shard_like(whole: Tensor, like: Tensor) -> Tensor:
    """A tensor, the same on all ranks, sharded as another one is; as it is if that is not sharded."""
    if not is_cut(like):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements)  # type: ignore[attr-defined]


def cut_like(like: Any, part: Tensor) -> Any:
    """A tensor that is cut over ranks as another one is, of which this rank holds this part."""
    from torch.distributed.tensor import DTensor

    whole: dict[str, Any] = {"shape": like.shape, "stride": like.stride()}
    return DTensor.from_local(part, like.device_mesh, like.placements, run_check=False, **whole)


def of_mean_over_ranks(grad: Tensor) -> Tensor:
    """The gradient of the mean loss over ranks, from that of this rank's loss, as a process with micro-batches has."""
    return grad / ranks if (ranks := world_size()) > 1 else grad


def mean_scalar_over_ranks(value: Tensor | float, device: torch.device) -> float:
    """The mean of a number over all ranks. device: the device that the ranks communicate through."""
    local = float(torch.as_tensor(value).detach())
    if not distributed():
        return local
    return float(all_reduce_sum(torch.tensor([local], device=device))) / world_size()


def sum_over_ranks(local: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, which all must call, with W times the gradient of this rank's part.

    Averaging the gradients over the W ranks, as DistributedDataParallel and FSDP do, then gives the gradient of any
    function of the sum.
    """
    if not distributed():
        return local
    total = all_reduce_sum(local)
    return total + world_size() * (local - local.detach()) if local.requires_grad else total


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether it is so on any rank."""
    return flag if not distributed() else bool(all_reduce_sum(torch.tensor(float(flag), device=device)))


def of_first(text: str) -> str:
    """Rank 0's text, on all ranks."""
    if not distributed():
        return text
    size = torch.tensor(len(text.encode()))
    torch.distributed.broadcast(size, 0)
    content = torch.zeros(int(size), dtype=torch.uint8)
    if rank() == 0:
        content = torch.tensor(list(text.encode()), dtype=torch.uint8)
    torch.distributed.broadcast(content, 0)
    return bytes(content.tolist()).decode()


@contextmanager
def agreed(what: str, device: torch.device) -> Iterator[None]:
    """Make the body succeed on every rank or raise on every rank. what: must be the same on all ranks."""
    error: BaseException | None = None
    try:
        yield
    except BaseException as caught:
        error = caught
    if distributed():
        checksum = crc32(what.encode())
        vote = torch.tensor([int(error is None), checksum, -checksum], device=device)
        torch.distributed.all_reduce(vote, torch.distributed.ReduceOp.MIN)
        if error is None and not int(vote[0]):
            raise RunError(f"{what} was not done, because it failed in another process", code="other-process-failed")
        if error is None and int(vote[1]) != -int(vote[2]):
            message = f"{what} was not done, because processes disagree"
            raise RunError(message, code="processes-disagree")
    if error is not None:
        raise error


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let PyTorch compute with that many threads in the body. On a busy machine, threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
