"""Several processes that train one model: sums, means, votes over all of them; and runs that keep to one thread."""

from collections.abc import Iterator
from contextlib import contextmanager
from zlib import crc32

import torch
from torch import Tensor

from .errors import RunError


def distributed() -> bool:
    """Whether there are several processes."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def all_reduce_sum(sums: Tensor) -> Tensor:
    """Sums of all processes, in place."""
    if distributed():
        torch.distributed.all_reduce(sums)
    return sums


def mean_over_processes(value: Tensor | float, device: torch.device) -> float:
    """The mean of a number over all processes; device: one that they can talk through."""
    own = float(torch.as_tensor(value).detach())
    if not distributed():
        return own
    return float(all_reduce_sum(torch.tensor([own], device=device))) / torch.distributed.get_world_size()


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of value over all processes, in whose gradient this process has its own part.

    For what comes before a nonlinearity: gradients that are averaged over processes, as
    DistributedDataParallel does, are then those of the mean.
    """
    if not distributed():
        return value
    own = value.detach()
    return value + (all_reduce_sum(own.clone()) / torch.distributed.get_world_size() - own)


@contextmanager
def agreed(what: str, device: torch.device) -> Iterator[None]:
    """What happens inside happens in every process or raises in every process; what: must be the same in all."""
    error: BaseException | None = None
    try:
        yield
    except BaseException as caught:
        error = caught
    if distributed():
        wanted = crc32(what.encode())
        vote = torch.tensor([int(error is None), wanted, -wanted], device=device)
        torch.distributed.all_reduce(vote, torch.distributed.ReduceOp.MIN)
        if error is None and not int(vote[0]):
            raise RunError(f"{what} was not done, because it failed in another process")
        if error is None and int(vote[1]) != -int(vote[2]):
            raise RunError(f"{what} was not done, because processes want different things")
    if error is not None:
        raise error


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, PyTorch computes on one thread: two on a busy machine wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
