"""Faults of initializers, triggers, metrics, reports, tasks and families."""

import attrs
import torch
from faults import fault
from torch import nn
from torch.nn import functional as F

import moe_engine
from moe_engine import GATE, STACKED, Family, Growth, NewExpert, Stored, Task, Traits, hookimpl, option
from moe_engine.testing import tiny_model

# -- initializers --------------------------------------------------------------------------------------


@fault("new_expert_is_complete", message="cast drawn numbers with .to(row.dtype)", hook="moe_new_expert")
def draws_in_fp32(self, fresh, generator):
    """Random rows in float32 whatever the layer's dtype."""
    return NewExpert({name: torch.randn(row.shape, generator=generator) for name, row in fresh.items()})


@fault(
    "given_rows_are_not_modified",
    message="was modified in place; write row + d, not row += d",
    bugs=(9,),
    hook="moe_new_expert",
)
def writes_into_fresh(self, fresh, roles):
    """Zero output, in place."""
    return NewExpert({name: row.zero_() if roles[name] == "output" else row for name, row in fresh.items()})


@fault("draws_only_from_its_generator", message="pass generator=generator to every draw", hook="moe_new_expert")
def draws_from_anywhere(self, fresh):
    """Noise from torch's global generator."""
    return NewExpert({name: row + 0.01 * torch.randn_like(row) for name, row in fresh.items()})


@fault(
    "siblings_differ", message="a new expert is an exact copy of another new expert", bugs=(28,), hook="moe_new_expert"
)
def copies_exactly(self, parent, fresh):
    """A copy without noise."""
    return NewExpert(fresh if parent is None else parent)


@fault(
    "silent_start_outputs_zero",
    message="start the rows of role 'output' at 0",
    hook="moe_new_expert",
    traits=Traits(effects="silent_start"),
)
def starts_loudly(self, fresh):
    """Drawn anew, and declared silent."""
    return NewExpert(fresh)


@fault(
    "copies_expert_starts_near_the_parent",
    message="start from the parent's rows",
    hook="moe_new_expert",
    traits=Traits(effects="copies_expert"),
)
def copies_nothing(self, fresh):
    """Drawn anew, and declared a copy."""
    return NewExpert(fresh)


@fault(
    "copies_router_row_copies_it",
    message="'router.weight' differs from the parent's",
    hook="moe_new_expert",
    traits=Traits(effects="copies_router_row"),
)
def moves_the_router_row(self, parent, fresh, roles, generator):
    """A router row next to the parent's, declared a copy."""
    rows = fresh if parent is None else parent
    step = {name: 0.1 * torch.randn(row.shape, generator=generator).to(row.dtype) for name, row in rows.items()}
    return NewExpert({name: row + step[name] for name, row in rows.items()})


# -- triggers -------------------------------------------------------------------------------------


@attrs.define(eq=False)
class Slow:
    """Asks for one more expert every 60 steps."""

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


@fault("requested_growth_is_possible", message="has no expert 99", hook=None)
class NamesAMissingParent(Slow):
    """A parent that does not exist."""

    def parents(self, history, layer):
        return (99,)


@fault("same_history_gives_same_growth", "resumed_run_grows_alike", message="keep state in `memory`", bugs=(19,))
class CountsForAll(Slow):
    """One count for all runs of a process."""

    asked = 0

    def due(self, history, memory):
        type(self).asked += 1
        return self.asked % 70 == 0


@fault("resumed_run_grows_alike", message="keep state in `memory` or in a Part", bugs=(29,))
class CountsOnItself(Slow):
    """A count on the plugin, which no checkpoint holds."""

    asked: int = 0

    def due(self, history, memory):
        self.asked += 1
        return self.asked % 70 == 0


@fault("max_experts_is_respected", message="with max_experts=7 the layer has 8 experts", bugs=(29,))
class GrowsByTwo(Slow):
    """A limit that does not count the requested experts."""

    def parents(self, history, layer):
        return (0, 1)


@fault("orphans_are_declared", message="declare traits = Traits(orphans=True)")
class HidesOrphans(Slow):
    """An expert without a parent, undeclared."""

    def parents(self, history, layer):
        return (None,)


