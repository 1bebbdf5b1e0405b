import attrs

from moe_engine import Finding, hookimpl, option


@attrs.define(eq=False)
class Attribution:
    """How much each loss and bias moves the router.

    Measured on a fixed held-out batch. effect.LOSS: norm of the weighted term's gradient at the raw logits, over the
    task loss's, which is router_gradient. effect.BIAS: share of choices that differ without the bias; spread.BIAS:
    its largest minus its smallest value. Effects below `threshold` are reported, unless K = E.

    Source: this project.
    """

    threshold: float = option(1e-4, help="a relative gradient or share of choices below this is no effect", min=0)

    @hookimpl
    def moe_metrics(self, effects, layer, probe):
        if effects is None:
            return {}
        has_choice = layer.spec.experts > layer.spec.top_k
        relative = {name: norm / effects.task if effects.task else norm for name, norm in effects.losses.items()}
        metrics = {"router_gradient": effects.task}
        metrics |= {f"spread.{name}": value for name, value in effects.spreads.items()}
        for name, value in {**relative, **effects.biases}.items():
            metrics[f"effect.{name}"] = value
            if has_choice and value < self.threshold:
                metrics[f"inert.{name}"] = self._inert(name, value, name in effects.biases, probe)
        return metrics

    def _inert(self, name, value, is_bias, probe):
        why = f"loss {name} had no effect: its gradient at the router is {value:.1e} of the task's"
        advice = f"remove {name} or raise {name.partition('.')[0]}.weight"
        if is_bias:
            why = f"bias {name} had no effect: {1 - value:.2%} of choices are the same without it"
            advice = f"remove {name} or raise its strength until effect.{name} is above {self.threshold:g}"
            if all(level.scores is None for level in probe.levels):
                advice = f"the router never calls level.select_by(scores), so {name} can't act: remove one of the two"
        return Finding("no effect", 1, why, advice)
