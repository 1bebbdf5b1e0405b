import attrs
import torch

from moe_engine import Part, hookimpl, mean_of_pairs


@attrs.define(eq=False)
class WeightSimilarity:
    """How similar the experts' weights are.

    The mean over pairs of experts of the cosine of their flattened weights, over all parameters with an expert axis:
    1 for clones, near 0 if unrelated; nothing for experts that are separate modules. Two experts that compute the
    same with permuted hidden units look unrelated here; output_similarity_cka compares what they compute.

    Source: this project.
    """

    @hookimpl
    def moe_metrics(self, layer):
        gram_EE = sum((_gram(rows_EW) for rows_EW in expert_weights(layer.experts)), torch.zeros(()))
        if not gram_EE.dim():
            return {}
        norm_E = gram_EE.diagonal().sqrt()
        return {"weight_similarity": mean_of_pairs(gram_EE / (norm_E[:, None] * norm_E))}


def expert_weights(experts):
    """Each parameter with an expert axis, as [E, W]."""
    for part in experts.modules():
        for name, axis in part.axes.items() if isinstance(part, Part) else ():
            tensor = getattr(part, name)
            if axis.of == "expert" and isinstance(tensor, torch.nn.Parameter):
                yield tensor.detach().movedim(axis.axis, 0).flatten(1)


def _gram(rows_EW):
    return (rows_EW.double() @ rows_EW.double().T).cpu()
