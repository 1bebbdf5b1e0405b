"""A run: build everything, train, evaluate, write the folder."""

import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import attrs
import safetensors.torch
import torch
from torch import Tensor, nn

from ..contract.options import Settings
from ..contract.run import Run
from ..contract.stats import Finding, Metrics, plain
from ..contract.tasks import Batch, Task, TaskSpec
from ..engine.engine import Engine
from ..errors import RunError, UsageError, listed, nearest
from ..files import dump, write_atomically
from ..layer.fused_cpu import matmul_dtype, matmul_in
from ..layer.probing import evaluating
from ..optimizer_state import restore
from ..seeds import generator, own_random_state, random_state, set_random_state
from .checkpoints import Checkpoints
from .config import RunConfig, config_toml
from .folder import new_folder, read_run, record_file
from .traces import FILE, record

PROBE_SIZE = 128  # samples of the held-out batch on which effects are measured
EVAL_BATCH = 512
BALANCE = ("active", "load", "cv", "gini", "entropy", "max_min", "maxvio", "dropped")  # of each layer in summary.json
SHAPE = ("dense", "experts", "top_k", "capacity", "allow_no_gradient")  # what the engine is told of the layers

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}

# what the loop itself must remember to go on, beside model, optimizer and engine
LOOP = ("step", "epoch", "batch", "best", "_epoch_order", "_seen", "_terms", "_eval_loss")

Listener = Callable[[dict[str, Any]], None]


