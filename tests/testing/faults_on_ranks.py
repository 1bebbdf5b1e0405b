"""Faults that show on several ranks: a plugin reads what its rank's tokens say where all of them must count.

Another process imports these, so they are whole classes at the top of a module.
"""

import torch
from faults import Memory, Sign, Top, fault
from torch import nn

from moe_engine import Growth, Traits, count_by, hookimpl


@fault("ranks_equal_one_process", message="let a loss read routing.load")
class SharesOfOneRank:
    """Switch's loss, with shares from a count of its own."""

    traits = Traits(requires=("probs", "load"), balanced=1.0)

    @hookimpl
    def moe_aux_loss(self, routing):
        load_E = count_by(routing.plan.expert, routing.plan.selected, routing.experts)
        f_E = load_E / load_E.sum().clamp(min=1)
        return routing.experts * (f_E * routing.mean(routing.probs)).sum()


class MeanOfShares(Sign):
    def measure(self, level, tokens):
        best_T = level.select_by(level.biased).argmax(-1)
        load_n = tokens.real(torch.nn.functional.one_hot(best_T, level.logits.shape[1]).float()).sum(0)
        return {"share": load_n / load_n.sum().clamp(min=1)}

    def excess(self, step):
        return step.relative(step.own["share"]) - 1


@fault("ranks_equal_one_process", message="return sums over tokens from measure()")
class AveragesShares:
    """A forward of ten tokens counts as much as one of a thousand."""

    traits = Traits(requires=("logits", "load"))

    @hookimpl
    def moe_bias(self, spec, level):
        return MeanOfShares(level.size)


@fault("ranks_agree", "ranks_equal_one_process", message="decide by history, memory and states")
class GrowsByItsOwnLoad:
    """The parent is the expert with the largest load of the rank's last forward."""

    seen: object = None

    @hookimpl
    def moe_measure(self, routing):
        self.seen = routing.load
        return {"tokens": routing.tokens.count.view(1)}

    @hookimpl
    def moe_growth(self, history):
        if history.step % 7 or len(history.growths) > 2:
            return None
        return Growth(history.layers[0].name, parents=(int(self.seen.argmax()),))


class LastForward(Memory):
    seen = None

    def after_step(self, step):
        if self.seen is not None and self.seen.sum() > 0:
            self.count.lerp_((self.seen / self.seen.sum()).to(self.count), 0.1)


@fault("ranks_agree", "ranks_equal_one_process", message="return sums over tokens from moe_measure")
class RemembersOneRank:
    """A running share of the load, updated from a tensor that a forward left behind."""

    @hookimpl
    def moe_state(self, spec):
        return LastForward(spec.experts)

    @hookimpl
    def moe_measure(self, routing, state):
        state.seen = routing.load
        return {"tokens": routing.tokens.count.view(1)}

    @hookimpl
    def moe_metrics(self, layer):
        return {"remembered": layer.state_of("remembers_one_rank").count}


class ScalesTokens(Top):
    def __init__(self, spec):
        super().__init__(spec)
        self.scale = nn.Parameter(torch.ones(()))

    def score(self, tokens):
        (logits_TE,) = super().score(tokens)
        return (logits_TE * self.scale if len(logits_TE) else logits_TE,)


@fault("ranks_agree", message="gets a gradient on some ranks and none on others")
class SkipsEmptyBatches:
    """A parameter that has no part in a forward without tokens, for which data parallelism waits."""

    @hookimpl
    def moe_router(self, spec):
        return ScalesTokens(spec)


@fault("ranks_equal_one_process", message="return sums over tokens from moe_measure")
class SpreadOfForwards:
    """The deviation of the load, added up over forwards."""

    @hookimpl
    def moe_measure(self, routing):
        return {"spread": routing.load.std().view(1)}

    @hookimpl
    def moe_metrics(self, stats):
        return {"spread": stats["spread_of_forwards.spread"] / stats.load.sum().clamp(min=1)}
