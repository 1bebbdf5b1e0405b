"""Claims about tasks."""

import attrs
import torch
from torch import Tensor, nn

from ..contract.tasks import Batch, Task, TaskSpec
from ..contract.traits import trial_options_of
from ..engine.engine import Engine
from ..errors import PluginError, UsageError
from ..layer.moe import MoE
from ..layer.probing import evaluating, uncounted
from ..run.sample import shown
from ..run.training import adam
from .bench import DIM, HIDDEN, Bench
from .claims import NotApplicable, claim, demand
from .comparing import demand_finite, same_bits

ROWS = 32  # of a batch


@attrs.frozen
class TaskTrial:
    """A task with its model, and the engine that built the model's layers."""

    task: Task
    engine: Engine
    model: nn.Module

    def batch(self, rows: int = ROWS) -> Batch:
        """The first rows of the training data."""
        return tuple(column[:rows] for column in self.task.train)

    def score(self, rows: int = ROWS) -> dict[str, Tensor]:
        """The task's score of the first rows."""
        return dict(self.task.score(self.model, self.batch(rows)))


def _engine(bench: Bench) -> Engine:
    plugin = bench.plugin
    trial_options = trial_options_of(plugin.cls)
    try:
        given = dict(trial_options(bench.folder, DIM, HIDDEN)) if trial_options else {}
    except ImportError as error:
        raise NotApplicable(f"its trial needs {error.name}, which is not installed") from error
    given |= plugin.settings.get(plugin.name, {})
    settings = {**plugin.settings, **({plugin.name: given} if given else {})}
    return Engine(settings=settings, without=plugin.observers, task=plugin.name, experts=4)


def _task(bench: Bench, engine: Engine) -> Task:
    """The task. Raises NotApplicable if its data are missing."""
    (bound,) = engine.plugins.bind("moe_task")
    try:
        task: Task = engine.plugins.ask(bound, Task, {"spec": TaskSpec(bench.plugin.data_dir, seed=0)})
    except UsageError as error:
        if isinstance(error, PluginError) or "--data-dir" not in str(error):
            raise
        raise NotApplicable(f"its data are missing: {error}") from error
    return task


def _trial(bench: Bench) -> TaskTrial:
    engine = _engine(bench)
    task = _task(bench, engine)
    torch.default_generator.manual_seed(0)
    model = task.model(engine)
    engine.attach(model)
    return TaskTrial(task, engine, model)


@claim("moe_task")
def columns_match(bench: Bench) -> None:
    """Training and test data are non-empty columns of equal length, with the same shapes and dtypes."""
    task = _task(bench, _engine(bench))
    for name, columns in (("train", task.train), ("test", task.test)):
        tensors = isinstance(columns, tuple) and columns and all(isinstance(column, Tensor) for column in columns)
        demand(tensors, f"{name} is not a tuple of tensors; return one tensor for each column")
        lengths = [len(column) for column in columns]
        equal = min(lengths) == max(lengths) > 0
        demand(equal, f"the columns of {name} have {lengths} rows; give each the same number")
    rows = [[(column.dtype, column.shape[1:]) for column in columns] for columns in (task.train, task.test)]
    demand(rows[0] == rows[1], f"training rows are {rows[0]} and test rows {rows[1]}; use the same dtypes and shapes")


@claim("moe_task")
def same_seed_gives_same_data(bench: Bench) -> None:
    """The same seed gives the same data, whatever was drawn before."""
    first = _task(bench, _engine(bench))
    torch.default_generator.manual_seed(99)
    second = _task(bench, _engine(bench))
    for column, other in zip((*first.train, *first.test), (*second.train, *second.test), strict=True):
        equal = same_bits(column, other)
        demand(equal, "a column differs the second time; draw from moe_engine.generator(spec.seed, ...)")


@claim("moe_task")
def train_and_test_are_disjoint(bench: Bench) -> None:
    """Training and test rows do not overlap."""
    task = _task(bench, _engine(bench))
    trained, tested = set(_rows(task.train)), _rows(task.test)
    both = sum(row in trained for row in tested)
    demand(both <= 0.01 * len(tested), f"{both} of {len(tested)} test rows are training rows; split them")


def _rows(columns: Batch) -> list[bytes]:
    """The rows of the first column, the model's input."""
    return [row.tobytes() for row in columns[0].numpy()]