@fault("orphans_are_declared", message="every new expert has a parent; remove it")
class DeclaresOrphans(Slow):
    """Declared to ask for experts without a parent; each has one."""

    traits = Traits(orphans=True)


# -- metrics --------------------------------------------------------------------------------------


@fault("handles_every_load", message="it raises ZeroDivisionError", bugs=(24,), hook="moe_metrics")
def divides_by_the_smallest(self, stats):
    """Max over min, as Python floats."""
    return {"spread": float(stats.load.max()) / float(stats.load.min())}


@fault(
    "stats_are_not_modified", message="stats['load'] was modified in place; write a / b", bugs=(9,), hook="moe_metrics"
)
def normalises_in_place(self, stats):
    """Turns the load that all metrics read into shares."""
    share_E = stats.load
    share_E /= share_E.sum()
    return {"share": share_E}


@fault(
    *("order_of_calls_changes_nothing", "memory_survives_a_checkpoint"),
    message="keep state in `memory`, which belongs to one layer and one split",
    bugs=(19, 24),
)
class MixesSplits:
    """The change since the last call, for whichever layer and split."""

    last: object = None

    @hookimpl
    def moe_metrics(self, stats):
        load_E = stats.load / stats.load.sum()
        same = self.last is not None and self.last.shape == load_E.shape
        change = float((load_E - self.last).abs().sum()) if same else 0.0
        self.last = load_E
        return {"change": change}


@fault("memory_survives_a_checkpoint", message="keep state in `memory`, which is saved")
class ForgetsOnResume:
    """Remembers each split, but on the plugin."""

    last: dict = attrs.field(factory=dict)

    @hookimpl
    def moe_metrics(self, stats, layer):
        key = (layer.name, "loss.none" in stats.sums or "forwards" in stats.sums)
        before, self.last[key] = self.last.get(key, 0.0), float(stats.load[0])
        return {"before": before}


@fault("measuring_draws_no_random_numbers", message="use a separate torch.Generator", hook="moe_metrics")
def bootstraps(self, stats):
    """Resampled with the run's generator."""
    chosen = torch.randint(len(stats.load), (len(stats.load),))
    return {"resampled": stats.load[chosen].mean()}


# -- reports --------------------------------------------------------------------------------------


@fault("written_files_are_listed", message="without listing them", hook="moe_report")
def keeps_quiet(self, run):
    """Writes two files and names one."""
    for name in ("a.txt", "b.txt"):
        (run.folder / name).write_text("text")
    return ["a.txt"]


@fault("written_files_are_listed", message="outside the run's folder", hook="moe_report")
def strays(self, run):
    """Writes next to the run's folder."""
    (run.folder / "a.txt").write_text("text")
    (run.folder.parent / "b.txt").write_text("text")
    return ["a.txt"]


@fault("report_can_be_rewritten", message="it raises FileExistsError", hook="moe_report")
def writes_once(self, run):
    """Creates a folder that must not exist."""
    (run.folder / "own").mkdir()
    (run.folder / "own" / "a.txt").write_text("text")
    return ["own/a.txt"]


@fault("missing_metrics_are_tolerated", message="it raises TypeError", bugs=(25,), hook="moe_report")
def needs_accuracy(self, run):
    """Takes for granted that there is an accuracy."""
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


@fault("columns_match", message="have [50, 49] rows; give each the same number")
class LosesALabel(Points):
    """One label too few."""

    def data(self):
        train, (x, y) = super().data()
        return train, (x, y[:-1])


@fault("same_seed_gives_same_data", message="draw from moe_engine.generator(spec.seed, ...)")
class DrawsAnew(Points):
    """Different points each time."""

    def draw(self, count, seed):
        x = torch.randn(count, 6)
        return x, x[:, :3].argmax(-1)


@fault("train_and_test_are_disjoint", message="50 of 50 test rows are training rows")
class TestsWhatItTaught(Points):
    """Test rows from the training set."""

    def data(self):
        (x, y), _ = super().data()
        return (x, y), (x[:50], y[:50])


class Dense(Net):
    """No MoE layer."""

    def __init__(self, engine):
        nn.Module.__init__(self)
        self.enter, self.moe, self.leave = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)


