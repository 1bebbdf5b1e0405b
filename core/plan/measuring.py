"""Measure what a plan needs of a machine: the rate of matrix products, and all-to-all's bandwidth and latency."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import distributed as dist

from ..contract.routing import Spec
from ..layer.experts import StackedMLP
from ..processes import distributed, world_size
from .sizes import WIDTH, Model, Training
from .times import FORWARD_AND_BACKWARD, expert_flops

REPETITIONS = 7  # of which the median counts
MOST_BYTES = 2**26  # of the experts' weights that are multiplied, and of the rows that are exchanged
MOST_ROWS = 2**14  # that are multiplied


class Measured(NamedTuple):
    """FLOP/s of the slowest rank; bytes/s that leave a rank, and seconds per message; None with one rank."""

    ranks: int
    rate: float
    bandwidth: float | None
    latency: float | None


def measure(model: Model, training: Training, device: torch.device) -> Measured:
    """Measure on a device of this process, or on one of each rank at once; then all must call it.

    All ranks measure at the same time, so ranks that share cores or links get what they get in training.
    """
    rate = 1 / _slowest(1 / _rate(model, training, device), device)
    if world_size() == 1:
        return Measured(1, rate, None, None)
    return Measured(world_size(), rate, *_connection(model, training, device))


def _rate(model: Model, training: Training, device: torch.device) -> float:
    """FLOP/s of this rank: forward and backward of as many of the model's experts as fit the limits."""
    experts = max(1, min(model.experts, MOST_BYTES // (4 * model.expert_weights)))
    rows = training.sequences(world_size()) * model.sequence * model.top_k * experts // model.experts
    rows = min(max(rows, experts), MOST_ROWS)
    spec = Spec(model.dim, model.hidden, model.out, experts, 1, model.activation)
    bank = StackedMLP(spec)
    with torch.no_grad():
        for weight in bank.parameters():
            weight.copy_(torch.randn_like(weight) / weight.shape[1] ** 0.5)
    bank = bank.to(device)
    x_ND = torch.randn(rows, model.dim, device=device, requires_grad=True)
    counts_E = torch.full((experts,), rows // experts, device=device)
    counts_E[: rows % experts] += 1

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=training.precision == "bf16"):
            out_NO = bank(x_ND, counts_E)
        out_NO.sum().backward()

    return FORWARD_AND_BACKWARD * rows * expert_flops(model) / _seconds(step, device)


def _connection(model: Model, training: Training, device: torch.device) -> tuple[float, float]:
    """(bytes/s, seconds per message): an all-to-all of one number per peer, and one of the model's rows."""
    ranks, peers = world_size(), world_size() - 1
    rows = training.sequences(ranks) * model.sequence * model.top_k
    size = min(rows * model.dim * WIDTH[training.precision], MOST_BYTES) // (4 * ranks)
    small = _slowest(_seconds(_exchange(1, device), device), device)
    large = _slowest(_seconds(_exchange(max(size, 2), device), device), device)
    return 4 * peers * max(size, 2) / max(large - small, 1e-9), small / peers


def _exchange(numbers: int, device: torch.device) -> Callable[[], None]:
    """An all-to-all of so many fp32 numbers per peer."""
    mine = torch.ones(world_size() * numbers, device=device)
    theirs = torch.empty_like(mine)

    def step() -> None:
        dist.all_to_all_single(theirs, mine)

    return step


def _seconds(step: Callable[[], None], device: torch.device) -> float:
    """The median time of a step that all ranks begin together."""
    taken = []
    for repetition in range(-2, REPETITIONS):
        if distributed():
            dist.barrier()
        _wait(device)
        start = time.perf_counter()
        step()
        _wait(device)
        if repetition >= 0:
            taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _slowest(seconds: float, device: torch.device) -> float:
    """The largest time over ranks."""
    if not distributed():
        return seconds
    slowest = torch.tensor([seconds], dtype=torch.float64, device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return float(slowest)
