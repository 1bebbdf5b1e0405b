from functools import partial

import attrs
import torch
from torch import nn

from moe_engine import UsageError, generator, hookimpl, option
from moe_engine.tasks import blob_images, join_datasets, load_fashion_mnist, load_mnist, reconstruction_task

CLASSES = 10  # in each data set
READERS = {"mnist": load_mnist, "fashion_mnist": load_fashion_mnist}


@attrs.define(eq=False)
class Autoencoder:
    """Restore grey images through a bottleneck of experts.

    x^ = V MoE(relu(W x + b)) + c, loss = mean (x^ - x)^2 over images of 28 x 28 pixels in [0, 1]. No residual
    bypasses the experts, and they are narrow, so the loss reflects their work. Evaluation also reports the loss of
    each data set; each label of each set is a class. With order=in_turn the training images are a stream, one set after
    the other.

    Source: this project, after kennycason/srnn, 2025, at a smaller size.
    """

    data: str = option("blobs", help="mix: both real sets; blobs: generated", choices=("blobs", *READERS, "mix"))
    samples: int | None = option(None, help="number of training images, drawn with the seed; unset: all", min=1)
    order: str = option("shuffled", help="in_turn: one data set after the other", choices=("shuffled", "in_turn"))
    dim: int = option(64, help="width of the model", min=1)
    hidden: int = option(8, help="hidden width of an expert", min=1)
    scale: float = option(1.0, help="factor of the training loss, which no strategy should depend on", min=0)

    @hookimpl
    def moe_check(self, setup):
        if self.order == "in_turn" and self.data in READERS:
            return f"autoencoder.order=in_turn needs several data sets; set autoencoder.data=mix instead of {self.data}"
        return None

    @hookimpl
    def moe_task(self, spec):
        sets = {name: read(spec.data_dir) for name, read in READERS.items() if self.data in (name, "mix")}
        sets = sets or _generated(spec.seed)
        train, test = join_datasets(sets.values(), CLASSES)
        train = self._sampled(*train, generator(spec.seed, "autoencoder samples"))
        model = partial(Net, classes=CLASSES * len(sets), dim=self.dim, hidden=self.hidden)
        return reconstruction_task(train, test, model, tuple(sets), CLASSES, self.order == "in_turn", self.scale)

    def _sampled(self, images, labels, random):
        if (self.samples or 1) > len(images):
            why = f"autoencoder.samples={self.samples} is more than the {len(images)} images of {self.data}; lower it"
            raise UsageError(why, code="too-many-samples")
        rows = torch.randperm(len(images), generator=random)[: self.samples]
        if self.order == "in_turn":
            rows = rows[(labels[rows] // CLASSES).argsort(stable=True)]
        return images[rows], labels[rows]


def _generated(seed):
    """Two data sets: few large blobs, which are easy, and many small ones."""
    random = generator(seed, "autoencoder blobs")
    shapes = {"large": {"parts": 4, "width": 0.1}, "small": {"parts": 8, "width": 0.05}}
    return {name: blob_images((6000, 1000), CLASSES, random, **shape) for name, shape in shapes.items()}


class Net(nn.Module):
    def __init__(self, engine, classes, dim, hidden):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(28 * 28, dim), nn.Linear(dim, 28 * 28)
        self.moe = engine.moe(dim, hidden, classes=classes, bias=True)
        nn.init.kaiming_uniform_(self.encoder.weight, nonlinearity="linear")  # variance 1 / fan_in
        for linear in (self.encoder, self.decoder):
            nn.init.zeros_(linear.bias)

    def forward(self, pixels, labels):
        h_BD = torch.relu(self.encoder(pixels.flatten(1)))
        return self.decoder(self.moe(h_BD, labels=labels)).view_as(pixels)
