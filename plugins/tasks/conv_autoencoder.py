from functools import partial

import attrs
import torch
from torch import nn

from moe_engine import generator, hookimpl, option
from moe_engine.tasks import blob_images, load_cifar10, reconstruction_task

CLASSES = 10


@attrs.define(eq=False)
class ConvAutoencoder:
    """Restore colour images, with experts on the latent vector.

    z + MoE(z) on the latent vector z of a convolutional autoencoder for images of 32 x 32 pixels; the loss is the
    mean squared error over pixels in [0, 1]. Three convolutions of stride 2 lead to z, three transposed ones back.
    With `skips` (U-Net) the features of each size are concatenated on the way back, so images bypass z and the
    experts, and the loss says nothing about them.

    Sources: kennycason/srnn, 2025, at a smaller size; Ronneberger et al., 2015 (U-Net).
    """

    data: str = option("blobs", help="data set; blobs: generated", choices=("blobs", "cifar10"))
    skips: bool = option(False, help="skip connections around the experts")
    width: int = option(16, help="channels after the first convolution; each later one doubles them", min=1)
    latent: int = option(128, help="width of the latent vector", min=1)
    hidden: int = option(64, help="hidden width of an expert", min=1)

    @hookimpl
    def moe_task(self, spec):
        train, test = load_cifar10(spec.data_dir) if self.data == "cifar10" else _generated(spec.seed)
        return reconstruction_task(train, test, partial(Net, task=self), (), CLASSES)


def _generated(seed):
    return blob_images((4000, 1000), CLASSES, generator(seed, "conv autoencoder blobs"), side=32, channels=3)


class Net(nn.Module):
    """pixels [B, 3, 32, 32] in [0, 1] -> pixels of the same shape."""

    def __init__(self, engine, task):
        super().__init__()
        sizes = [(3, task.width), (task.width, 2 * task.width), (2 * task.width, 4 * task.width)]
        copies = 2 if task.skips else 1  # of the features that each step back gets
        self.skips = task.skips
        self.down = nn.ModuleList(nn.Conv2d(shallow, deep, 4, stride=2, padding=1) for shallow, deep in sizes)
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(copies * deep, shallow, 4, stride=2, padding=1) for shallow, deep in reversed(sizes)
        )
        features = 4 * task.width * 4 * 4
        self.to_latent, self.from_latent = nn.Linear(features, task.latent), nn.Linear(task.latent, features)
        self.moe = engine.moe(task.latent, task.hidden, classes=CLASSES, bias=True)

    def forward(self, pixels, labels):
        x, skipped = pixels, []
        for convolve in self.down:
            x = torch.relu(convolve(x))
            skipped.append(x)
        z_BD = self.to_latent(x.flatten(1))
        x = self.from_latent(z_BD + self.moe(z_BD, labels=labels)).view_as(x)
        for convolve in self.up:
            feature = skipped.pop()
            x = convolve(torch.relu(torch.cat([x, feature], 1) if self.skips else x))
        return x