@claim("moe_task")
def model_uses_the_engine(bench: Bench) -> None:
    """The model has at least one MoE layer, and the given engine builds them all."""
    engine = _engine(bench)
    task = _task(bench, engine)
    model = task.model(engine)
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    demand(layers, "its model has no MoE layer; build one with engine.moe(dim, hidden)")
    foreign = [layer for layer in layers if layer not in engine.layers]
    demand(not foreign, "another engine built a layer; build all with the engine that model() is given")


@claim("moe_task")
def score_is_a_differentiable_mean(bench: Bench) -> None:
    """For any number of rows, score returns the mean loss, attached to the graph, and sums over the batch."""
    trial = _trial(bench)
    for rows in (ROWS, 3, 1):
        score = trial.score(rows)
        demand("loss" in score, f"score returns {sorted(score)}; 'loss' is missing")
        for name, value in score.items():
            scalar = isinstance(value, Tensor) and not value.dim()
            demand(scalar, f"'{name}' is not a scalar tensor; sum over the batch")
        demand_finite(score, f"for {rows} rows", "check the data, and what the model divides by")
        demand(score["loss"].requires_grad, "the loss has no graph; do not detach it")
        correct = score.get("correct")
        within = correct is None or 0 <= float(correct) <= rows
        demand(within, f"{correct} of {rows} rows are correct; count the rows that are right")
    batch = trial.batch(ROWS)
    doubled = tuple(torch.cat([column, column]) for column in batch)
    trial.model.eval()
    once, twice = (float(trial.task.score(trial.model, rows)["loss"]) for rows in (batch, doubled))
    equal = abs(once - twice) < 1e-3 * max(abs(once), 1)
    demand(equal, f"the loss is {once:.4g} for a batch and {twice:.4g} for the batch twice; take a mean")


@claim("moe_task")
def evaluation_is_deterministic(bench: Bench) -> None:
    """Scoring a batch twice in eval mode gives the same score."""
    trial = _trial(bench)
    trial.model.eval()
    with torch.no_grad():
        for name, value in trial.score().items():
            again = trial.score()[name]
            demand(same_bits(value, again), f"'{name}' differs the second time; draw no random numbers in eval mode")


@claim("moe_task")
def shows_what_its_layers_see(bench: Bench) -> None:
    """Of each row a task shows an image, or the texts of as many tokens as a layer sees, or nothing."""
    trial = _trial(bench)
    if trial.task.show is None:
        raise NotApplicable("it shows nothing; Task.show lets reports show its data")
    rows = torch.arange(min(ROWS, len(trial.task.test[0])))
    try:
        _, texts = shown(trial.task, rows)
    except UsageError as error:
        demand(False, str(error))
    if texts is None:
        return
    with torch.no_grad(), evaluating(trial.model), uncounted(trial.engine.layers):
        trial.task.score(trial.model, tuple(column[rows] for column in trial.task.test))
        seen = {len(routing.tokens.x) for layer in trial.engine.layers for routing in layer.watched or ()}
    told = {len(tokens) for tokens in texts}
    fits = len(told) == 1 and len(rows) * max(told) in seen
    demand(fits, f"it shows {sorted(told)} tokens of a row, of {len(rows)} rows whose layers see {sorted(seen)} in all")


@claim("moe_task")
def every_router_learns(bench: Bench) -> None:
    """The task's gradient reaches every layer and its router."""
    trial = _trial(bench)
    trial.model.eval()
    trial.engine.check_learning(lambda: trial.score()["loss"])
    trial.score()["loss"].backward()
    for layer in trial.engine.layers:
        tensors = (getattr(part, name) for _, part in layer.parts() for name in part.axes)  # of foreign blocks, too
        touched = any(one.grad is not None and bool(one.grad.any()) for one in (*tensors, *layer.parameters()))
        demand(touched, f"layer '{layer.name}' gets no gradient; call it in the model's forward, and detach nothing")


@claim("moe_task")
def model_learns(bench: Bench) -> None:
    """A few steps on one batch lower its loss."""
    trial = _trial(bench)
    optimizer = adam(trial.model, 0.003)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = trial.score()["loss"]
        (loss + trial.engine.aux_loss()).backward()
        trial.engine.after_backward()
        optimizer.step()
        trial.engine.after_step()
        losses.append(float(loss.detach()))
    seen = f"12 steps on one batch changed the loss from {losses[0]:.4g} to {losses[-1]:.4g}"
    demand(losses[-1] < losses[0], f"{seen}; check the loss and the targets")
