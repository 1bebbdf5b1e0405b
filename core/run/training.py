"""A run: build everything, train, evaluate, write the folder."""

import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from functools import partial
from math import gcd
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
from ..errors import RunError, UsageError
from ..files import write_atomically
from ..parallel.launch import lost
from ..processes import agreed, any_rank, distributed, full_tensor, of_first, rank, threads, world_size
from ..seeds import generator, own_random_state
from .building import build_engine, build_model, build_task, check_layout, sizes_of
from .checkpoints import Checkpoints
from .config import RunConfig, config_toml
from .device import StepTimer, deterministic, find_device, resolve_matmul, resolve_threads
from .elastic import remember
from .failures import culprit_of, failing, write_reports
from .finite import FiniteCheck
from .folder import new_folder, read_run, record_file, write_summary
from .loop_state import LoopState
from .pace import Pace
from .records import Listener, RecordFile
from .sample import FILE as SAMPLE
from .sample import take_sample
from .scores import Scorer, ScoreSums
from .state import continue_from, newest_state, state_of
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


def _parted(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that share no memory, as a language model's embedding and head may: all but the first are copied."""
    seen: set[int] = set()
    parted = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        parted[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return parted


@attrs.define(eq=False)
class Training:
    """One run, from its configuration to its folder. Building it checks everything and writes nothing.

    out: the run's folder; with `resumed`, the folder of an earlier run, which continues from its newest checkpoint.
    listener: receives each record of metrics.jsonl as it is written. say: receives remarks. warn: receives those that
    no quietness may hide, such as on damage; `say`, unless given. stop: set it to stop
    after the present step. timed: measure each step, for `step_seconds`, which synchronizes a GPU at every step.
    dropped: metrics and reports that a resumed run leaves out. model: the task's; called: what training calls, which
    is the model or wraps it. On several ranks, each has a Training; the first one's owns the folder.
    """

    config: RunConfig
    settings: Settings
    out: Path | None = None
    resumed: bool = False
    listener: Listener = lambda record: None
    say: Callable[[str], None] = lambda remark: None
    warn: Callable[[str], None] = attrs.field(default=attrs.Factory(lambda self: self.say, takes_self=True))
    stop: bool = False
    timed: bool = False
    dropped: tuple[str, ...] = ()
    engine: Engine = attrs.field(init=False)
    task: Task = attrs.field(init=False)
    device: torch.device = attrs.field(init=False)
    model: nn.Module = attrs.field(init=False)
    called: nn.Module = attrs.field(init=False)
    optimizer: torch.optim.Optimizer = attrs.field(init=False)
    folder: Path = attrs.field(init=False)
    _scorer: Scorer = attrs.field(init=False)
    loop: LoopState = attrs.field(init=False)
    records: RecordFile = attrs.field(init=False)
    started: float = attrs.field(init=False, default=0.0)
    _timer: StepTimer = attrs.field(init=False)
    _pace: Pace = attrs.field(init=False)
    _finite: FiniteCheck = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.device = find_device(self.config.device)
        matmul = resolve_matmul(self.config, self.device)
        if not self.resumed:
            check_layout(self.config)
        self.config = config = attrs.evolve(self.config, device=str(self.device), bf16_matmul=matmul)
        self.engine = build_engine(config, self.settings)
        self.task = build_task(config, self.engine)
        self.model = build_model(config, self.engine, self.task, self.device)
        self.config = config = attrs.evolve(config, **sizes_of(config, self.engine))
        self._scorer = Scorer(config, self.task, self.model, self.device)
        self.loop = self._first_state()
        self._timer, self._pace = StepTimer(self.device), Pace(self.device)
        self.engine.check_learning(self._scorer.probe)
        self.config = attrs.evolve(config, threads=resolve_threads(config, self.device, self.model, self.score))

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.loop.step

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
        if distributed() and lost(error):  # it came up in whatever communicated next
            return None
        who = culprit_of(self.engine, error, self._scorer.probe)
        return who and f"{who} failed at step {self.step}: {type(error).__name__}: {error}"

    # -- the run -----------------------------------------------------------------------------------

    def run(self) -> Run:
        """Train, evaluate and write the folder. Raises RunError, Stopped or UsageError."""
        purpose = f"training on rank {rank()}" if rank() else "training"
        seed = generator(self.config.seed, purpose).initial_seed()  # of the global generators
        with own_random_state(seed), deterministic(self.device), threads(self.config.threads or 1):
            return self._run()

    def _run(self) -> Run:
        self.started, self.loop = time.monotonic(), self._first_state()
        self.engine.triggers.add_until(self.config.grow_until, self.total_steps, self.say)
        for name, remark in self.engine.plugins.remarks.items():
            self.say(f"{name}: {remark.why}; {remark.advice}")
        if self.task.note:
            self.say(self.task.note)
        with agreed("opening the run's folder", self.device), ExitStack() as stack:
            self.folder, self.records = _opened(self, stack)
            opened = stack.pop_all()
        self.folder = Path(of_first(str(self.folder)))
        with opened:
            tree = newest_state(self) if self.resumed else None
            if tree is not None:
                self.model.load_state_dict(tree["model"])
            self._spread()
            self.optimizer = adam(self.model, self.config.lr, self.config.weight_decay)
            self._finite = FiniteCheck(self.engine, self.model, self.optimizer, self.device)
            if tree is not None:
                continue_from(self, tree)
            with failing(self.engine):
                self._train()
                self._finish()
        if any_rank(self.stop, self.device):
            raise Stopped
        with agreed("writing the reports", self.device):
            if rank() == 0:
                write_reports(self.engine, self.folder)
        return read_run(self.folder)

    def _spread(self) -> None:
        """Spread the model over the ranks, if there are several."""
        self.called = self.model
        if distributed():
            from ..parallel.parallelize import expert_mesh, parallelize  # DTensor, which takes 2 s to import

            experts = gcd(self.config.expert_parallel, world_size())  # of a run that began on other ranks
            mesh = expert_mesh(experts, self.device.type)
            self.called = parallelize(self.engine, self.model, mesh, shard=self.config.parallel == "shard")

    def _first_state(self) -> LoopState:
        return LoopState(generator(self.config.seed, "data order"))

    def _train(self) -> None:
        loop, config = self.loop, self.config
        while loop.epoch <= config.epochs:
            self.model.train()
            for batch, weight in self._scorer.train_batches(loop.order, loop.batch, self.total_steps - loop.step):
                with self._timer.step() if self.timed else nullcontext():
                    loss = self._learn(batch, weight)
                if loop.step % config.log_every == 0 or loop.step == self.total_steps:
                    self._log()
                self._grow(loss)
                if loop.step % (config.eval_every or sys.maxsize) == 0 and loop.step < self.total_steps:
                    self._evaluate()
                    self.model.train()
                stop = any_rank(self.stop, self.device)
                if stop or loop.step % config.checkpoint_every == 0:
                    self._save()
                if stop:
                    raise Stopped
            if loop.step == self.total_steps:
                break
            if config.eval_every is None:
                self._evaluate()
            loop.next_epoch()

    def _learn(self, batch: Batch, weight: float) -> Tensor:
        """One step on this rank's part of a batch; returns the task's loss, of the whole batch."""
        self._pace.start()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step, self.total_steps)
        self.optimizer.zero_grad()
        score = self._scorer.score(batch, self.called)
        (weight * score["loss"] + self.engine.aux_loss()).backward()
        self.engine.after_backward()
        self.optimizer.step()
        self.engine.after_step()
        self._finite.after_step()
        self.loop.step, self.loop.batch = self.loop.step + 1, self.loop.batch + 1
        self._pace.add_step(world_size() * len(batch[0]) / weight if weight else 0)
        return self.loop.scores.add(score, batch, self.engine.last_terms())

    def _grow(self, loss: Tensor) -> None:
        """Grow as the triggers ask. A log point comes first, so each record has one number of experts."""
        growths = self.engine.due(loss, self.loop.eval_loss)
        self.loop.eval_loss = None
        if not growths:
            return
        if self.loop.scores:
            self._log()
        self.optimizer.zero_grad()
        for growth in growths:
            try:
                followers = [] if self.called is self.model else [self.called]
                grown = self.engine.grow(growth, self.optimizer, followers, self._scorer.probe)
            except UsageError as error:
                raise RunError(f"growth at step {self.step}: {error}", code="growth-failed") from error
            event = {"split": "growth", "step": self.step, "epoch": self.loop.epoch, "layers": {}}
            self.records.write({**event, "growth": plain(attrs.asdict(grown))})
        if self.called is not self.model:
            self._spread()

    def _log(self) -> None:
        """Write a record of the steps since the last log point."""
        self._pace.pause()
        scores, self.loop.scores = self.loop.scores, ScoreSums()
        self._finite.check(scores, self.step)
        layers = self.engine.metrics("train", self._scorer.probe)
        means = {**scores.means(), "learning_rate": self.optimizer.param_groups[0]["lr"]}
        self.records.write_metrics("train", self.step, self.loop.epoch, means, layers)

    def _evaluate(self, final: bool = False) -> None:
        """Measure on the test set; a final measurement is also the summary."""
        self._pace.pause()
        started = time.perf_counter()
        means = self._scorer.evaluate()
        self._pace.evaluate(len(self.task.test[0]), started)
        layers = self.engine.metrics("eval", self._scorer.probe)
        self.records.write_metrics("eval", self.step, self.loop.epoch, means, layers)
        if final:
            facts: dict[str, Any] = {"step": self.step, "seconds": self.seconds(), "means": means, "layers": layers}
            speed = self._pace.speed(self.task.tokens)
            facts |= {"speed": speed, "perplexity": self.task.perplexity}
            summary = summarize(self.config, self.engine, self.model, **facts)
            if rank() == 0:
                write_summary(self.folder, summary, self.records.sync())
        self.loop.eval_loss = means["loss"]
        if means["loss"] < self.loop.best:
            self.loop.best = means["loss"]
            self._finite.check_state(self.step)
            self.checkpoints.write_best(state_of(self))

    def _finish(self) -> None:
        """The last evaluation, the summary, the weights and a sample."""
        self._save()  # a run that is killed from here on has only this to do again
        self._evaluate(final=True)
        if self.config.record_routing:
            _record_routing(self)
        _write_weights(self)
        if not self.config.no_sample:
            _keep_sample(self)

    @property
    def checkpoints(self) -> Checkpoints:
        """The checkpoints in the run's folder."""
        return Checkpoints(self.folder / "checkpoints")

    def _save(self) -> None:
        self._pace.pause()
        self._finite.check(self.loop.scores, self.step)
        self._finite.check_state(self.step)
        self.checkpoints.write(self.step, state_of(self))

    def config_text(self) -> str:
        """The content of config.toml."""
        return config_toml(self.config, self.engine.plugins.options(), self.engine.plugins.records())

    def seconds(self) -> float:
        """Seconds since the run began, without those between a stop and a resume."""
        return round(time.monotonic() - self.started, 3)


def _opened(run: Training, stack: ExitStack) -> tuple[Path, RecordFile]:
    """Make or find the run's folder, and lock it; the first rank does, for all."""
    if rank():
        return run.out or Path(), RecordFile(stack.enter_context(tempfile.TemporaryFile()))
    folder = (run.out or Path()) if run.resumed else new_folder(run.out, run.config.task)
    file = stack.enter_context(record_file(folder, new=not run.resumed))
    if not run.resumed:
        remember(folder)
        write_atomically(folder / "config.toml", run.config_text().encode())
    return folder, RecordFile(file, folder / "metrics.jsonl", run.listener)


def _write_weights(run: Training) -> None:
    """Write model.safetensors."""
    tensors = {name: full_tensor(tensor).contiguous() for name, tensor in run.model.state_dict().items()}
    if rank() == 0:
        write_atomically(run.folder / "model.safetensors", safetensors.torch.save(_parted(tensors)))


def _keep_sample(run: Training) -> None:
    """Keep a sample of the test set, for reports; the first rank writes it."""
    sample = take_sample(run.engine, run._scorer)
    if sample is not None and rank() == 0:
        sample.write(run.folder / SAMPLE)


def _record_routing(run: Training) -> None:
    """Save the layers' routing of the test set."""
    about = {"task": run.config.task, "step": run.step, "split": "test", "versions": versions()}
    forwards = (partial(run._scorer.score, batch) for batch in run._scorer.test_batches(whole=True))
    trace = record(run.engine, forwards, about)
    if rank():
        return
    trace.write(run.folder / FILE)
    held = f"the first {trace.limit} tokens of each layer, not all" if trace.cut else "all tokens"
    run.say(f"routing of the test set: {run.folder / FILE} ({held})")
