import attrs
import torch

from moe_engine import count_by, hookimpl, mutual_information


@attrs.define(eq=False)
class Specialization:
    """Which classes go to which experts.

    class_expert [C, E]: assignments by class and expert. mutual_information: I(c; e) / min(H(c), H(e)), with I
    reduced by its bias (C - 1)(E - 1) / (2N) for N assignments, C and E those that occur: 0 if independent, 1 if one
    determines the other. Needs labels 0 to C - 1; tokens with other labels are not counted, and a layer without
    labels has neither.

    Source: this project; the bias is that of Miller, 1955.
    """

    @hookimpl
    def moe_measure(self, routing, layer):
        classes, experts, labels = layer.spec.classes, routing.experts, routing.tokens.labels
        if not classes:
            return {}
        if labels is None:
            return {"class_expert": torch.zeros(classes, experts, device=routing.plan.expert.device)}
        label_N = labels[routing.plan.token]
        known_N = routing.plan.selected & (label_N >= 0) & (label_N < classes)  # -100 and the like mean no label
        pair_N = label_N.clamp(0, classes - 1) * experts + routing.plan.expert
        return {"class_expert": count_by(pair_N, known_N, classes * experts).view(classes, experts)}

    @hookimpl
    def moe_metrics(self, stats):
        counts = stats.of("specialization").get("class_expert")
        if counts is None or not counts.sum():
            return {}
        return {"class_expert": counts, "mutual_information": mutual_information(counts)}
