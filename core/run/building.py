"""Build and check the engine, task and model of a run. Nothing is written here."""

from typing import Any

import torch
from torch import nn

from ..contract.options import Settings
from ..contract.routing import Spec
from ..contract.tasks import Task, TaskSpec
from ..engine.engine import Engine
from ..errors import UsageError, listed
from ..processes import world_size
from ..seeds import generator
from .config import RunConfig
from .sample import shown

# options of a run that shape layers
LAYER_OPTIONS = (
    *("dense", "experts", "top_k", "capacity", "eval_capacity", "capacity_per"),
    *("allow_no_gradient", "local_losses"),
)
SIZES = {"experts": "experts per layer", "top_k": "experts per token"}  # which a task's model may bring along


def check_layout(config: RunConfig) -> None:
    """Raise UsageError if a new run is to be spread in a way that these ranks can't."""
    ranks = world_size()
    if ranks == 1 and (config.parallel == "shard" or config.expert_parallel > 1):
        message = (
            "--parallel shard and --expert-parallel need several processes; start with: torchrun -m moe_engine run"
        )
        raise UsageError(message, code="one-process")
    if ranks % config.expert_parallel:
        message = f"--expert-parallel {config.expert_parallel} does not divide {ranks} processes; use a divisor"
        raise UsageError(message, code="bad-mesh")


def build_engine(config: RunConfig, settings: Settings) -> Engine:
    """The engine with the run's plugins. Raises UsageError."""
    given = {name: getattr(config, name) for name in LAYER_OPTIONS}
    layer_options = {name: value for name, value in given.items() if value is not None}
    engine = Engine(config.plugins, settings, config.no_plugin, config.task, config.seed, **layer_options)
    engine.check(_task_spec(config))
    _check_initializers(config, engine)
    return engine


def build_task(config: RunConfig, engine: Engine) -> Task:
    """The task, with its data. Raises UsageError."""
    for bound in engine.plugins.bind("moe_task"):
        if bound.plugin == config.task:
            task: Task = engine.plugins.ask(bound, Task, {"spec": _task_spec(config)})
            _check_show(config, engine, task)
            return task
    raise UsageError(f"task '{config.task}' is left out by --no-plugin, or does not implement moe_task", code="no-task")


def _check_show(config: RunConfig, engine: Engine, task: Task) -> None:
    """Raise UsageError for a task whose `show` can't be kept, which a run would else find out at its end."""
    if config.no_sample:
        return
    try:
        shown(task, torch.zeros(1, dtype=torch.long))
    except UsageError as error:
        raise UsageError(f"task '{config.task}': {error}", code="bad-show") from error
    except Exception as error:
        who = engine.culprit(error) or f"task '{config.task}'"
        message = f"{who} failed in Task.show: {type(error).__name__}: {error}; mend it, or run with --no-sample"
        raise UsageError(message, code="bad-show") from error


def build_model(config: RunConfig, engine: Engine, task: Task, device: torch.device) -> nn.Module:
    """The task's model on the device, with weights drawn from the run's seed and layers attached to the engine.

    Raises UsageError if it can't be built, or if the run's plugins have nothing to act on in it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(config.seed, "weights").initial_seed())
        try:
            model = task.model(engine).to(device)
            if config.precision == "fp64":
                model = model.double()
        except (UsageError, KeyboardInterrupt):
            raise
        except BaseException as error:
            who = engine.culprit(error) or f"task '{config.task}'"
            message = f"{who} failed while the model was built: {type(error).__name__}: {error}"
            raise UsageError(message, code="model-not-built") from error
    engine.attach(model)
    _check_sizes(config, engine)
    if not engine.layers and not config.dense:
        raise UsageError(f"the model of task '{config.task}' has no MoE layer", code="no-moe-layer")
    return model


def sizes_of(config: RunConfig, engine: Engine) -> dict[str, Any]:
    """The run's `experts` and `top_k`, from its layers where they are unset; None if those differ."""
    sizes: dict[str, Any] = {}
    for name in SIZES:
        found = {getattr(layer.spec, name) for layer in engine.layers} or {getattr(Spec(0, 0), name)}
        sizes[name] = getattr(config, name) or (found.pop() if len(found) == 1 else None)
    return sizes


def _task_spec(config: RunConfig) -> TaskSpec:
    return TaskSpec(config.data_dir, config.seed, config.batch_size, config.device)


def _check_sizes(config: RunConfig, engine: Engine) -> None:
    """Raise UsageError for a number of experts that no layer has, as a loaded model brings its own."""
    for name, what in SIZES.items():
        wanted = getattr(config, name)
        found = sorted({getattr(layer.spec, name) for layer in engine.layers})
        if wanted is not None and found and wanted not in found:
            flag = f"--{name.replace('_', '-')} {wanted}"
            message = f"{flag} has no effect: the model of task '{config.task}' has {listed(found)} {what}; remove it"
            raise UsageError(message, code="sizes-of-model")


def _check_initializers(config: RunConfig, engine: Engine) -> None:
    """Raise UsageError if an initializer was chosen but nothing can grow."""
    chosen = [name for name in config.plugins if name not in config.no_plugin]
    idle = [name for name in chosen if engine.plugins.found[name].kind == "initializer"]
    if idle and not engine.plugins.bind("moe_growth"):
        raise UsageError(
            f"initializer '{idle[0]}' has no effect: no plugin makes the layers grow; add a growth plugin",
            code="idle-initializer",
        )
