"""Faults of initializers, triggers, metrics, reports and tasks."""

import attrs
import torch
from faults import fault
from torch import nn
from torch.nn import functional as F

from moe_engine import Growth, NewExpert, Task, hookimpl, option

# -- initializers --------------------------------------------------------------------------------------


@fault("newcomers_fit", says="what is drawn goes .to(row.dtype)", hook="moe_new_expert")
def draws_in_fp32(self, fresh, generator):
    """Random rows of the default precision."""
    return NewExpert({name: torch.randn(row.shape, generator=generator) for name, row in fresh.items()})


@fault("given_rows_stay", says="is not what it was; write row + d and not row += d", bugs=(9,), hook="moe_new_expert")
def writes_into_fresh(self, fresh, roles):
    """Zero output, in place."""
    return NewExpert({name: row.zero_() if roles[name] == "output" else row for name, row in fresh.items()})


@fault("draws_from_its_generator", says="pass generator=generator to every draw", hook="moe_new_expert")
def draws_from_anywhere(self, fresh):
    """Whatever torch has."""
    return NewExpert({name: row + 0.01 * torch.randn_like(row) for name, row in fresh.items()})


@fault(
    "siblings_are_no_twins", says="a newcomer is the very copy of another newcomer", bugs=(28,), hook="moe_new_expert"
)
def copies_exactly(self, parent, fresh):
    """A copy without noise."""
    return NewExpert(fresh if parent is None else parent)


# -- triggers -------------------------------------------------------------------------------------


@attrs.define(eq=False)
class Slow:
    """Wants one expert more from time to time."""

    max_experts: int = option(9, help="a layer stops at this many experts", min=1)

    def due(self, history, memory):
        return history.step % 60 == 0

    def parents(self, history, layer):
        return (history.busiest(layer),)

    @hookimpl
    def moe_growth(self, history, memory):
        if not self.due(history, memory):
            return None
        return [
            Growth(layer.name, parents=self.parents(history, layer))
            for layer in history.layers
            if layer.spec.experts < self.max_experts
        ]


@fault("wishes_can_be_granted", says="has no expert 99", hook=None)
class NamesNobody(Slow):
    """A parent that does not exist."""

    def parents(self, history, layer):
        return (99,)


@fault("same_history_same_wishes", "resumed_run_decides_alike", says="keep what it remembers in memory", bugs=(19,))
class CountsForAll(Slow):
    """One count for all runs of a process."""

    asked = 0

    def due(self, history, memory):
        type(self).asked += 1
        return self.asked % 70 == 0


@fault("resumed_run_decides_alike", says="keep what it remembers in memory or in a state Part", bugs=(29,))
class CountsOnItself(Slow):
    """A count that no checkpoint holds."""

    asked: int = 0

    def due(self, history, memory):
        self.asked += 1
        return self.asked % 70 == 0


@fault("limit_is_kept", says="with max_experts=7 the layer has 8 experts; count those to come too", bugs=(29,))
class GrowsByTwo(Slow):
    """A limit that is looked at before, not after."""

    def parents(self, history, layer):
        return (0, 1)


# -- metrics --------------------------------------------------------------------------------------


@fault("every_load_has_an_answer", says="it raises ZeroDivisionError", bugs=(24,), hook="moe_metrics")
def divides_by_the_smallest(self, stats):
    """Max over min, of Python's numbers."""
    return {"spread": float(stats.load.max()) / float(stats.load.min())}


@fault("stats_stay", says="stats['load'] is not what it was; write a / b and not a /= b", bugs=(9,), hook="moe_metrics")
def normalises_in_place(self, stats):
    """The load of everybody else is a share from now on."""
    share_E = stats.load
    share_E /= share_E.sum()
    return {"share": share_E}


@fault(
    *("answers_do_not_depend_on_order", "memory_survives_a_checkpoint"),
    says="keep what it remembers in memory, which is of one layer and one split",
    bugs=(19, 24),
)
class MixesSplits:
    """The change since it was last asked, whatever about."""

    last: object = None

    @hookimpl
    def moe_metrics(self, stats):
        load_E = stats.load / stats.load.sum()
        same = self.last is not None and self.last.shape == load_E.shape
        change = float((load_E - self.last).abs().sum()) if same else 0.0
        self.last = load_E
        return {"change": change}


@fault("memory_survives_a_checkpoint", says="keep what it remembers in memory, which is saved")
class ForgetsOnResume:
    """Remembers each split, but on itself."""

    last: dict = attrs.field(factory=dict)

    @hookimpl
    def moe_metrics(self, stats, layer):
        key = (layer.name, "loss.none" in stats.sums or "forwards" in stats.sums)
        before, self.last[key] = self.last.get(key, 0.0), float(stats.load[0])
        return {"before": before}


