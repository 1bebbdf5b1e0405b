import attrs
import torch

from moe_engine import Traits, hookimpl

POINTS, TOKENS = 64, 1024  # log points kept, tokens of the held-out batch


@attrs.define(eq=False)
class RouterSaturation:
    """How early the router settled on its current choices.

    mean_t |S_t then and S_t now| / K for earlier log points, S_t the experts that token t chooses, on the first 1024
    tokens of the fixed held-out batch, in eval mode. router_saturation_curve [points, 2]: the number of an earlier
    log point, from 1 on, and its overlap with now, for up to 64 evenly spaced points. router_saturation: the mean,
    near 1 if the router settled early; K / E is chance. The last record compares with the final choices,
    as the paper does.

    Source: Muennighoff et al., 2024 (OLMoE), eq. 5.
    """

    traits = Traits(requires=("choices",))

    @hookimpl
    def moe_metrics(self, probe, memory):
        if probe is None or not probe.chosen()[:TOKENS].any():
            return {}
        now_TE = probe.chosen()[:TOKENS].bool().cpu()
        if memory.get("chosen", now_TE).shape[-2:] != now_TE.shape or not memory:
            memory.update(asked=0, every=1, chosen=now_TE[None][:0], points=torch.zeros(0, dtype=torch.long))
        overlap_P = (memory["chosen"] & now_TE).sum((1, 2)) / now_TE.sum()
        curve_P2 = torch.stack([memory["points"], overlap_P], 1)
        memory["asked"] += 1
        if memory["asked"] % memory["every"] == 0:
            memory["chosen"] = torch.cat([memory["chosen"], now_TE[None]])
            memory["points"] = torch.cat([memory["points"], torch.tensor([memory["asked"]])])
        if len(memory["points"]) > POINTS:  # keep every second one from here on
            memory.update(every=2 * memory["every"], chosen=memory["chosen"][1::2], points=memory["points"][1::2])
        return {"router_saturation": overlap_P.mean(), "router_saturation_curve": curve_P2}
