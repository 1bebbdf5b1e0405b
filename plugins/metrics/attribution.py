"""What moves the router, and what does not."""

import attrs

from moe_engine import Finding, hookimpl, option


@attrs.define(eq=False)
class Attribution:
    """How much each loss term and each bias moves the router, on a fixed held-out batch.

    effect.LOSS: norm of the weighted term's gradient at the raw logits, over the task loss's (router_gradient).
    effect.BIAS: share of choices that differ without the bias; spread.BIAS: its largest less its smallest
    value. An effect below `threshold` is named (unless K = E). Source: this project.
    """

    threshold: float = option(1e-4, help="relative gradient, or share of choices, that is no effect", min=0)

    @hookimpl
    def moe_metrics(self, effects, layer):
        if effects is None:
            return {}
        choice = layer.spec.experts > layer.spec.top_k  # else nothing can act
        relative = {name: norm / effects.task if effects.task else norm for name, norm in effects.losses.items()}
        answers = {"router_gradient": effects.task}
        answers |= {f"spread.{name}": value for name, value in effects.spreads.items()}
        for name, value in {**relative, **effects.biases}.items():
            answers[f"effect.{name}"] = value
            if choice and value < self.threshold:
                answers[f"inert.{name}"] = self._inert(name, value, name in effects.biases)
        return answers

    def _inert(self, name, value, is_bias):
        why = f"loss {name} had no effect: its gradient at the router is {value:.1e} of the task's"
        advice = f"remove {name}, or raise {name.partition('.')[0]}.weight"
        if is_bias:
            why = f"bias {name} had no effect: without it {1 - value:.2%} of all choices are the same"
            advice = f"remove {name}, or raise its strength until effect.{name} is above {self.threshold:g}"
        return Finding("no effect", 1, why, advice)
