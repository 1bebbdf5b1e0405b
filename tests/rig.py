"""A small model that grows: what several test files share."""

import torch
from torch import nn

from moe_engine import Engine, Growth, adam

INITIALIZERS = ("random", "zero_output", "clone", "split")


ROUTERS = ("topk", "sigmoid_topk", "hierarchical")


LOSSES = "saturation,loss_free,switch_aux"


class Rig:
    """A small model, its engine, an optimizer and a fixed batch to probe with."""

    def __init__(self, plugins="topk,saturation,loss_free,switch_aux,random", optimizer=adam, experts=4, **spec):
        torch.default_generator.manual_seed(0)
        self.engine = Engine(plugins, experts=experts, **{"top_k": 2, **spec})
        self.layer = self.engine.moe(6, 5, bias=True, name="moe")
        self.model = nn.Sequential(nn.Linear(3, 6), self.layer, nn.Linear(6, 1))
        self.optimizer = optimizer(self.model, 1e-2)
        self.random = torch.Generator().manual_seed(0)
        self.x = torch.randn(32, 3, generator=self.random)

    def loss(self, x, model=None):
        return ((model or self.model)(x) - x.sum(1, keepdim=True).sin()).square().mean()

    def probe(self):
        self.model.eval()
        loss = self.loss(self.x)
        self.model.train()
        return loss

    def step(self, model=None):
        loss = self.loss(torch.randn(64, 3, generator=self.random), model)
        (loss + self.engine.aux_loss()).backward()
        self.engine.after_backward()
        self.optimizer.step()
        self.engine.after_step()
        self.optimizer.zero_grad()
        return loss.detach()

    def train(self, steps):
        for _ in range(steps):
            self.step()
        return self

    def grow(self, *parents, **more):
        more = {"optimizers": self.optimizer, "probe": self.probe, **more}
        wanted = {name: more.pop(name) for name in ("drop", "of", "require_exact") if name in more}
        return self.engine.grow(Growth("moe", parents, **wanted), **more)

    def everything(self):
        """All that a growth may touch, as copies."""
        tensors = {**self.model.state_dict(), "step_sums": self.layer.sums.step, "seen": self.layer.sums.evaluated}
        tensors |= {"aux_value": self.layer.sums.aux_value, "window": self.layer.sums.since_log}
        state = self.optimizer.state_dict()["state"]
        tensors |= {f"{i}.{key}": value for i, own in state.items() for key, value in own.items()}
        kept = {name: value.detach().clone() for name, value in tensors.items() if isinstance(value, torch.Tensor)}
        ids = [(id(p), p.data_ptr(), p.requires_grad) for p in self.model.parameters()]
        order = [id(p) for p in self.optimizer.state]
        plain = (
            self.layer.spec,
            dict(self.layer.sizes),
            dict(self.layer.sums.layout),
            dict(self.layer.sums.step_layout),
        )
        return kept, (ids, order, plain, len(self.engine.growths), torch.get_rng_state().tolist())


def same(one, two):
    assert one[1] == two[1]
    assert one[0].keys() == two[0].keys()
    for name, value in one[0].items():
        assert torch.equal(value, two[0][name]), name
