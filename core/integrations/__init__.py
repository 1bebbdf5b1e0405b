"""Callbacks for third-party training loops: PyTorch Lightning and transformers' Trainer.

`moe_engine.integrations.lightning` and `moe_engine.integrations.transformers` each hold a `MoECallback`; this module
holds what they share. Each needs its library: pip install "moe-engine[lightning]" or "[transformers]".
"""

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..engine.engine import Engine
from ..errors import listed


class EngineLoop:
    """The engine's work in a training loop: the auxiliary loss, the end of a step, growth, and metrics to log.

    probe: as in `Engine.metrics`.
    """

    def __init__(self, engine: Engine, probe: Callable[[], Tensor] | None = None) -> None:
        self.engine, self.probe = engine, probe
        self.eval_loss: float | None = None  # of an evaluation that no trigger has seen yet
        self.evaluated = False  # some evaluation's loss was reported
        self._losses: list[Tensor] = []  # of this step's micro-batches
        self._unlogged: dict[str, float] = {}  # metrics of the steps before a growth that are not logged yet

    def begin(self, model: nn.Module) -> None:
        """Take over the model's layers. Warns if it has none, so that the engine's plugins could never act."""
        self.engine.attach(model)
        if not self.engine.layers:
            plugins = self.engine.plugins
            acting = listed(f"'{name}'" for name in plugins.active if name in plugins.chosen) or "the engine"
            warnings.warn(
                f"{type(model).__name__} has no layer of this engine, so {acting} can't act on it: build its layers "
                "with engine.moe(...)",
                stacklevel=3,
            )

    def end(self, advice: str) -> None:
        """Warn of triggers that wait for the loss of an evaluation if there was none. advice: how to report one."""
        waiting = self.engine.triggers.watching
        if waiting and not self.evaluated:
            names = listed(f"'{name}'" for name in sorted(waiting))
            warnings.warn(f"no evaluation's loss was reported, which {names} waits for: {advice}", stacklevel=3)

    def saw(self, eval_loss: float) -> None:
        """An evaluation's loss, for the triggers to see after the next step."""
        self.eval_loss, self.evaluated = eval_loss, True

    def add(self, loss: Tensor, share: float = 1.0) -> Tensor:
        """A micro-batch's loss plus its share of the auxiliary loss, if there is a gradient.

        share: the micro-batch's share of the step, 1 / number of micro-batches, by which the loop has already scaled
        the loss.
        """
        if not (torch.is_grad_enabled() and loss.requires_grad):
            return loss
        self._losses.append(loss.detach() / share)
        return loss + share * self.engine.aux_loss()

    def after_step(
        self, optimizers: Iterable[Optimizer], followers: Iterable[nn.Module] = (), skipped: bool = False
    ) -> None:
        """End a step: update biases and states, and grow layers if a trigger asks for it."""
        self.engine.after_step(skipped)
        losses, self._losses = self._losses, []
        if skipped or not losses:
            return
        growths = self.engine.due(torch.stack(losses).mean(), self.eval_loss)
        self.eval_loss = None
        if not growths:
            return
        self._unlogged = self.metrics("train")
        for optimizer in optimizers:
            optimizer.zero_grad()
        for growth in growths:
            self.engine.grow(growth, optimizers, followers, self.probe)

    def metrics(self, split: str) -> dict[str, float]:
        """Every metric that is a number, as "moe/LAYER/NAME", or "eval_moe/LAYER/NAME"."""
        prefix, found = ("moe", self._unlogged) if split == "train" else (f"{split}_moe", {})
        if split == "train":
            self._unlogged = {}
        for layer, metrics in self.engine.metrics(split, self.probe).items():
            for name, value in metrics.items():
                number = _number(value)
                if number is not None:
                    found[f"{prefix}/{layer}/{name}"] = number
        return found


def _number(value: Any) -> float | None:
    """A metric as a float, or None if it is not a number."""
    if isinstance(value, Tensor) and value.dim() == 0:
        value = value.item()
    return float(value) if isinstance(value, int | float) else None
