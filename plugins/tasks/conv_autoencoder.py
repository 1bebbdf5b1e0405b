"""A convolutional autoencoder with a layer of experts on its latent vector."""

from functools import partial

import attrs
import torch
from torch import nn

from moe_engine import hookimpl, option
from moe_engine.seeds import generator
from moe_engine.tasks import datasets
from moe_engine.tasks.images import reconstruction_task

CLASSES = 10


@attrs.define(eq=False)
class ConvAutoencoder:
    """Restore colour images of 32 x 32 pixels through a latent vector z: z + MoE(z), mean squared error per pixel.

    Three convolutions of stride 2 lead to z and three transposed ones back. With skips (U-Net) the features of
    each size are joined to those on the way back, so that the picture goes past z, and past the
    experts: the loss then says nothing about them. Sources: kennycason/srnn, 2025, in small; Ronneberger et
    al., 2015 (U-Net).
    """

    data: str = option("blobs", help="blobs: generated", choices=("blobs", "cifar10"))
    skips: bool = option(False, help="lead features past the experts")
    width: int = option(16, help="channels after the first convolution; each further one doubles them", min=1)
    latent: int = option(128, help="width of the latent vector", min=1)
    hidden: int = option(64, help="hidden width of an expert", min=1)

    @hookimpl
    def moe_task(self, spec):
        train, test = datasets.cifar10(spec.data_dir) if self.data == "cifar10" else _generated(spec.seed)
        return reconstruction_task(train, test, partial(Net, task=self), (), CLASSES)


def _generated(seed):
    return datasets.blobs((4000, 1000), CLASSES, generator(seed, "conv autoencoder blobs"), side=32, channels=3)


class Net(nn.Module):
    """pixels [B, 3, 32, 32] in 0..1 -> the same."""

    def __init__(self, engine, task):
        super().__init__()
        sizes = [(3, task.width), (task.width, 2 * task.width), (2 * task.width, 4 * task.width)]
        joined = 2 if task.skips else 1
        self.skips = task.skips
        self.down = nn.ModuleList(nn.Conv2d(few, many, 4, stride=2, padding=1) for few, many in sizes)
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(joined * many, few, 4, stride=2, padding=1) for few, many in reversed(sizes)
        )
        flat = 4 * task.width * 4 * 4
        self.enter, self.leave = nn.Linear(flat, task.latent), nn.Linear(task.latent, flat)
        self.moe = engine.moe(task.latent, task.hidden, classes=CLASSES, bias=True)

    def forward(self, pixels, labels):
        x, seen = pixels, []
        for convolve in self.down:
            x = torch.relu(convolve(x))
            seen.append(x)
        z_BD = self.enter(x.flatten(1))
        x = self.leave(z_BD + self.moe(z_BD, labels=labels)).view_as(x)
        for convolve in self.up:
            feature = seen.pop()
            x = convolve(torch.relu(torch.cat([x, feature], 1) if self.skips else x))
        return x
