import attrs
import torch

from moe_engine import evaluating, hookimpl, mean_of_pairs

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
        cka_EE = cka(y_ESO)
        return {"output_similarity_cka": mean_of_pairs(cka_EE), "output_similarity_cka_matrix": cka_EE}


def cka(y_ESO):
    """[E, E]: CKA of each pair of experts in y [E, S, O]; nan where an expert's outputs do not vary.

    HSIC of two Gram matrices is the product of their U-centred forms, summed, over S (S - 3).
    """
    size = y_ESO.shape[1]
    gram_ESS = y_ESO @ y_ESO.mT
    gram_ESS = gram_ESS - torch.diag_embed(gram_ESS.diagonal(dim1=1, dim2=2))
    rows_ES1 = gram_ESS.sum(2, keepdim=True) / (size - 2)
    total_E11 = gram_ESS.sum((1, 2), keepdim=True) / ((size - 1) * (size - 2))
    centred_ESS = gram_ESS - rows_ES1 - rows_ES1.mT + total_E11
    centred_ESS = centred_ESS - torch.diag_embed(centred_ESS.diagonal(dim1=1, dim2=2))
    flat, norm_E = centred_ESS.flatten(1), centred_ESS.flatten(1).norm(dim=1)
    norm_E = torch.where(norm_E > 1e-12 * gram_ESS.flatten(1).norm(dim=1), norm_E, torch.nan)  # the rest is rounding
    return flat @ flat.T / (norm_E[:, None] * norm_E)
