"""A run: build everything, train, evaluate, write the folder."""

import math
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import safetensors.torch
import torch
from torch import Tensor, nn

from ..contract.options import Settings
from ..contract.run import Run
from ..contract.stats import plain
from ..contract.tasks import Batch, Task
from ..engine.engine import Engine
from ..errors import RunError, UsageError, listed
from ..files import dump, write_atomically
from ..optimizer_state import restore
from ..seeds import generator, own_random_state, random_state, set_random_state
from .building import build_engine, build_model, build_task
from .checkpoints import Checkpoints
from .config import RunConfig, config_toml
from .device import StepTimer, deterministic, find_device, resolve_matmul
from .failures import culprit_of, write_reports
from .folder import new_folder, read_run, record_file
from .loop_state import LoopState
from .records import Listener, RecordFile
from .resuming import changes, check_resumable
from .scores import Scorer, ScoreSums
from .summary import summarize, versions
from .traces import FILE, record


def adam(model: nn.Module, lr: float, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    """AdamW, which without decay is Adam; fused if possible: one pass over each stacked weight and its moments."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    alike = len({getattr(p, "device_mesh", None) for p in parameters}) <= 1  # spread alike over ranks, if at all
    fused = alike and all(p.is_floating_point() and p.device.type in ("cpu", "cuda", "mps") for p in parameters)
    return torch.optim.AdamW(
        parameters, lr=lr, weight_decay=weight_decay, fused=fused, foreach=None if alike else False
    )


def learning_rate(config: RunConfig, step: int, total_steps: int) -> float:
    """The learning rate of a step; cosine: lr (1 + cos(pi step / steps)) / 2 (Loshchilov and Hutter, 2017)."""
    falls = config.lr_schedule == "cosine"
    return config.lr * (0.5 * (1 + math.cos(math.pi * step / total_steps)) if falls else 1)


class Stopped(Exception):
    """The run was told to stop, and has written a checkpoint."""


@attrs.define(eq=False)
class Training:
    """One run, from its configuration to its folder. Building it checks everything and writes nothing.

    out: the run's folder; with `resumed`, the folder of an earlier run, which continues from its newest checkpoint.
    listener: receives each record of metrics.jsonl as it is written. say: receives remarks. stop: set it to stop
    after the present step. timed: measure each step, for `step_seconds`, which synchronizes a GPU at every step.
    dropped: metrics and reports that a resumed run leaves out.
    """

    config: RunConfig
    settings: Settings
    out: Path | None = None
    resumed: bool = False
    listener: Listener = lambda record: None
    say: Callable[[str], None] = lambda remark: None
    stop: bool = False
    timed: bool = False
    dropped: tuple[str, ...] = ()
    engine: Engine = attrs.field(init=False)
    task: Task = attrs.field(init=False)
    device: torch.device = attrs.field(init=False)
    model: nn.Module = attrs.field(init=False)
    optimizer: torch.optim.Optimizer = attrs.field(init=False)
    folder: Path = attrs.field(init=False)
    _scorer: Scorer = attrs.field(init=False)
    _loop: LoopState = attrs.field(init=False)
    _records: RecordFile = attrs.field(init=False)
    _started: float = attrs.field(init=False, default=0.0)
    _timer: StepTimer = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.device = find_device(self.config.device)
        matmul = resolve_matmul(self.config, self.device)
        self.config = config = attrs.evolve(self.config, device=str(self.device), bf16_matmul=matmul)
        self.engine = build_engine(config, self.settings)
        self.task = build_task(config, self.engine)
        self.model = build_model(config, self.engine, self.task, self.device)
        self._scorer = Scorer(config, self.task, self.model, self.device)
        self._loop = self._first_state()
        self._timer = StepTimer(self.device)
        self.engine.check_learning(self._scorer.probe)

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self._loop.step

    @property
    def total_steps(self) -> int:
        """Number of optimizer steps in the whole run."""
        steps_per_epoch = -(-self.task.train[0].shape[0] // self.config.batch_size)
        return min(steps_per_epoch * self.config.epochs, self.config.steps or sys.maxsize)

    @property
    def step_seconds(self) -> float | None:
        """The median time of a step (forward, backward, optimizer, biases and states); None unless `timed`."""
        return self._timer.median()

    def score(self, count: int) -> Mapping[str, Tensor]:
        """The task's score of the first test samples, in eval mode."""
        return self._scorer.score_first(count)

    def culprit(self, error: BaseException) -> str | None:
        """A sentence on the plugin that an exception came from, or None."""
        who = culprit_of(self.engine, error, self._scorer.probe)
        return who and f"{who} failed at step {self.step}: {type(error).__name__}: {error}"

    # -- the run -----------------------------------------------------------------------------------

    def run(self) -> Run:
        """Train, evaluate and write the folder. Raises RunError, Stopped or UsageError."""
        seed = generator(self.config.seed, "training").initial_seed()  # of the global generators
        with own_random_state(seed), deterministic(self.device):
            return self._run()

    def _run(self) -> Run:
        self._begin()
        for name, remark in self.engine.plugins.remarks.items():
            self.say(f"{name}: {remark.why}; {remark.advice}")
        if self.resumed:
            assert self.out is not None
            self.folder = self.out
        else:
            self.folder = new_folder(self.out, self.config.task)
            write_atomically(self.folder / "config.toml", self._config_text().encode())
        with record_file(self.folder) as file:
            self._records = RecordFile(file, self.listener)
            if self.resumed:
                self._resume()
            self._train()
            self._finish()
        if self.stop:
            raise Stopped
        run = read_run(self.folder)
        write_reports(self.engine, run)
        return run

    def _first_state(self) -> LoopState:
        return LoopState(generator(self.config.seed, "data order"))

    def _begin(self) -> None:
        self._started = time.monotonic()
        self._loop = self._first_state()
        self.optimizer = adam(self.model, self.config.lr, self.config.weight_decay)

    def _train(self) -> None:
        loop, config = self._loop, self.config
        while loop.epoch <= config.epochs:
            self.model.train()
            for batch in self._scorer.train_batches(loop.order, loop.batch, self.total_steps - loop.step):
                with self._timer.step() if self.timed else nullcontext():
                    loss = self._learn(batch)
                if loop.step % config.log_every == 0 or loop.step == self.total_steps:
                    self._log()
                self._grow(loss)
                if loop.step % (config.eval_every or sys.maxsize) == 0 and loop.step < self.total_steps:
                    self._evaluate()
                    self.model.train()
                if self.stop or loop.step % config.checkpoint_every == 0:
                    self._save()
                if self.stop:
                    raise Stopped
            if loop.step == self.total_steps:
                break
            if config.eval_every is None:
                self._evaluate()
            loop.next_epoch()

    def _learn(self, batch: Batch) -> Tensor:
        """One step; returns the task's loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step, self.total_steps)
        self.optimizer.zero_grad()
        score = self._scorer.score(batch)
        (score["loss"] + self.engine.aux_loss()).backward()
        self.engine.after_backward()
        self.optimizer.step()
        self.engine.after_step()
        self._loop.step, self._loop.batch = self._loop.step + 1, self._loop.batch + 1
        self._loop.scores.add(score, batch, self.engine.last_terms())
        return score["loss"].detach()

    def _grow(self, loss: Tensor) -> None:
        """Grow as the triggers ask. A log point comes first, so each record has one number of experts."""
        growths = self.engine.due(loss, self._loop.eval_loss)
        self._loop.eval_loss = None
        if not growths:
            return
        if self._loop.scores:
            self._log()
        self.optimizer.zero_grad()
        for growth in growths:
            try:
                grown = self.engine.grow(growth, self.optimizer, probe=self._scorer.probe)
            except UsageError as error:
                raise RunError(f"growth at step {self.step}: {error}", code="growth-failed") from error
            event = {"split": "growth", "step": self.step, "epoch": self._loop.epoch, "layers": {}}
            self._records.write({**event, "growth": plain(attrs.asdict(grown))})

    def _log(self) -> None:
        """Write a record of the steps since the last log point."""
        scores, self._loop.scores = self._loop.scores, ScoreSums()
        scores.check_finite(self.step)
        layers = self.engine.metrics("train", self._scorer.probe)
        self._records.write_metrics("train", self.step, self._loop.epoch, scores.means(), layers)

    def _evaluate(self, final: bool = False) -> None:
        """Measure on the test set; a final measurement is also the summary."""
        means = self._scorer.evaluate()
        layers = self.engine.metrics("eval", self._scorer.probe)
        self._records.write_metrics("eval", self.step, self._loop.epoch, means, layers)
        if final:
            facts: dict[str, Any] = {"step": self.step, "seconds": self._seconds(), "means": means, "layers": layers}
            summary = summarize(self.config, self.engine, perplexity=self.task.perplexity, **facts)
            write_atomically(self.folder / "summary.json", (dump(summary) + "\n").encode())
        self._loop.eval_loss = means["loss"]
        if means["loss"] < self._loop.best:
            self._loop.best = means["loss"]
            self._checkpoints.write_best(self._state())

    def _finish(self) -> None:
        """The last evaluation, the summary and the weights."""
        self._save()  # a run that is killed from here on has only this to do again
        self._evaluate(final=True)
        if self.config.record_routing:
            self._record_routing()
        tensors = {name: tensor.contiguous() for name, tensor in self.model.state_dict().items()}
        write_atomically(self.folder / "model.safetensors", safetensors.torch.save(tensors))

    def _record_routing(self) -> None:
        """Save the layers' routing of the test set."""
        about = {"task": self.config.task, "step": self.step, "split": "test", "versions": versions()}
        forwards = (partial(self._scorer.score, batch) for batch in self._scorer.test_batches())
        trace = record(self.engine, forwards, about)
        trace.write(self.folder / FILE)
        held = f"the first {trace.limit} tokens of each layer, not all" if trace.cut else "all tokens"
        self.say(f"routing of the test set: {self.folder / FILE} ({held})")

    # -- checkpoints -------------------------------------------------------------------------------

    @property
    def _checkpoints(self) -> Checkpoints:
        return Checkpoints(self.folder / "checkpoints")

    def _save(self) -> None:
        self._checkpoints.write(self.step, self._state())

    def _state(self) -> dict[str, Any]:
        """The complete state of the run, from which it continues with identical results."""
        return {
            **self._made_with(),
            "config": self._config_text(),
            "seconds": self._seconds(),
            "records": self._records.sync(),
            "draws": random_state(),
            "loop": self._loop.state_dict(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "engine": self.engine.state_dict(),
        }

    def _resume(self) -> None:
        """Continue from the newest intact checkpoint; from the start if there is none."""
        tree = self._checkpoints.newest(self.say)
        if tree is None:
            self.say("there is no checkpoint to continue from; starting over")
            self._records.truncate(0)
            return
        check_resumable(self.folder, tree, self._config_text(), self._records.size(), self.dropped)
        if changed := changes(tree, self._made_with()):
            self.say(f"since the run began {listed(changed)} changed, so its metrics may differ from here on")
        self.model.load_state_dict(tree["model"])
        restore(self.optimizer, tree["optimizer"])
        self.engine.load_state_dict(tree["engine"])
        self._records.truncate(tree["records"])
        self._loop.load_state_dict(tree["loop"])
        self._started -= tree["seconds"]
        set_random_state(tree["draws"])
        self.say(f"continuing from step {self.step} of {self.total_steps}")

    def _made_with(self) -> dict[str, Any]:
        """The versions of libraries, and the distribution, version and source of each plugin."""
        plugins = self.engine.plugins
        return {"versions": versions(), "plugins": plugins.records(), "code": plugins.fingerprints()}

    def _config_text(self) -> str:
        return config_toml(self.config, self.engine.plugins.options(), self.engine.plugins.records())

    def _seconds(self) -> float:
        return round(time.monotonic() - self._started, 3)
