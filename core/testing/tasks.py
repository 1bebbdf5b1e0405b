"""Claims about tasks."""

import attrs
import torch
from torch import Tensor, nn

from ..contract.tasks import Batch, Task, TaskSpec
from ..engine.engine import Engine
from ..errors import PluginError, UsageError
from ..layer.moe import MoE
from ..run.training import adam
from .bench import Bench
from .claims import NotApplicable, claim, demand
from .comparing import finite, same_bits

ROWS = 32  # of a batch


@attrs.frozen
class Trial:
    """A task with its model, and the engine that the model's layers are of."""

    task: Task
    engine: Engine
    model: nn.Module

    def batch(self, rows: int = ROWS) -> Batch:
        """The first rows for training."""
        return tuple(column[:rows] for column in self.task.train)

    def score(self, rows: int = ROWS) -> dict[str, Tensor]:
        """What the task says of the first rows."""
        return dict(self.task.score(self.model, self.batch(rows)))


def _engine(bench: Bench) -> Engine:
    subject = bench.subject
    return Engine(settings=subject.settings, without=subject.costly, task=subject.name, experts=4)


def _task(bench: Bench, engine: Engine) -> Task:
    """The task's data, if they are here."""
    (bound,) = engine.plugins.bind("moe_task")
    try:
        task: Task = engine.plugins.ask(bound, Task, {"spec": TaskSpec(bench.subject.data_dir, seed=0)})
    except UsageError as error:
        if isinstance(error, PluginError) or "--data-dir" not in str(error):
            raise
        raise NotApplicable(f"its data are not here: {error}") from error
    return task


def _trial(bench: Bench) -> Trial:
    engine = _engine(bench)
    task = _task(bench, engine)
    torch.manual_seed(0)
    model = task.model(engine)
    engine.attach(model)
    return Trial(task, engine, model)


@claim("moe_task")
def columns_fit(bench: Bench) -> None:
    """Training and test data are columns of equal length, alike in shape, and not empty."""
    task = _task(bench, _engine(bench))
    for name, columns in (("train", task.train), ("test", task.test)):
        tensors = isinstance(columns, tuple) and columns and all(isinstance(one, Tensor) for one in columns)
        demand(tensors, f"{name} is no tuple of tensors; answer one tensor for each column")
        lengths = [len(column) for column in columns]
        demand(
            min(lengths) == max(lengths) > 0, f"the columns of {name} have {lengths} rows; give each the same number"
        )
    kinds = [[(one.dtype, one.shape[1:]) for one in columns] for columns in (task.train, task.test)]
    demand(kinds[0] == kinds[1], f"rows are {kinds[0]} for training and {kinds[1]} for testing; make them alike")


@claim("moe_task")
def same_seed_same_data(bench: Bench) -> None:
    """The same seed gives the same data, whatever has been drawn before."""
    first = _task(bench, _engine(bench))
    torch.manual_seed(99)
    second = _task(bench, _engine(bench))
    for one, other in zip((*first.train, *first.test), (*second.train, *second.test), strict=True):
        demand(same_bits(one, other), "a column differs; draw from moe_engine.seeds.generator(spec.seed, ...)")


@claim("moe_task")
def nothing_is_tested_that_was_trained_on(bench: Bench) -> None:
    """Rows for testing are none of those for training."""
    task = _task(bench, _engine(bench))
    known, rows = set(_rows(task.train)), _rows(task.test)
    shared = sum(row in known for row in rows)
    demand(shared <= 0.01 * len(rows), f"{shared} of {len(rows)} rows for testing are also for training; part them")


def _rows(columns: Batch) -> list[bytes]:
    """Each row of the first column, which is what a model sees."""
    return [row.tobytes() for row in columns[0].numpy()]


@claim("moe_task")
def its_model_has_layers_of_the_engine(bench: Bench) -> None:
    """Its model has at least one MoE layer, and every one is built by the engine that it is given."""
    engine = _engine(bench)
    task = _task(bench, engine)
    model = task.model(engine)
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    demand(layers, "its model has no MoE layer; build one with engine.moe(dim, hidden)")
    strangers = [layer for layer in layers if layer not in engine.layers]
    demand(not strangers, "a layer is of another engine; build all with the engine that model() is given")


@claim("moe_task")
def score_is_a_mean_with_a_graph(bench: Bench) -> None:
    """score answers the mean loss with its graph, and sums over the batch, of any number of rows."""
    trial = _trial(bench)
    for rows in (ROWS, 3, 1):
        score = trial.score(rows)
        demand("loss" in score, f"score answers {sorted(score)}; 'loss' is missing")
        for name, value in score.items():
            demand(isinstance(value, Tensor) and not value.dim(), f"'{name}' is no scalar tensor; sum over the batch")
        finite(score, f"for {rows} rows", "check the data, and what the model divides by")
        demand(score["loss"].requires_grad, "the loss has no graph; do not detach it")
        right = score.get("correct")
        within = right is None or 0 <= float(right) <= rows
        demand(within, f"{right} of {rows} rows are correct; count rows that are right")
    double = trial.batch(ROWS)
    doubled = tuple(torch.cat([column, column]) for column in double)
    trial.model.eval()
    once, twice = (float(trial.task.score(trial.model, one)["loss"]) for one in (double, doubled))
    demand(
        abs(once - twice) < 1e-3 * max(abs(once), 1),
        f"the loss is {once:.4g}, of the batch twice {twice:.4g}; take a mean",
    )


@claim("moe_task")
def evaluation_repeats(bench: Bench) -> None:
    """Scored twice in evaluation, a batch has the same score."""
    trial = _trial(bench)
    trial.model.eval()
    with torch.no_grad():
        for name, value in trial.score().items():
            again = trial.score()[name]
            demand(same_bits(value, again), f"'{name}' is another one the second time; draw nothing in eval")


@claim("moe_task")
def every_router_learns(bench: Bench) -> None:
    """The task's gradient reaches every layer, and its router, so that it can learn."""
    trial = _trial(bench)
    trial.model.eval()
    trial.engine.check_learning(lambda: trial.score()["loss"])
    trial.score()["loss"].backward()
    for layer in trial.engine.layers:
        touched = any(p.grad is not None and bool(p.grad.any()) for p in layer.parameters())
        demand(touched, f"layer '{layer.name}' gets no gradient; call it in the model's forward, and detach nothing")


@claim("moe_task")
def its_model_learns(bench: Bench) -> None:
    """A few steps on one batch bring its loss down."""
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
    fell = losses[-1] < losses[0]
    demand(
        fell, f"12 steps on one batch took the loss from {losses[0]:.4g} to {losses[-1]:.4g}; check loss and targets"
    )
