"""What a trigger of growth sees."""

from collections.abc import Sequence

import attrs
import torch
from torch import Tensor

from .growth import Grown
from .layer import MoE


@attrs.frozen
class History:
    """A run so far, after an optimizer step; the same in every process.

    step: optimizer steps. loss: the task's of this step. eval_loss: of an evaluation since the last
    step, or None. layers: the layers. growths: what has grown, oldest first.
    """

    step: int
    loss: float
    eval_loss: float | None
    layers: Sequence[MoE]
    growths: Sequence[Grown]

    @property
    def since_growth(self) -> int:
        """Steps since anything grew, whichever trigger wanted it, or since the start."""
        return self.step - max((one.step for one in self.growths), default=0)

    def load(self, layer: MoE) -> Tensor:
        """[E]: assignments of real tokens to each expert since the layer grew last, over all processes."""
        return torch.zeros(layer.spec.experts) if layer.recent is None else layer.recent

    def busiest(self, layer: MoE) -> int:
        """The expert with the largest load since the layer grew last; 0 where there is no load yet."""
        return int(self.load(layer).argmax())
