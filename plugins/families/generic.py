import attrs
import torch

from moe_engine import Block, Family, hookimpl, unwrapped
from moe_engine.testing import tiny_model


@attrs.define(eq=False)
class Generic:
    """Any architecture of transformers, for reading.

    Routers are found by what the model records as `router_logits`; beside one lie experts that are called with the
    hidden states, the chosen experts and their weights.

    Source: this project.
    """

    @hookimpl
    def moe_family(self):
        return GenericFamily()

    def trial_model(self):
        return tiny_model("mixtral")


class GenericFamily(Family):
    def blocks(self, model):
        recorders = [found for module in model.modules() for found in recorded(module)]
        for name, module in model.named_modules():
            inner = {path: unwrapped(part) for path, part in module.named_children()}
            experts = [path for path, part in inner.items() if is_bank(path, part)]
            routers = [(path, at) for path, part in inner.items() for kind, at in recorders if isinstance(part, kind)]
            routers += [(path, 0) for path in ("gate", "router") if path in inner and path not in experts]
            if experts and routers:
                path, at = routers[0]
                score = torch.sigmoid if hasattr(inner[path], "e_score_correction_bias") else self.score
                family = GenericFamily(router=path, experts=experts[0], entry=experts[0], logits=at, score=score)
                family.name = self.name
                yield Block(name or type(module).__name__, module, family)


def recorded(module):
    """(class of a router, place of the logits in what it returns), as a transformers model declares them."""
    found = (getattr(type(module), "_can_record_outputs", None) or {}).get("router_logits", [])
    for one in found if isinstance(found, list | tuple) else [found]:
        kind = getattr(one, "target_class", one)
        if kind is not None:
            yield kind, getattr(one, "index", 0)


def is_bank(path, module):
    return type(module).__name__.endswith("Experts") and "shared" not in path
