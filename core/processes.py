"""Sums, means and votes over ranks, the processes that train one model; and one thread per process."""

from collections.abc import Iterator
from contextlib import contextmanager
from zlib import crc32

import torch
from torch import Tensor

from .errors import RunError


def distributed() -> bool:
    """Whether there are several ranks."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def all_reduce_sum(sums: Tensor) -> Tensor:
    """Sum a tensor over all ranks, in place."""
    if distributed():
        torch.distributed.all_reduce(sums)
    return sums


def mean_scalar_over_ranks(value: Tensor | float, device: torch.device) -> float:
    """The mean of a number over all ranks. device: the device that the ranks communicate through."""
    local = float(torch.as_tensor(value).detach())
    if not distributed():
        return local
    return float(all_reduce_sum(torch.tensor([local], device=device))) / torch.distributed.get_world_size()


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of a tensor over all ranks, with the gradient of this rank's part.

    Use it before a nonlinearity. Averaging the gradients over ranks, as DistributedDataParallel does, then gives the
    gradient of the nonlinear function of the mean.
    """
    if not distributed():
        return value
    local = value.detach()
    return value + (all_reduce_sum(local.clone()) / torch.distributed.get_world_size() - local)


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
def one_thread() -> Iterator[None]:
    """Limit PyTorch to one thread in the body: on a busy machine, threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