@fault("measuring_draws_nothing", says="draw from one of its own", hook="moe_metrics")
def bootstraps(self, stats):
    """Resampled with the run's own generator."""
    chosen = torch.randint(len(stats.load), (len(stats.load),))
    return {"resampled": stats.load[chosen].mean()}


# -- reports --------------------------------------------------------------------------------------


@fault("files_are_what_it_says", says="and does not say so; answer the name of every file", hook="moe_report")
def keeps_quiet(self, run):
    """Writes two files and names one."""
    for name in ("a.txt", "b.txt"):
        (run.folder / name).write_text("text")
    return ["a.txt"]


@fault("files_are_what_it_says", says="outside of the run's folder; write into run.folder only", hook="moe_report")
def strays(self, run):
    """Writes beside the run."""
    (run.folder / "a.txt").write_text("text")
    (run.folder.parent / "b.txt").write_text("text")
    return ["a.txt"]


@fault("it_can_be_written_again", says="it raises FileExistsError", hook="moe_report")
def writes_once(self, run):
    """A folder that must not be there."""
    (run.folder / "own").mkdir()
    (run.folder / "own" / "a.txt").write_text("text")
    return ["own/a.txt"]


@fault("missing_numbers_are_no_error", says="it raises TypeError", bugs=(25,), hook="moe_report")
def needs_accuracy(self, run):
    """There is always an accuracy."""
    (run.folder / "a.txt").write_text(str(round(run.summary["accuracy"] * 100)))
    return ["a.txt"]


# -- tasks ----------------------------------------------------------------------------------------


class Net(nn.Module):
    """One MoE layer between two linear ones."""

    def __init__(self, engine):
        super().__init__()
        self.enter, self.moe, self.leave = nn.Linear(6, 8), engine.moe(8, 8), nn.Linear(8, 3)

    def through(self, x):
        return self.moe(x)

    def forward(self, x):
        x = self.enter(x)
        return self.leave(x + self.through(x))


class Points:
    """Points of three classes."""

    def draw(self, count, seed):
        random = torch.Generator().manual_seed(seed)
        x = torch.randn(count, 6, generator=random)
        return x, x[:, :3].argmax(-1)

    def data(self):
        return self.draw(200, 1), self.draw(50, 2)

    net = Net

    def score(self, model, batch):
        x, y = batch
        logits = model(x)
        return {"loss": F.cross_entropy(logits, y), "correct": (logits.argmax(-1) == y).sum()}

    @hookimpl
    def moe_task(self, spec):
        train, test = self.data()
        return Task(train, test, model=self.net, score=self.score)


@fault("columns_fit", says="have [50, 49] rows; give each the same number")
class LosesALabel(Points):
    """One label too few."""

    def data(self):
        train, (x, y) = super().data()
        return train, (x, y[:-1])


@fault("same_seed_same_data", says="draw from moe_engine.seeds.generator(spec.seed, ...)")
class DrawsAnew(Points):
    """Other points each time."""

    def draw(self, count, seed):
        x = torch.randn(count, 6)
        return x, x[:, :3].argmax(-1)


@fault("nothing_is_tested_that_was_trained_on", says="50 of 50 rows for testing are also for training")
class TestsWhatItTaught(Points):
    """Test rows out of the training set."""

    def data(self):
        (x, y), _ = super().data()
        return (x, y), (x[:50], y[:50])


class Dense(Net):
    """No expert anywhere."""

    def __init__(self, engine):
        nn.Module.__init__(self)
        self.enter, self.moe, self.leave = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)


@fault("its_model_has_layers_of_the_engine", says="build one with engine.moe(dim, hidden)")
class HasNoLayer(Points):
    """A dense model."""

    net = Dense


@fault("score_is_a_mean_with_a_graph", says="take a mean")
class SumsLosses(Points):
    """The sum over the batch."""

    def score(self, model, batch):
        return {"loss": F.cross_entropy(model(batch[0]), batch[1], reduction="sum")}


class Forgetful(Net):
    """Dropout with no look at self.training."""

    def through(self, x):
        return F.dropout(self.moe(x), 0.5)


@fault("evaluation_repeats", "score_is_a_mean_with_a_graph", says="draw nothing in eval", bugs=(8,))
class DropsInEval(Points):
    """Random in evaluation."""

    net = Forgetful


class Idle(Net):
    """A layer whose answer nobody uses."""

    def through(self, x):
        return self.moe(x).detach()


@fault("every_router_learns", "its_model_learns", says="call it in the model's forward, and detach nothing", bugs=(1,))
class UsesNoLayer(Points):
    """Cut off."""

    net = Idle


class Reverse(torch.autograd.Function):
    """A gradient turned round."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return -grad


@fault("its_model_learns", says="12 steps on one batch took the loss from")
class ClimbsUphill(Points):
    """The loss goes up."""

    def score(self, model, batch):
        x, y = batch
        return {"loss": F.cross_entropy(Reverse.apply(model(x)), y)}
