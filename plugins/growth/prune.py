import attrs
import torch

from moe_engine import Growth, Part, Traits, hookimpl, least_experts, option


@attrs.define(eq=False)
class Prune:
    """Remove the least expert of every layer, step by step.

    After every `every` steps each layer with more than `keep` and more than K experts loses the one with the least
    value, a sum over its tokens since the layer last grew: by=load of 1, by=gate_mass of the gate g_i, by=output_norm
    of g_i times the norm of the expert's output-side weights. The norm of its output would need every expert to run
    again; `moe_engine.prune` measures that. While all values are equal nothing is removed.

    Sources: Chen et al., 2022 (Task-Specific Expert Pruning), one at a time; Lasby et al., 2025 (REAP), output_norm.
    """

    traits = Traits(requires=("choices",))
    every: int = option(100, help="steps between two removals", min=1)
    keep: int = option(4, help="a layer keeps at least this many experts", min=1)
    by: str = option("load", help="what an expert is ranked by", choices=("load", "gate_mass", "output_norm"))

    @hookimpl
    def moe_check(self, setup):
        if self.by == "load" and (rivals := setup.others(self, effect="equal_load")):
            return f"prune.by=load can't rank experts while {rivals[0]} makes all loads equal; set by=gate_mass"
        return None

    @hookimpl
    def moe_state(self, spec):
        return None if self.by == "load" else GateMass(spec.experts)

    @hookimpl
    def moe_measure(self, routing):
        return {} if self.by == "load" else {"gates": routing.gates().detach().abs().sum(0)}

    @hookimpl
    def moe_growth(self, history):
        if history.step % self.every:
            return None
        values = [(layer, self._value(history, layer)) for layer in history.layers]
        return [
            Growth(layer.name, drop=least[:1], why=f"expert {least[0]} has the least {self.by}")
            for layer, value_E in values
            if value_E.min() < value_E.max() and (least := least_experts(layer, value_E, self.keep))
        ]

    def _value(self, history, layer):
        if self.by == "load":
            return history.load(layer)
        value_E = history.state(layer).value
        return value_E * _output_weights(layer.experts) if self.by == "output_norm" else value_E


def _output_weights(bank):
    """[E]: the norm of all tensors of the role "output", 1 for a bank without them."""
    axes = {name: axis.axis for name, axis in bank.axes.items() if axis.role == "output"}
    rows = [getattr(bank, name).detach().float().movedim(axis, 0).flatten(1) for name, axis in axes.items()]
    return torch.cat(rows, 1).norm(dim=1) if rows else 1


class GateMass(Part):
    def __init__(self, size):
        super().__init__()
        self.expert_buffer("value", torch.zeros(size), new="zero")

    def after_step(self, step):
        self.value += step.own["gates"].to(self.value)

    def adjust_rows(self, staged, plans):
        if plans:  # it starts anew with each growth, as the load does
            staged["value"].zero_()
