"""Generated images of any number: a task without data."""

import attrs
import torch

from moe_engine import hookimpl, option
from moe_engine.seeds import generator
from moe_engine.tasks import image_task


@attrs.define(eq=False)
class Blobs:
    """Square images of a few soft blobs; a class is where its blobs lie, an image is that, shifted and noisy."""

    images: int = option(6000, help="number of training images", min=1)
    test_images: int = option(1000, help="number of test images", min=1)
    classes: int = option(10, help="number of classes", min=2)
    size: int = option(12, help="side of an image in pixels", min=4, max=64)
    noise: float = option(0.2, help="standard deviation of the pixel noise; a blob's peak is 1", min=0)
    dim: int = option(64, help="width of the model", min=1)
    hidden: int = option(64, help="hidden width of an expert", min=1)

    @hookimpl
    def moe_task(self, spec):
        random = generator(spec.seed, "blobs")
        centres_CP2 = torch.rand(self.classes, 3, 2, generator=random) * 0.7 + 0.15
        train, test = (self._draw(count, centres_CP2, random) for count in (self.images, self.test_images))
        return image_task(train, test, self.classes, self.dim, self.hidden)

    def _draw(self, count, centres_CP2, random):
        labels = torch.randint(self.classes, (count,), generator=random)
        shift = 0.05 * torch.randn(count, 1, 2, generator=random)
        centres_NP2 = centres_CP2[labels] + shift
        line = (torch.arange(self.size) + 0.5) / self.size
        y, x = (((line - centres_NP2[..., axis, None]) / 0.12).square() for axis in (0, 1))
        images = torch.exp(-(y[..., :, None] + x[..., None, :]) / 2).amax(1)
        images = images + self.noise * torch.randn(images.shape, generator=random)
        return (images.clamp(0, 1) * 255).to(torch.uint8), labels
