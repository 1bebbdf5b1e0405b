"""Plugins with one fault each, and the claims that catch it.

Each stands for a way in which routers, biases, losses and so on break in practice; `bugs` are numbers of the
table in docs/conformance.md.
"""

import attrs
import torch

from moe_engine import Bias, LinearRouter, Part, StackedMLP, assign, hookimpl

FAULTS = []


@attrs.frozen
class Fault:
    """A broken plugin: the claims that it breaks and no others, part of the first one's failure, known bugs like it."""

    plugin: type
    claims: tuple
    message: str
    bugs: tuple

    def __str__(self):
        return self.plugin.__name__


MAKERS = {  # the hook that returns a part
    "moe_router": lambda part: lambda self, spec: part(spec),
    "moe_bias": lambda part: lambda self, spec, level: part(level.size),
    "moe_experts": lambda part: lambda self, spec: part(spec),
}


def fault(*claims, message, bugs=(), hook=None, **attributes):
    """Register a broken plugin: a plugin class, the part that its hook returns, or the function of its hook."""

    def register(broken):
        body = {"__doc__": broken.__doc__, "__module__": __name__, **attributes}
        if hook in MAKERS:
            body[hook] = hookimpl(MAKERS[hook](broken))
        elif hook is not None:
            body[hook] = hookimpl(broken)
        plugin = broken if hook is None else type(broken.__name__, (), body)
        plugin = attrs.define(eq=False)(plugin)
        FAULTS.append(Fault(plugin, claims, message, bugs))
        return plugin if hook is None else broken  # another process finds a class by its name

    return register


# -- correct parts, to be broken ------------------------------------------------------------------


class Top(LinearRouter):
    """Top-K on softmax probabilities."""

    def probs(self, level):
        return level.biased.softmax(-1)

    def ranked(self, level, probs_TE):
        return level.select_by(level.biased)

    def gates(self, probs_TK):
        return probs_TK / probs_TK.sum(-1, keepdim=True) if self.top_k > 1 else probs_TK

    def select(self, tokens, levels):
        (level,) = levels
        probs_TE = self.probs(level)
        expert_TK = self.ranked(level, probs_TE).topk(self.top_k, dim=-1).indices
        return probs_TE, assign(self.gates(probs_TE.gather(-1, expert_TK)), expert_TK, tokens)


class Sign(Bias):
    """The sign of the load error."""

    rate = 0.01

    def __init__(self, size):
        super().__init__()
        self.expert_buffer("b", torch.zeros(size))

    def forward(self):
        return self.b

    def after_step(self, step):
        if step.load.sum() > 0:
            self.b -= self.rate * self.excess(step)

    def excess(self, step):
        return torch.sign(step.relative(step.load) - 1)


class Memory(Part):
    """One number for each expert."""

    def __init__(self, size):
        super().__init__()
        self.expert_buffer("count", torch.zeros(size), new="zero")


class Plain(StackedMLP):
    """The usual experts."""
