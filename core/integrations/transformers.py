"""A callback for transformers' Trainer: Trainer(..., callbacks=[MoECallback(engine)])."""

import sys
import warnings
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..engine.engine import Engine
from ..pretrained.adopted import adopted_blocks
from ..run.checkpoints import load, save
from . import EngineLoop

FILE = "moe_engine.safetensors"  # in each of the trainer's checkpoints


class MoECallback(TrainerCallback):
    """Adds the auxiliary loss to each backward, ends each step, grows, logs and saves.

    engine: the engine that built the layers. probe: a forward on a fixed batch, as in `Engine.metrics`. Each
    micro-batch gets its share of the auxiliary gradient, however the loss is computed and scaled and however many
    processes there are; the loss that the Trainer logs is the task's alone. Metrics go into
    `trainer.state.log_history`, and into the logs of the callbacks after this one, as moe/LAYER/NAME, those of an
    evaluation as eval_moe/LAYER/NAME. The Trainer's reporters come before this callback; to change that, reorder
    `trainer.callback_handler.callbacks`. A checkpoint holds the engine's state, and an adopted model's weights, and
    loads into any number of experts. Growth under DistributedDataParallel is refused: the trainer would have to rebuild
    the wrapper.
    """

    def __init__(self, engine: Engine, probe: Callable[[], Tensor] | None = None) -> None:
        self.loop = EngineLoop(engine, probe)
        self._release: Callable[[], None] = _nothing

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        self._release()  # an interrupted training did not
        self.loop.begin(model)
        self._release = self._join(_trainer_of(self))
        if state.global_step:
            given = args.resume_from_checkpoint
            folder = Path(given) if isinstance(given, str) and Path(given).is_dir() else _folder(args, state)
            if (folder / FILE).exists():
                load(folder / FILE, **self._saved(model))
            else:
                warnings.warn(
                    f"{folder} holds no {FILE}: the history of triggers and growths starts over", stacklevel=2
                )

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self._release()
        self._release = _nothing
        self.loop.end("set eval_strategy, and let the model return its loss")

    def _join(self, trainer: Trainer) -> Callable[[], None]:
        """Add the auxiliary loss to the trainer's backwards from here on; returns what undoes that.

        Only there is the loss final: divided by the micro-batches of this window, or by the items of all processes and
        multiplied by their number, or computed outside the model. A GradScaler comes later, and scales both.
        """
        accelerator: Any = trainer.accelerator
        backward = accelerator.backward

        @wraps(backward)
        def with_aux(loss: Tensor, **kwargs: Any) -> None:
            backward(self.loop.add(loss, 1 / trainer.current_gradient_accumulation_steps), **kwargs)
            self.loop.engine.after_backward()

        def release() -> None:
            if vars(accelerator).get("backward") is with_aux:
                accelerator.backward = backward

        accelerator.backward = with_aux
        return release

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
        if "eval_loss" in metrics:
            self.loop.saw(metrics["eval_loss"])
        self._log(state, metrics, "eval")

    def _log(self, state: TrainerState, logs: dict[str, float], split: str) -> None:
        metrics = self.loop.metrics(split)
        logs.update(metrics)
        if state.log_history:
            state.log_history[-1].update(metrics)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        save(_folder(args, state) / FILE, **self._saved(model))

    def _saved(self, model: nn.Module) -> dict[str, Any]:
        """What a checkpoint holds next to the trainer's own files, by name.

        An adopted model too: the trainer writes it in the names of the architecture's checkpoints, which it does not
        find again when it resumes (transformers 5.24).
        """
        return {"engine": self.loop.engine} | ({"model": model} if adopted_blocks(model) else {})


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


def _nothing() -> None:
    """There is nothing to undo."""


def _trainer_of(callback: TrainerCallback) -> Trainer:
    """The trainer that is calling this callback, which is not among a callback's arguments."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        trainer = frame.f_locals.get("self")
        if isinstance(trainer, Trainer) and callback in trainer.callback_handler.callbacks:
            return trainer
    raise RuntimeError("MoECallback works in a transformers.Trainer: Trainer(..., callbacks=[MoECallback(engine)])")
