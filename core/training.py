"""A run: build everything, train, evaluate, write the folder."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from .engine import Engine, Metrics
from .errors import RunError, UsageError, listed, nearest
from .options import Settings
from .runs import Run, RunConfig, config_toml, dump, new_folder, read_run, write_atomically
from .stats import Finding, plain
from .tasks import Batch, Task, TaskSpec, generator

PROBE_SIZE = 128  # samples of the held-out batch on which effects are measured
EVAL_BATCH = 512
BALANCE = ("active", "load", "cv", "gini", "entropy", "max_min", "maxvio", "dropped")  # of each layer in summary.json

Listener = Callable[[dict[str, Any]], None]


def adam(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Adam, fused where it can be: one pass over each stacked weight and its moments."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda", "mps") for p in parameters)
    return torch.optim.Adam(parameters, lr=lr, fused=fused)


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
    """The run was asked to stop; its weights are saved."""


@attrs.define(eq=False)
class Training:
    """One run from its configuration to its folder. Building it checks everything and writes nothing.

    listener: gets each record of metrics.jsonl as it is written. stop: set it to end at the next step.
    """

    config: RunConfig
    settings: Settings
    out: Path | None = None
    listener: Listener = lambda record: None
    stop: bool = False
    step: int = attrs.field(default=0, init=False)
    engine: Engine = attrs.field(init=False)
    task: Task = attrs.field(init=False)
    device: torch.device = attrs.field(init=False)
    model: nn.Module = attrs.field(init=False)
    folder: Path = attrs.field(init=False)
    _log: Any = attrs.field(init=False, default=None)
    _started: float = attrs.field(init=False, default=0.0)

    def __attrs_post_init__(self) -> None:
        config = self.config
        self.device = find_device(config.device)
        shape = {"experts": config.experts, "top_k": config.top_k, "capacity": config.capacity}
        self.engine = Engine(config.plugins, self.settings, config.no_plugin, config.task, **shape)
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
            except Exception as error:
                raise UsageError(f"the model of task '{config.task}' can't be built: {error}") from error
        self.engine.attach(self.model)
        if not self.engine.layers:
            raise UsageError(f"the model of task '{config.task}' has no MoE layer")
        self.engine.check_learning(self._probe)

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.task.train[0].shape[0] // self.config.batch_size)

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.config.epochs

    # -- the run -----------------------------------------------------------------------------------

    def run(self) -> Run:
        """Train, evaluate and write the folder. Raises RunError, Stopped or UsageError."""
        with torch.random.fork_rng(devices=[]), _deterministic(self.device):
            torch.manual_seed(generator(self.config.seed, "training").initial_seed())  # what plugins and models draw
            return self._run()

    def _run(self) -> Run:
        self.folder = new_folder(self.out, self.config.task)
        resolved = attrs.evolve(self.config, device=str(self.device))
        text = config_toml(resolved, self.engine.plugins.options())
        write_atomically(self.folder / "config.toml", text.encode())
        self._started = time.monotonic()
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as self._log:
            self._train()
            self._evaluate(self.config.epochs, final=True)
        self._save_weights()
        if self.stop:
            raise Stopped
        run = read_run(self.folder)
        for bound in self.engine.plugins.bind("moe_report"):
            bound({"run": run})
        return run

    def _train(self) -> None:
        config, engine = self.config, self.engine
        optimizer = adam(self.model, config.lr)
        order = generator(config.seed, "data order")
        seen: list[Mapping[str, Tensor]] = []
        terms: list[Mapping[str, Tensor]] = []
        for epoch in range(1, config.epochs + 1):
            self.model.train()
            for batch in self._batches(order):
                optimizer.zero_grad(set_to_none=True)
                score = self.task.score(self.model, batch)
                (score["loss"] + engine.aux_loss()).backward()
                engine.after_backward()
                optimizer.step()
                engine.after_step()
                self.step += 1
                seen.append(_sums(score, batch))
                terms.append(engine.last_terms())
                if self.step % config.log_every == 0 or self.step == self.total_steps:
                    self._check_finite(seen, terms)
                    self._record("train", epoch, _means(seen), engine.metrics("train", self._probe))
                    seen, terms = [], []
                if self.stop:
                    self._save_weights()
                    raise Stopped
            if epoch < config.epochs:
                self._evaluate(epoch)

    def _batches(self, order: torch.Generator) -> Iterator[Batch]:
        rows = torch.randperm(self.task.train[0].shape[0], generator=order)
        for chosen in rows.split(min(self.config.batch_size, len(rows))):
            yield tuple(column.index_select(0, chosen).to(self.device) for column in self.task.train)

    def _evaluate(self, epoch: int, final: bool = False) -> None:
        self.model.eval()
        seen = []
        with torch.no_grad():
            for rows in torch.arange(self.task.test[0].shape[0]).split(EVAL_BATCH):
                batch = tuple(column.index_select(0, rows).to(self.device) for column in self.task.test)
                seen.append(_sums(self.task.score(self.model, batch), batch))
        means, layers = _means(seen), self.engine.metrics("eval", self._probe)
        self._record("eval", epoch, means, layers)
        if final:
            summary = self._summary(means, layers)
            write_atomically(self.folder / "summary.json", (dump(summary) + "\n").encode())

    def _probe(self) -> Tensor:
        """The task loss on a fixed held-out batch, in eval mode."""
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        batch = tuple(column[:PROBE_SIZE].to(self.device) for column in self.task.test)
        loss = self.task.score(self.model, batch)["loss"]
        for module in training:
            module.training = True
        return loss

    # -- what is written ---------------------------------------------------------------------------

    def _record(self, split: str, epoch: int, means: Mapping[str, float], layers: Mapping[str, Metrics]) -> None:
        record = {
            "split": split,
            "step": self.step,
            "epoch": epoch,
            "seconds": round(time.monotonic() - self._started, 3),
            **{name: plain(value) for name, value in means.items()},
            "layers": {
                layer: {name: plain(value) for name, value in metrics.items()} for layer, metrics in layers.items()
            },
        }
        self._log.write(dump(record) + "\n")
        self._log.flush()
        self.listener(record)

    def _summary(self, means: Mapping[str, float], layers: Mapping[str, Metrics]) -> dict[str, Any]:
        findings = [
            (finding.severity, {"layer": layer, "metric": name, **plain(finding)})
            for layer, metrics in layers.items()
            for name, finding in metrics.items()
            if isinstance(finding, Finding)
        ]
        findings.sort(key=lambda pair: (pair[1]["metric"] != "verdict", -pair[0]))
        verdicts = [finding["name"] for _, finding in findings if finding["metric"] == "verdict"]
        return {
            "task": self.config.task,
            "plugins": self.engine.plugins.records(),
            "versions": versions(),
            "seed": self.config.seed,
            "device": self.device.type,
            "steps": self.step,
            "seconds": round(time.monotonic() - self._started, 3),
            "loss": plain(means["loss"]),
            "accuracy": plain(means.get("accuracy")),
            "perplexity": plain(float(torch.tensor(means["loss"]).exp())) if self.task.perplexity else None,
            "verdict": verdicts[0] if verdicts else None,
            "findings": [finding for _, finding in findings],
            "layers": [_layer_summary(layer, layers.get(layer.name, {})) for layer in self.engine.layers],
        }

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

    def _save_weights(self) -> None:
        from safetensors.torch import save

        tensors = {name: tensor.contiguous() for name, tensor in self.model.state_dict().items()}
        write_atomically(self.folder / "model.safetensors", save(tensors))


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
    count = totals.pop("count")
    names = {"correct": "accuracy"}
    return {names.get(name, name): total / count for name, total in totals.items()}
