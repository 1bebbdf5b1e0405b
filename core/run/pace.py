"""How fast a run is: wall time of its steps and of its last evaluation."""

import time
from typing import Any

import attrs
import torch


@attrs.define
class Pace:
    """Wall seconds of this process's training steps and of its last evaluation, and the samples in them, of all ranks.

    Between steps the clock runs on, so that loading counts, until `pause`. What ran before a resume is not known.
    """

    device: torch.device
    steps: int = 0
    trained: float = 0.0
    seconds: float = 0.0
    evaluated: float = 0.0
    evaluation_seconds: float = 0.0
    _since: float | None = None

    def start(self) -> None:
        """A step begins."""
        if self._since is None:
            self._since = time.perf_counter()

    def pause(self) -> None:
        """Something other than training begins."""
        if self._since is not None:
            self._wait()
            self.seconds += time.perf_counter() - self._since
            self._since = None

    def add_step(self, samples: float) -> None:
        """A step has ended."""
        self.steps, self.trained = self.steps + 1, self.trained + samples

    def evaluate(self, samples: int, started: float) -> None:
        """An evaluation has ended. started: by `time.perf_counter`."""
        self._wait()
        self.evaluated, self.evaluation_seconds = samples, time.perf_counter() - started

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def speed(self, tokens: int = 1) -> dict[str, Any]:
        """Seconds of a step, and samples per second; or tokens, where a sample has so many."""
        speed: dict[str, Any] = {"unit": "tokens" if tokens > 1 else "samples"}
        if self.seconds:
            speed["step_seconds"] = self.seconds / self.steps
            speed["trained_per_second"] = tokens * self.trained / self.seconds
        if self.evaluation_seconds:
            speed["tested_per_second"] = tokens * self.evaluated / self.evaluation_seconds
        return speed
