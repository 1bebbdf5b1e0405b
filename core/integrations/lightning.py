"""A callback for PyTorch Lightning: Trainer(callbacks=[MoECallback(engine)])."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from ..engine.engine import Engine
from . import EngineLoop


class MoECallback(Callback):
    """Adds the auxiliary loss to the loss of `training_step`, ends each step, grows, logs and saves.

    engine: the engine that built the module's layers. probe: a forward on a fixed batch, as in `Engine.metrics`.
    monitor: the logged value that triggers with on=eval watch. Works with automatic optimization. Metrics are logged
    every `log_every_n_steps` steps as moe/LAYER/NAME, and after validation as eval_moe/LAYER/NAME. A checkpoint holds
    the engine's state, and loads into any number of experts. Growth under DistributedDataParallel is refused: the
    trainer would have to rebuild the wrapper.
    """

    def __init__(self, engine: Engine, probe: Callable[[], Tensor] | None = None, monitor: str = "val_loss") -> None:
        self.loop, self.monitor = EngineLoop(engine, probe), monitor
        self._steps, self._scale = 0, 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.loop.engine.attach(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._steps = trainer.global_step
        step = pl_module.training_step

        @wraps(step)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            result = step(*args, **kwargs)
            if isinstance(result, Tensor):
                return self.loop.add(result)
            return result if result is None else {**result, "loss": self.loop.add(result["loss"])}

        pl_module.training_step = training_step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        del pl_module.training_step  # uncovers the class's method

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        pl_module.__dict__.pop("training_step", None)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.loop.engine.after_backward()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self._steps:
            return  # a micro-batch of an unfinished step
        self._steps = trainer.global_step
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        before, self._scale = self._scale, 0.0 if scaler is None else scaler.get_scale()
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
            self.loop.eval_loss = float(trainer.callback_metrics[self.monitor])

    def state_dict(self) -> dict[str, Any]:
        return {"engine": self.loop.engine.state_dict(), "eval_loss": self.loop.eval_loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.loop.engine.load_state_dict(state_dict["engine"])
        self.loop.eval_loss = state_dict["eval_loss"]
