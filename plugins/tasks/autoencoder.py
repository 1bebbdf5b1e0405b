"""A small autoencoder whose bottleneck is a layer of experts."""

from functools import partial

import attrs
import torch
from torch import nn

from moe_engine import UsageError, hookimpl, option
from moe_engine.seeds import generator
from moe_engine.tasks import datasets
from moe_engine.tasks.images import reconstruction_task

CLASSES = 10  # of each set
READERS = {"mnist": datasets.mnist, "fashion_mnist": datasets.fashion_mnist}


@attrs.define(eq=False)
class Autoencoder:
    """Restore grey images of 28 x 28 pixels through experts that everything has to pass: a stream for growth.

    x^ = V MoE(relu(W x + b)) + c, loss = mean (x^ - x)^2 over images and pixels in 0..1. No residual leads
    around the experts, and they are narrow, so that what they do shows in the loss. Evaluation gives the
    loss of each set apart too; a class is a label of one set. Source: after kennycason/srnn, 2025, in small.
    """

    data: str = option("blobs", help="mix: both of them; blobs: generated", choices=("blobs", *READERS, "mix"))
    samples: int | None = option(None, help="training images that are shown, drawn by the seed; unset: all", min=1)
    order: str = option("shuffled", help="in_turn: one set after the other", choices=("shuffled", "in_turn"))
    dim: int = option(64, help="width of the model", min=1)
    hidden: int = option(8, help="hidden width of an expert", min=1)
    scale: float = option(1.0, help="factor of the loss in training, which a strategy should not depend on", min=0)

    @hookimpl
    def moe_check(self, setup):
        if self.order == "in_turn" and self.data in READERS:
            return f"autoencoder.order=in_turn needs several sets, and {self.data} is one; set autoencoder.data=mix"
        return None

    @hookimpl
    def moe_task(self, spec):
        sets = {name: read(spec.data_dir) for name, read in READERS.items() if self.data in (name, "mix")}
        sets = sets or _generated(spec.seed)
        train, test = datasets.joined(sets.values(), CLASSES)
        train = self._shown(*train, generator(spec.seed, "autoencoder samples"))
        model = partial(Net, classes=CLASSES * len(sets), dim=self.dim, hidden=self.hidden)
        return reconstruction_task(train, test, model, tuple(sets), CLASSES, self.order == "in_turn", self.scale)

    def _shown(self, images, labels, random):
        if (self.samples or 1) > len(images):
            raise UsageError(f"autoencoder.samples={self.samples} is more than the {len(images)} images of {self.data}")
        rows = torch.randperm(len(images), generator=random)[: self.samples]
        if self.order == "in_turn":
            rows = rows[(labels[rows] // CLASSES).argsort(stable=True)]
        return images[rows], labels[rows]


def _generated(seed):
    """Two sets: a few large blobs, which are easy, and many small ones."""
    random = generator(seed, "autoencoder blobs")
    shapes = {"large": {"parts": 4, "width": 0.1}, "small": {"parts": 8, "width": 0.05}}
    return {name: datasets.blobs((6000, 1000), CLASSES, random, **shape) for name, shape in shapes.items()}


class Net(nn.Module):
    def __init__(self, engine, classes, dim, hidden):
        super().__init__()
        self.enter, self.leave = nn.Linear(28 * 28, dim), nn.Linear(dim, 28 * 28)
        self.moe = engine.moe(dim, hidden, classes=classes, bias=True)
        nn.init.kaiming_uniform_(self.enter.weight, nonlinearity="linear")  # of variance 1 / fan_in
        for linear in (self.enter, self.leave):
            nn.init.zeros_(linear.bias)

    def forward(self, pixels, labels):
        h_BD = torch.relu(self.enter(pixels.flatten(1)))
        return self.leave(self.moe(h_BD, labels=labels)).view_as(pixels)