def adam(model: nn.Module, lr: float, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    """AdamW, which without decay is Adam; fused where it can be: one pass over each stacked weight and its moments."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda", "mps") for p in parameters)
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=fused)


def find_device(name: str) -> torch.device:
    """The device of that name; "auto" is the first of cuda, mps and cpu that there is. Raises UsageError."""
    there = [kind for kind in ("cuda", "mps") if getattr(torch, kind).is_available()] + ["cpu"]
    if name == "auto":
        return torch.device(there[0])
    kind, _, index = name.partition(":")
    if kind not in there:
        raise UsageError(f"there is no device '{name}' here; {nearest(kind, there)}")
    if name != kind and index not in map(str, range(torch.cuda.device_count() if kind == "cuda" else 1)):
        raise UsageError(f"there is no device '{name}' here; leave the number away")
    return torch.device(name)


def products(config: RunConfig, device: torch.device) -> str:
    """In what the run multiplies bf16, measured for "auto" where it is asked: in bf16 on a CPU."""
    if config.bf16_matmul != "auto" or config.precision == "fp32" or device.type != "cpu":
        return config.bf16_matmul
    return next(name for name, dtype in PRECISIONS.items() if dtype == matmul_dtype(torch.bfloat16))


@contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """On a GPU sums are added up in any order unless torch is told not to; the CPU keeps its order."""
    before, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(before or device.type == "cuda", warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)


class Stopped(Exception):
    """The run was asked to stop; a checkpoint is written."""


@attrs.define(eq=False)
class Training:
    """One run from its configuration to its folder. Building it checks everything and writes nothing.

    out: the run's folder; with `resumed`, that of a run which was begun, and goes on from its newest
    checkpoint. listener: gets each record of metrics.jsonl as it is written. say: gets remarks.
    stop: set it to end at the next step. timed: measure each step, for `step_seconds`; a GPU is waited for.
    """

    config: RunConfig
    settings: Settings
    out: Path | None = None
    resumed: bool = False
    listener: Listener = lambda record: None
    say: Callable[[str], None] = lambda remark: None
    stop: bool = False
    timed: bool = False
    step: int = attrs.field(default=0, init=False)
    epoch: int = attrs.field(default=1, init=False)
    batch: int = attrs.field(default=0, init=False)  # batches of this epoch that are done
    best: float = attrs.field(default=math.inf, init=False)  # the lowest test loss
    engine: Engine = attrs.field(init=False)
    task: Task = attrs.field(init=False)
    device: torch.device = attrs.field(init=False)
    model: nn.Module = attrs.field(init=False)
    optimizer: torch.optim.Optimizer = attrs.field(init=False)
    folder: Path = attrs.field(init=False)
    _order: torch.Generator = attrs.field(init=False)
    _epoch_order: Tensor = attrs.field(init=False)  # the state of `_order` when this epoch began
    _seen: list[Mapping[str, Tensor]] = attrs.field(factory=list, init=False)  # scores since the last log point
    _terms: list[Mapping[str, Tensor]] = attrs.field(factory=list, init=False)
    _eval_loss: float | None = attrs.field(default=None, init=False)  # of an evaluation that no trigger saw yet
    _log: IO[bytes] = attrs.field(init=False)
    _started: float = attrs.field(init=False, default=0.0)
    _times: list[float] = attrs.field(factory=list, init=False)  # seconds of each step, where it is timed

    def __attrs_post_init__(self) -> None:
        config = self.config
        self.device = find_device(config.device)
        halves = products(config, self.device)
        self.config = config = attrs.evolve(config, device=str(self.device), bf16_matmul=halves)
        shape = {name: getattr(config, name) for name in SHAPE}
        self.engine = Engine(config.plugins, self.settings, config.no_plugin, config.task, config.seed, **shape)
        spec = TaskSpec(config.data_dir, config.seed)
        self.engine.check(spec)
        bounds = [one for one in self.engine.plugins.bind("moe_task") if one.plugin == config.task]
        if not bounds:
            raise UsageError(f"task '{config.task}' is left out by --no-plugin, or implements no moe_task")
        self.task = self.engine.plugins.ask(bounds[0], Task, {"spec": spec})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator(config.seed, "weights").initial_seed())
            try:
                self.model = self.task.model(self.engine).to(self.device)
            except UsageError:
                raise
            except (Exception, SystemExit) as error:
                raise UsageError(f"the model of task '{config.task}' can't be built: {error}") from error
        self.engine.attach(self.model)
        kinds = {name: self.engine.plugins.found[name].kind for name in config.plugins if name not in config.no_plugin}
        if not self.engine.plugins.bind("moe_growth") and "initializer" in kinds.values():
            idle = next(name for name, kind in kinds.items() if kind == "initializer")
            raise UsageError(
                f"initializer '{idle}' acts on nothing: no plugin makes the layers grow; add a growth plugin"
            )
        if not self.engine.layers and not config.dense:
            raise UsageError(f"the model of task '{config.task}' has no MoE layer")
        self.engine.check_learning(self._probe)

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.task.train[0].shape[0] // self.config.batch_size)

    @property
    def total_steps(self) -> int:
        return min(self.steps_per_epoch * self.config.epochs, self.config.steps or sys.maxsize)

    # -- the run -----------------------------------------------------------------------------------

    def run(self) -> Run:
        """Train, evaluate and write the folder. Raises RunError, Stopped or UsageError."""
        seed = generator(self.config.seed, "training").initial_seed()  # what plugins and models draw
        with own_random_state(seed), _deterministic(self.device):
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
        with record_file(self.folder) as self._log:
            if self.resumed:
                self._restore()
            self._train()
            self._finish()
        if self.stop:
            raise Stopped
        run = read_run(self.folder)
        for bound in self.engine.plugins.bind("moe_report"):
            bound({"run": run})
        return run

    def _config_text(self) -> str:
        return config_toml(self.config, self.engine.plugins.options())

    def _begin(self) -> None:
        self._started = time.monotonic()
        self.step, self.epoch, self.batch = 0, 1, 0
        self.optimizer = adam(self.model, self.config.lr, self.config.weight_decay)
        self._order = generator(self.config.seed, "data order")
        self._epoch_order = self._order.get_state()

    def _train(self) -> None:
        for epoch in range(self.epoch, self.config.epochs + 1):
            self.epoch = epoch
            self.model.train()
            for batch in self._batches():
                loss = (self._timed_learn if self.timed else self._learn)(batch)
                if self.step % self.config.log_every == 0 or self.step == self.total_steps:
                    self._log_window()
                self._grow(loss)
                if self.step % (self.config.eval_every or sys.maxsize) == 0 and self.step < self.total_steps:
                    self._evaluate()
                    self.model.train()
                if self.stop or self.step % self.config.checkpoint_every == 0:
                    self._save()
                if self.stop:
                    raise Stopped
            if self.step == self.total_steps:
                break
            if self.config.eval_every is None:
                self._evaluate()
            self.epoch, self.batch, self._epoch_order = epoch + 1, 0, self._order.get_state()

    def _learn(self, batch: Batch) -> Tensor:
        """One step; answers the task's loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr()
        self.optimizer.zero_grad()
        score = self._score(batch)
        (score["loss"] + self.engine.aux_loss()).backward()
        self.engine.after_backward()
        self.optimizer.step()
        self.engine.after_step()
        self.step, self.batch = self.step + 1, self.batch + 1
        self._seen.append(_sums(score, batch))
        self._terms.append(self.engine.last_terms())
        return score["loss"].detach()

    def _score(self, batch: Batch) -> Mapping[str, Tensor]:
        """A forward in the run's precision."""
        if self.config.precision == "fp32":
            return self.task.score(self.model, batch)
        work = PRECISIONS.get(self.config.bf16_matmul, torch.bfloat16)  # a GPU's run leaves "auto"
        with matmul_in(work), torch.autocast(self.device.type, torch.bfloat16):
            return self.task.score(self.model, batch)

    def _lr(self) -> float:
        """The learning rate of this step; cosine: lr (1 + cos(pi step / steps)) / 2 (Loshchilov and Hutter, 2017)."""
        falls = self.config.lr_schedule == "cosine"
        return self.config.lr * (0.5 * (1 + math.cos(math.pi * self.step / self.total_steps)) if falls else 1)

    def _timed_learn(self, batch: Batch) -> Tensor:
        """One step and its time: on a CPU the thread's own, so that what else runs on the machine takes no part."""
        on_cpu = self.device.type == "cpu"
        clock = time.thread_time if on_cpu else time.perf_counter
        started = clock()
        loss = self._learn(batch)
        if not on_cpu:
            torch.accelerator.synchronize()
        self._times.append(clock() - started)
        return loss

    @property
    def step_seconds(self) -> float | None:
        """The median time of a step: forward, backward, optimizer, controllers. None if it was not `timed`."""
        return statistics.median(self._times) if self._times else None

    def culprit(self, error: BaseException) -> str | None:
        """A sentence on the plugin out of which an exception came, or None."""
        who = self.engine.plugins.culprit(error)
        return who and f"{who} failed at step {self.step}: {type(error).__name__}: {error}"

    def _grow(self, loss: Tensor) -> None:
        """Do what the triggers want, with a log point before: a window is of one number of experts."""
        wanted = self.engine.due(loss, self._eval_loss)
        self._eval_loss = None
        if not wanted:
            return
        if self._seen:
            self._log_window()
        self.optimizer.zero_grad()
        for growth in wanted:
            try:
                grown = self.engine.grow(growth, self.optimizer, probe=self._probe)
            except UsageError as error:
                raise RunError(f"growth at step {self.step}: {error}") from error
            event = {"split": "growth", "step": self.step, "epoch": self.epoch, "layers": {}}
            self._write({**event, "growth": plain(attrs.asdict(grown))})

    def _finish(self) -> None:
        """The last evaluation, the summary and the weights."""
        self._save()  # a run that is killed from here on has only this to do again
        self._evaluate(final=True)
        if self.config.record_routing:
            self._record_routing()
        tensors = {name: tensor.contiguous() for name, tensor in self.model.state_dict().items()}
        write_atomically(self.folder / "model.safetensors", safetensors.torch.save(tensors))

    # -- stopping and going on -------------------------------------------------------------------------

    def _save(self) -> None:
        self._checkpoints.write(self.step, self._state())

    def _state(self) -> dict[str, Any]:
        """All that the run needs to go on as if it had never stopped."""
        self._log.flush()
        os.fsync(self._log.fileno())
        return {
            "versions": versions(),
            "plugins": self.engine.plugins.records(),
            "config": self._config_text(),
            "seconds": self._seconds(),
            "records": os.fstat(self._log.fileno()).st_size,
            "draws": random_state(),
            "loop": {name: getattr(self, name) for name in LOOP},
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "engine": self.engine.state_dict(),
        }

    def _restore(self) -> None:
        """Go on from the newest checkpoint that is whole; from the start if there is none."""
        tree = self._checkpoints.newest(self.say)
        if tree is None:
            self.say("there is no checkpoint to go on from; beginning anew")
            self._log.truncate(0)
            return
        if tree["config"] != self._config_text():
            begun = "begin another one with: moe-engine run --config"
            raise UsageError(
                f"{self.folder / 'config.toml'} was changed since the run was begun; undo that, or {begun}"
            )
        if self._log.seek(0, os.SEEK_END) < tree["records"]:
            raise UsageError(f"{self.folder / 'metrics.jsonl'} is damaged: it is shorter than its checkpoint says")
        if (tree["versions"], tree["plugins"]) != (versions(), self.engine.plugins.records()):
            self.say("the run was begun with other versions, so its numbers may differ from here on")
        self.model.load_state_dict(tree["model"])
        restore(self.optimizer, tree["optimizer"])
        self.engine.load_state_dict(tree["engine"])
        self._log.truncate(tree["records"])
        for name, value in tree["loop"].items():
            setattr(self, name, value)
        self._order.set_state(self._epoch_order)
        self._started -= tree["seconds"]
        set_random_state(tree["draws"])
        self.say(f"going on from step {self.step} of {self.total_steps}")

    @property
    def _checkpoints(self) -> Checkpoints:
        return Checkpoints(self.folder / "checkpoints")

    def _seconds(self) -> float:
        return round(time.monotonic() - self._started, 3)

    # -- the data ------------------------------------------------------------------------------------

    def _batches(self) -> Iterator[Batch]:
        """The batches of this epoch that are still to come."""
        count = self.task.train[0].shape[0]
        rows = torch.arange(count) if self.task.ordered else torch.randperm(count, generator=self._order)
        todo = slice(self.batch, self.batch + self.total_steps - self.step)
        for chosen in rows.split(min(self.config.batch_size, count))[todo]:
            batch = tuple(column.index_select(0, chosen).to(self.device) for column in self.task.train)
            yield self.task.augment(batch) if self.task.augment else batch

    def _evaluate(self, final: bool = False) -> None:
        """Measure on the test set."""
        self.model.eval()
        measures = self.task.measures().to(self.device) if self.task.measures else None
        seen = []
        with torch.no_grad():
            for batch in self._test_batches():
                score = dict(self._score(batch))
                predicted, true = score.pop("predicted", None), score.pop("true", None)
                if measures is not None:
                    measures.update(predicted, true)
                seen.append(_sums(score, batch))
        means, layers = _means(seen), self.engine.metrics("eval", self._probe)
        if measures is not None:
            means |= {name: float(value) for name, value in measures.compute().items()}
        self._record("eval", self.epoch, means, layers)
        if final:
            summary = self._summary(means, layers)
            write_atomically(self.folder / "summary.json", (dump(summary) + "\n").encode())
        self._eval_loss = means["loss"]
        if means["loss"] < self.best:
            self.best = means["loss"]
            self._checkpoints.write_best(self._state())

    def _test_batches(self) -> Iterator[Batch]:
        for rows in torch.arange(self.task.test[0].shape[0]).split(EVAL_BATCH):
            yield tuple(column.index_select(0, rows).to(self.device) for column in self.task.test)

    def _record_routing(self) -> None:
        """Save what the layers choose on the test set."""
        about = {"task": self.config.task, "step": self.step, "split": "test", "versions": versions()}
        forwards = (partial(self._score, batch) for batch in self._test_batches())
        trace = record(self.engine, forwards, about)
        trace.write(self.folder / FILE)
        held = f"the first {trace.limit} tokens of each layer, not all" if trace.cut else "all tokens"
        self.say(f"routing of the test set: {self.folder / FILE} ({held})")

    def _probe(self) -> Tensor:
        """The task loss on a fixed held-out batch, in eval mode."""
        return self.score(PROBE_SIZE)["loss"]

    def score(self, count: int) -> Mapping[str, Tensor]:
        """What the task says of the first test samples, in eval mode."""
        batch = tuple(column[:count].to(self.device) for column in self.task.test)
        with evaluating(self.model):
            return self._score(batch)

    # -- what is written ---------------------------------------------------------------------------

    def _log_window(self) -> None:
        """A record of the steps since the last log point."""
        self._check_finite(self._seen, self._terms)
        self._record("train", self.epoch, _means(self._seen), self.engine.metrics("train", self._probe))
        self._seen, self._terms = [], []

    def _record(self, split: str, epoch: int, means: Mapping[str, float], layers: Mapping[str, Metrics]) -> None:
        numbers = {layer: {name: plain(value) for name, value in own.items()} for layer, own in layers.items()}
        head = {"split": split, "step": self.step, "epoch": epoch}
        self._write({**head, **{name: plain(value) for name, value in means.items()}, "layers": numbers})

    def _write(self, record: dict[str, Any]) -> None:
        self._log.write((dump(record) + "\n").encode())
        self._log.flush()
        self.listener(record)

    def _summary(self, means: Mapping[str, float], layers: Mapping[str, Metrics]) -> dict[str, Any]:
        findings = [
            (finding.severity, {"layer": layer, "metric": name, **plain(finding)})
            for layer, metrics in layers.items()
            for name, finding in metrics.items()
            if isinstance(finding, Finding)
        ]
        findings += [
            (one.severity, {"layer": "all layers", "metric": f"remark.{name}", **plain(one)})
            for name, one in self.engine.plugins.remarks.items()
        ]
        findings += [(1, one) for one in self._idle_triggers()]
        findings.sort(key=lambda pair: (pair[1]["metric"] != "verdict", -pair[0]))
        verdicts = [finding["name"] for _, finding in findings if finding["metric"] == "verdict"]
        return {
            "task": self.config.task,
            "plugins": self.engine.plugins.records(),
            "versions": versions(),
            "seed": self.config.seed,
            "device": self.device.type,
            "steps": self.step,
            "seconds": self._seconds(),
            "loss": plain(means["loss"]),
            "accuracy": plain(means.get("accuracy")),
            "perplexity": plain(float(torch.tensor(means["loss"]).exp())) if self.task.perplexity else None,
            "measures": {name: plain(value) for name, value in means.items() if name not in ("loss", "accuracy")},
            "verdict": verdicts[0] if verdicts else None,
            "findings": [finding for _, finding in findings],
            "layers": [_layer_summary(layer, layers.get(layer.name, {})) for layer in self.engine.layers],
            "growths": [plain(attrs.asdict(grown)) for grown in self.engine.growths],
        }

    def _idle_triggers(self) -> list[dict[str, Any]]:
        """A finding for each trigger that let nothing grow."""
        acted = {grown.why.partition(":")[0] for grown in self.engine.growths}
        idle = [bound.plugin for bound in self.engine.triggers.bounds if bound.plugin not in acted]
        return [
            {
                "layer": "all layers",
                "metric": f"inert.{name}",
                "name": "no effect",
                "severity": 1,
                "why": f"{name} let nothing grow in {self.step} steps",
                "advice": f"run longer, or let it act earlier: moe-engine plugins {name} lists its options",
            }
            for name in idle
        ]

    def _check_finite(self, seen: list[Mapping[str, Tensor]], terms: list[Mapping[str, Tensor]]) -> None:
        """Raise RunError for the first step whose loss, or a term of it, was not finite."""
        values = {"the task loss": torch.stack([sums["loss"] for sums in seen])}
        values |= {f"the loss term {name}": torch.cat([step[name] for step in terms]) for name in terms[0]}
        bad = {name: (~value.isfinite()).nonzero().flatten().tolist() for name, value in values.items()}
        first = min((steps[0] for steps in bad.values() if steps), default=None)
        if first is not None:
            names = listed(name for name, steps in bad.items() if first in steps)
            step = self.step - len(seen) + first + 1
            raise RunError(f"{names} stopped being finite at step {step}; lower --lr, or a loss's weight")


def versions() -> dict[str, str]:
    """What a run was computed with."""
    names = ("moe-engine", "torch", "numpy")
    return {"python": sys.version.split()[0], **{name: metadata.version(name) for name in names}}


def _layer_summary(layer: Any, metrics: Metrics) -> dict[str, Any]:
    """The numbers that every layer has, null where no plugin answers them, then every other number."""
    measured = {name: plain(metrics.get(name)) for name in BALANCE}
    others = {name: plain(value) for name, value in metrics.items() if name not in BALANCE}
    numbers = {name: value for name, value in others.items() if value is None or isinstance(value, int | float)}
    return {"name": layer.name, "experts": layer.spec.experts, "top_k": layer.spec.top_k, **measured, **numbers}


def _sums(score: Mapping[str, Tensor], batch: Batch) -> dict[str, Tensor]:
    """A batch's score as sums that stay on the device."""
    count = batch[0].shape[0]
    sums = {name: value.detach() for name, value in score.items()}
    return {**sums, "loss": sums["loss"] * count, "count": torch.tensor(float(count))}


def _means(seen: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    totals = {name: float(torch.stack([sums[name] for sums in seen]).cpu().double().sum()) for name in seen[0]}
    own = {name: totals.pop(f"count.{name}") for name in [*totals] if f"count.{name}" in totals}
    count = totals.pop("count")
    names = {"correct": "accuracy"}
    return {names.get(name, name): total / own.get(name, count) for name, total in totals.items() if own.get(name, 1)}
