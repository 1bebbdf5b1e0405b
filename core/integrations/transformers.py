"""Layers inside transformers' Trainer: Trainer(..., callbacks=[MoECallback(engine)])."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..engine.engine import Engine
from ..run.checkpoints import load, save
from . import Loop

FILE = "moe_engine.safetensors"  # in each of the trainer's checkpoints


class MoECallback(TrainerCallback):
    """Adds the auxiliary loss to the model's `loss`, closes each step, grows, logs and saves.

    engine: the one that built the model's layers. probe: a forward on a fixed batch, as in
    `Engine.metrics`. The model answers its loss as `outputs.loss`, `outputs["loss"]` or `outputs[0]`, as
    every model does that the Trainer can train. Metrics join `trainer.state.log_history`, and the logs of
    the callbacks after this one, as moe/LAYER/NAME, and those of an evaluation as eval_moe/LAYER/NAME. The
    Trainer's own reporters come before; `trainer.callback_handler.callbacks` is the list to reorder. A
    checkpoint holds the engine's state, and loads at any number of experts. Growth under
    DistributedDataParallel is refused: the trainer would have to build it anew.
    """

    def __init__(self, engine: Engine, probe: Callable[[], Tensor] | None = None) -> None:
        self.loop = Loop(engine, probe)
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
                warnings.warn(f"{folder} holds no {FILE}: triggers and growths begin anew", stacklevel=2)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self._hook.remove()

    def _add(self, model: nn.Module, _: Any, kwargs: dict[str, Any], outputs: Any) -> Any:
        """A forward hook: put the auxiliary loss into the outputs."""
        if not model.training:
            return outputs
        # a loss that is divided by the items of all micro-batches is not divided by their number again
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
            self._tell(state, logs, "train")

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: dict[str, float], **_: Any
    ) -> None:
        self.loop.eval_loss = metrics.get("eval_loss")
        self._tell(state, metrics, "eval")

    def _tell(self, state: TrainerState, logs: dict[str, float], split: str) -> None:
        numbers = self.loop.numbers(split)
        logs.update(numbers)
        if state.log_history:
            state.log_history[-1].update(numbers)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        save(_folder(args, state) / FILE, engine=self.loop.engine)


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
