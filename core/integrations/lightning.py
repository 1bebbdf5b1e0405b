"""A callback for PyTorch Lightning: Trainer(callbacks=[MoECallback(engine)])."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from ..engine.engine import Engine
from . import EngineLoop


class MoECallback(Callback):
    """Adds the auxiliary loss to each backward, ends each step, grows, logs and saves.

    engine: the engine that built the module's layers. probe: a forward on a fixed batch, as in `Engine.metrics`.
    monitor: the logged value that triggers with on=eval watch. accumulate: in manual optimization, the number of
    micro-batches per step, by which the module divides its loss; automatic optimization knows it. Metrics are logged
    every `log_every_n_steps` steps as moe/LAYER/NAME, and after validation as eval_moe/LAYER/NAME. A checkpoint holds
    the engine's state, and loads into any number of experts. Growth under DistributedDataParallel is refused: the
    trainer would have to rebuild the wrapper.
    """

    def __init__(
        self,
        engine: Engine,
        probe: Callable[[], Tensor] | None = None,
        monitor: str = "val_loss",
        accumulate: int = 1,
    ) -> None:
        self.loop, self.monitor, self.accumulate = EngineLoop(engine, probe), monitor, accumulate
        self._steps, self._scale = 0, 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.loop.begin(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._steps, self._scale = trainer.global_step, _scale_of(trainer)
        if pl_module.automatic_optimization:
            pl_module.training_step = self._with_aux(pl_module.training_step)
        else:
            pl_module.manual_backward = self._manual_with_aux(pl_module.manual_backward)

    def _with_aux(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """A `training_step` whose loss has the auxiliary loss in it."""

        @wraps(step)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            result = step(*args, **kwargs)
            if isinstance(result, Tensor):
                return self.loop.add(result)
            return result if result is None else {**result, "loss": self.loop.add(result["loss"])}

        return training_step

    def _manual_with_aux(self, backward: Callable[..., None]) -> Callable[..., None]:
        """A `manual_backward` that adds the auxiliary loss."""

        @wraps(backward)
        def manual_backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            backward(self.loop.add(loss, 1 / self.accumulate), *args, **kwargs)

        return manual_backward

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _uncover(pl_module)
        self.loop.end(f"log '{self.monitor}' in validation_step, or name another value with monitor=")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        _uncover(pl_module)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.loop.engine.after_backward()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self._steps:
            return  # a micro-batch of an unfinished step
        self._steps = trainer.global_step
        before, self._scale = self._scale, _scale_of(trainer)
        self.loop.after_step(trainer.optimizers, skipped=self._scale < before)  # a GradScaler backs off only then
        if trainer.log_every_n_steps and self._steps % trainer.log_every_n_steps == 0:
            pl_module.log_dict(self.loop.metrics("train"), on_step=True, on_epoch=False)

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.loop.engine.metrics("eval")  # discards the sums of the sanity check

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            pl_module.log_dict(self.loop.metrics("eval"))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking and self.monitor in trainer.callback_metrics:
            self.loop.saw(float(trainer.callback_metrics[self.monitor]))

    def state_dict(self) -> dict[str, Any]:
        return {"engine": self.loop.engine.state_dict(), "eval_loss": self.loop.eval_loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.loop.engine.load_state_dict(state_dict["engine"])
        self.loop.eval_loss = state_dict["eval_loss"]


def _scale_of(trainer: Trainer) -> float:
    """The factor of the GradScaler; 0 without one."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 0.0 if scaler is None else float(scaler.get_scale())


def _uncover(module: LightningModule) -> None:
    """Remove what covers the class's methods."""
    for name in ("training_step", "manual_backward"):
        vars(module).pop(name, None)
