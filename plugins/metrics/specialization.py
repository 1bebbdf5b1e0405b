import attrs
import torch

from moe_engine import count_by, hookimpl


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


def mutual_information(counts):
    """I(row; column) / min(H(row), H(column)) of a table of counts, minus its bias, at least 0; nan if undefined."""
    joint = counts / counts.sum()
    rows, columns = joint.sum(1), joint.sum(0)
    information = _entropy(rows) + _entropy(columns) - _entropy(joint)
    bias = ((rows > 0).sum() - 1) * ((columns > 0).sum() - 1) / (2 * counts.sum())
    return (information - bias).clamp(min=0) / torch.minimum(_entropy(rows), _entropy(columns))


def _entropy(p):
    return -torch.special.xlogy(p, p).sum()
