"""A run's device, precision, deterministic algorithms and step times."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import UsageError, nearest
from ..layer.flops import forward_flops
from ..layer.fused_cpu import matmul_dtype, matmul_in
from ..processes import distributed
from .config import RunConfig

ENOUGH = 3e8  # FLOPs of a batch's forward from which on a second thread saves a fifth of a step: benchmarks/threads.py
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def find_device(name: str) -> torch.device:
    """The device of that name; "auto" is the first available of cuda, mps and cpu. Raises UsageError."""
    available = [kind for kind in ("cuda", "mps") if getattr(torch, kind).is_available()] + ["cpu"]
    if name == "auto":
        return torch.device(available[0])
    kind, _, index = name.partition(":")
    if kind not in available:
        advice = nearest(kind, available)
        raise UsageError(f"device '{name}' is not available; {advice}", code="unknown-device")
    if name != kind and index not in map(str, range(torch.cuda.device_count() if kind == "cuda" else 1)):
        raise UsageError(f"device '{name}' is not available; use '{kind}'", code="unknown-device")
    return torch.device(name)


def resolve_matmul(config: RunConfig, device: torch.device) -> str:
    """The run's `bf16_matmul`. "auto" is resolved by measurement where it matters: under bf16 on a CPU."""
    if config.bf16_matmul != "auto" or config.precision != "bf16" or device.type != "cpu":
        return config.bf16_matmul
    return next(name for name, dtype in PRECISIONS.items() if dtype == matmul_dtype(torch.bfloat16))


def resolve_threads(config: RunConfig, device: torch.device, model: nn.Module, score: Callable[[int], Any]) -> int:
    """The run's `threads`; unless they are given, PyTorch's own number, or 1 where a step has too little work for more.

    score: a forward of so many samples. FLOPs are counted, nothing is timed: the same command gives the same bits.
    """
    own = torch.get_num_threads()
    if config.threads or own == 1 or device.type != "cpu" or distributed():
        return config.threads or own
    return own if config.batch_size * forward_flops(model, lambda: score(1)).active >= ENOUGH else 1


@contextmanager
def precision(config: RunConfig, device: torch.device) -> Iterator[None]:
    """Run forwards in the body in the run's precision: that of the weights, or bf16 under autocast."""
    if config.precision == "fp64":
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)  # what whole numbers, such as pixels, become
        try:
            yield
        finally:
            torch.set_default_dtype(before)
        return
    if config.precision == "fp32":
        yield
        return
    work = PRECISIONS.get(config.bf16_matmul, torch.bfloat16)  # a GPU's run leaves "auto"
    with matmul_in(work), torch.autocast(device.type, torch.bfloat16):
        yield


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Make a GPU add sums in a fixed order, as a CPU does anyway."""
    before, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(before or device.type == "cuda", warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)


class StepTimer:
    """Measures training steps; on a CPU in thread time, which excludes other work on the machine."""

    def __init__(self, device: torch.device) -> None:
        self.on_cpu = device.type == "cpu"
        self.seconds: list[float] = []

    @contextmanager
    def step(self) -> Iterator[None]:
        """Measure the body; synchronizes with a GPU."""
        clock = time.thread_time if self.on_cpu else time.perf_counter
        started = clock()
        yield
        if not self.on_cpu:
            torch.accelerator.synchronize()
        self.seconds.append(clock() - started)

    def median(self) -> float | None:
        """The median time of a step in seconds, or None."""
        return statistics.median(self.seconds) if self.seconds else None
