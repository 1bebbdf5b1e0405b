import attrs

from moe_engine import Traits, hookimpl, option


@attrs.define(eq=False)
class GlobalAux:
    """Switch's balance loss on the load of a whole step.

    E sum_i f_i P_i, with P of this micro-batch and f of all micro-batches of the step so far, over all processes; 1
    at balance. A micro-batch of one domain may use few experts, as long as the step uses all. With one process and
    one micro-batch it is switch_aux; the first micro-batches of a step see only part of f. f counts the finished
    backward passes of the step plus this forward, so a forward recomputed under activation checkpointing sees the
    same f and counts nothing twice. Each forward communicates, so all processes must run the layer equally often.

    Source: Qiu et al., 2025 (Demons in the Detail).
    """

    traits = Traits(requires=("probs", "load"), balanced=1.0)
    weight: float = option(0.01, help="coefficient", min=0)

    @hookimpl
    def moe_aux_loss(self, routing, layer):
        load_E = layer.step_load(routing)
        f_E = load_E / load_E.sum().clamp(min=1)
        return routing.experts * (f_E * routing.mean(routing.probs)).sum()
