"""The state of a run's training loop, apart from the model, the optimizer and the engine."""

import math
from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from .scores import ScoreSums

PLAIN = ("step", "epoch", "batch", "best", "epoch_order", "eval_loss")


@attrs.define(eq=False)
class LoopState:
    """The position and sums of the training loop.

    step: optimizer steps done. epoch: counted from 1. batch: batches done in this epoch. best: the lowest test loss.
    order: the generator of each epoch's row order. epoch_order: the state of `order` when this epoch began. scores:
    those of the steps since the last log point. eval_loss: the loss of an evaluation that no trigger has seen yet.
    """

    order: torch.Generator
    step: int = 0
    epoch: int = 1
    batch: int = 0
    best: float = math.inf
    epoch_order: Tensor = attrs.field(init=False)
    scores: ScoreSums = attrs.field(factory=ScoreSums)
    eval_loss: float | None = None

    def __attrs_post_init__(self) -> None:
        self.epoch_order = self.order.get_state()

    def next_epoch(self) -> None:
        """Begin the next epoch."""
        self.epoch, self.batch, self.epoch_order = self.epoch + 1, 0, self.order.get_state()

    def state_dict(self) -> dict[str, Any]:
        """The state, as a tree for a checkpoint."""
        state = {name: getattr(self, name) for name in PLAIN}
        return {**state, "sums": self.scores.sums, "terms": self.scores.terms}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for name in PLAIN:
            setattr(self, name, state[name])
        self.scores = ScoreSums(list(state["sums"]), list(state["terms"]))
        self.order.set_state(self.epoch_order)
