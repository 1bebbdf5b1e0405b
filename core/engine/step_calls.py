"""The calls around a training step: a wrong order is an error, a step that never ends a warning."""

import warnings
import weakref
from collections.abc import Sequence

import attrs
from torch.nn.parallel import DistributedDataParallel

from ..layer.moe import MoE
from ..optimizer_state import live

MANY_BACKWARDS = 1000  # more than any step has on purpose


@attrs.define(eq=False)
class StepCalls:
    """The calls so far. anchored: `aux_loss()` was part of a backward of this step."""

    anchored: bool = False
    _closed: bool = True  # after_backward() followed the last backward
    _backwards: int = 0  # of this step
    _parallels: list[weakref.ref[DistributedDataParallel]] | None = None  # those with the layers, once looked for

    def begin_backward(self) -> None:
        """A backward has reached the auxiliary loss."""
        self.anchored, self._closed = True, False

    def end_backward(self) -> None:
        """`after_backward()` was called. Warns when no step has ended for very long."""
        self._closed, self._backwards = True, self._backwards + 1
        if self._backwards == MANY_BACKWARDS:
            warnings.warn(
                f"{MANY_BACKWARDS} backwards without engine.after_step(): no bias, state or trigger has acted; "
                "call it once after each optimizer.step()",
                stacklevel=3,
            )

    def refuse_join(self, layers: Sequence[MoE]) -> None:
        """Raise RuntimeError if the layers are in a model under `Join`, in which a rank without data calls no engine.

        Looking for such models takes a while, so it happens in the first step after a start or a growth.
        """
        if self._parallels is None:
            mine = {id(layer) for layer in layers}
            live_ones = live(DistributedDataParallel)
            holding = [one for one in live_ones if any(id(module) in mine for module in one.modules())]
            self._parallels = [weakref.ref(one) for one in holding]
        for parallel in filter(None, (ref() for ref in self._parallels)):
            if parallel._join_config.enable:
                raise RuntimeError(
                    "a model with MoE layers can't train under torch.distributed.algorithms.Join: a rank that has run "
                    "out of data would miss engine.after_step(), and the others would wait for it; give all ranks the "
                    "same number of batches, for example with DistributedSampler"
                )

    def forget_models(self) -> None:
        """A growth: DistributedDataParallel is rebuilt."""
        self._parallels = None

    def end_step(self, layers: Sequence[MoE], counted: Sequence[MoE]) -> None:
        """`after_step()` was called. counted: the layers that backwards of this step have reached.

        Raises RuntimeError if `aux_loss()` was not part of a backward, or `after_backward()` was not called.
        """
        if any(layer.losses for layer in counted) and not self.anchored:
            raise RuntimeError("engine.aux_loss() was not added to a loss: use (loss + engine.aux_loss()).backward()")
        if self.anchored and layers and not counted:
            raise RuntimeError("engine.aux_loss() is part of a loss, but no layer is: call engine.attach(model)")
        if not self._closed:
            raise RuntimeError("call engine.after_backward() after each backward, before engine.after_step()")
        self.anchored, self._backwards = False, 0
