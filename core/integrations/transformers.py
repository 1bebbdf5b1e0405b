"""A callback for transformers' Trainer: Trainer(..., callbacks=[MoECallback(engine)])."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..engine.engine import Engine
from ..run.checkpoints import load, save
from . import EngineLoop

FILE = "moe_engine.safetensors"  # in each of the trainer's checkpoints


class MoECallback(TrainerCallback):
    """Adds the auxiliary loss to the model's `loss`, ends each step, grows, logs and saves.

    engine: the engine that built the layers. probe: a forward on a fixed batch, as in `Engine.metrics`. The model
    returns its loss as `outputs.loss`, `outputs["loss"]` or `outputs[0]`, as the Trainer requires. Metrics go into
    `trainer.state.log_history`, and into the logs of the callbacks after this one, as moe/LAYER/NAME, those of an
    evaluation as eval_moe/LAYER/NAME. The Trainer's reporters come before this callback; to change that, reorder
    `trainer.callback_handler.callbacks`. A checkpoint holds the engine's state, and loads into any number of experts.
    Growth under DistributedDataParallel is refused: the trainer would have to rebuild the wrapper.
    """

    def __init__(self, engine: Engine, probe: Callable[[], Tensor] | None = None) -> None:
        self.loop = EngineLoop(engine, probe)
        self._hook: Any = None
        self._accumulated = 1

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        self.loop.engine.attach(model)
        self._accumulated = args.gradient_accumulation_steps
        self._hook = model.register_forward_hook(self._add, with_kwargs=True)
        if state.global_step:
            given = args.resume_from_checkpoint
            folder = Path(given) if isinstance(given, str) and Path(given).is_dir() else _folder(args, state)
            if (folder / FILE).exists():
                load(folder / FILE, engine=self.loop.engine)
            else:
                warnings.warn(
                    f"{folder} holds no {FILE}: the history of triggers and growths starts over", stacklevel=2
                )

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self._hook.remove()

    def _add(self, model: nn.Module, _: Any, kwargs: dict[str, Any], outputs: Any) -> Any:
        """A forward hook that adds the auxiliary loss to the outputs' loss."""
        if not model.training:
            return outputs
        # the Trainer does not divide a loss by the number of micro-batches if it is a mean over all their items
        share = 1 / self._accumulated if kwargs.get("num_items_in_batch") is not None else 1.0
        if isinstance(outputs, tuple):
            return (self.loop.add(outputs[0], share), *outputs[1:])
        if outputs.get("loss") is not None:
            outputs["loss"] = self.loop.add(outputs["loss"], share)
        return outputs

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        self.loop.engine.after_backward()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.loop.engine.after_backward()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any, **_: Any
    ) -> None:
        inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        self.loop.after_step([inner], skipped=bool(getattr(optimizer, "step_was_skipped", False)))

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **_: Any
    ) -> None:
        if not any(name.startswith("eval_") for name in logs):  # those of an evaluation come with on_evaluate
            self._log(state, logs, "train")

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: dict[str, float], **_: Any
    ) -> None:
        self.loop.eval_loss = metrics.get("eval_loss")
        self._log(state, metrics, "eval")

    def _log(self, state: TrainerState, logs: dict[str, float], split: str) -> None:
        metrics = self.loop.metrics(split)
        logs.update(metrics)
        if state.log_history:
            state.log_history[-1].update(metrics)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        save(_folder(args, state) / FILE, engine=self.loop.engine)


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