@fault("model_uses_the_engine", message="build one with engine.moe(dim, hidden)")
class HasNoLayer(Points):
    """A dense model."""

    net = Dense


class ShowsPoints(Points):
    """Points with what people see of them."""

    @hookimpl
    def moe_task(self, spec):
        train, test = self.data()
        return Task(train, test, model=self.net, score=self.score, show=self.show)


@fault("shows_what_its_layers_see", message="it shows [2] tokens of a row, of 32 rows whose layers see [32] in all")
class ShowsTooMuch(ShowsPoints):
    """Two texts for each point, which is one token."""

    def show(self, batch):
        return [["left", "right"] for _ in batch[0]]


@fault("shows_what_its_layers_see", message="Task.show is wrong: it has images torch.float32 [32, 2, 3] of 32 samples")
class ShowsNumbers(ShowsPoints):
    """Pictures that are not bytes."""

    def show(self, batch):
        return batch[0].view(-1, 2, 3)


@fault("score_is_a_differentiable_mean", message="take a mean")
class SumsLosses(Points):
    """The sum over the batch."""

    def score(self, model, batch):
        return {"loss": F.cross_entropy(model(batch[0]), batch[1], reduction="sum")}


class Forgetful(Net):
    """Dropout whatever self.training is."""

    def through(self, x):
        return F.dropout(self.moe(x), 0.5)


@fault(
    "evaluation_is_deterministic",
    "score_is_a_differentiable_mean",
    message="draw no random numbers in eval mode",
    bugs=(8,),
)
class DropsInEval(Points):
    """Random in evaluation."""

    net = Forgetful


class Idle(Net):
    """A layer whose output is detached."""

    def through(self, x):
        return self.moe(x).detach()


@fault("every_router_learns", "model_learns", message="call it in the model's forward, and detach nothing", bugs=(1,))
class UsesNoLayer(Points):
    """A layer that gets no gradient."""

    net = Idle


class Reverse(torch.autograd.Function):
    """A gradient with its sign flipped."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return -grad


@fault("model_learns", message="12 steps on one batch changed the loss from")
class ClimbsUphill(Points):
    """The loss goes up."""

    def score(self, model, batch):
        x, y = batch
        return {"loss": F.cross_entropy(Reverse.apply(model(x)), y)}


# -- families ------------------------------------------------------------------------------------------


def of(kind):
    """A plugin's trial model: a tiny one of this type."""
    return {"hook": "moe_family", "trial_model": lambda self: tiny_model(kind)}


def renormalised(block):
    return "topk", {"renorm": True}


@fault("reads_the_models_own_decisions", message="chose an expert without a logit", **of("mixtral"))
def takes_gates_for_logits(self):
    """The second of what the router returns, although the logits come first."""
    return Family(logits=1)


@fault("adopting_changes_no_logit", message="let `recipe` and `score` be functions of a module", **of("mixtral"))
def keeps_a_lambda(self):
    """A recipe that can't be pickled."""
    return Family(tensors={**GATE, **STACKED}, recipe=lambda _: renormalised(None))


@fault("growth_keeps_names_and_layout", "exported_model_loads_equal", message="it raises", **of("gpt_oss"))
def forgets_the_biases(self):
    """The experts' biases have an expert axis too, which is not declared."""
    rows = {"router.weight": Stored("logit_row", fan_in=1), "router.bias": Stored("logit_bias")}
    weights = {"experts.gate_up_proj": Stored("in", fan_in=1), "experts.down_proj": Stored("output", fan_in=1)}
    return Family(router="router", tensors={**rows, **weights}, recipe=renormalised)


@fault("exported_model_loads_equal", message="what was written does not load", **of("mixtral"))
def counts_under_another_name(self):
    """The config of these models calls the number of experts otherwise."""
    return Family(tensors={**GATE, **STACKED}, count=("num_blocks",), recipe=renormalised)


@fault("upcycling_changes_no_logit", message="computes something else than up_proj", **of("llama"))
def swaps_gate_and_up(self):
    """The activation is that of the gate, not of the up projection."""
    return Family(dense=(moe_engine.Dense("gate_proj", "down_proj", gate="up_proj"),))
