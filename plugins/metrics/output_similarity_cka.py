import attrs
import torch

from moe_engine import evaluating, hookimpl, linear_cka, mean_of_pairs

TOKENS = 256  # of the held-out batch


@attrs.define(eq=False)
class OutputSimilarityCKA:
    """How similar the experts' outputs are, as linear CKA.

    CKA(Y, Z) = HSIC(YY', ZZ') / sqrt(HSIC(YY', YY') HSIC(ZZ', ZZ')) of two experts' outputs on the first 256 real
    tokens of the held-out batch, in eval mode, with the unbiased HSIC, which is near 0 for unrelated outputs of few
    tokens. 1 for clones, also rotated and scaled ones. output_similarity_cka: mean over pairs;
    output_similarity_cka_matrix [E, E]. Undefined for an expert whose outputs do not vary, and left out below 4
    tokens.

    Sources: Kornblith et al., 2019 (Similarity of Neural Network Representations Revisited); Song et al., 2012
    (unbiased HSIC).
    """

    @hookimpl
    def moe_metrics(self, probe, layer):
        if probe is None:
            return {}
        tokens = probe.tokens
        x_SD = (tokens.x if tokens.mask is None else tokens.x[tokens.mask])[:TOKENS]
        if len(x_SD) < 4:
            return {}
        with torch.no_grad(), evaluating(layer.experts):
            y_ESO = layer.experts.outputs(x_SD.to(next(layer.experts.parameters(), x_SD).dtype)).double().cpu()
        cka_EE = linear_cka(y_ESO)
        return {"output_similarity_cka": mean_of_pairs(cka_EE), "output_similarity_cka_matrix": cka_EE}
