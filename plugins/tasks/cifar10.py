"""CIFAR-10."""

import attrs
import torch
from torch.nn import functional as F

from moe_engine import hookimpl, option
from moe_engine.tasks import datasets
from moe_engine.tasks.image_models import model_option
from moe_engine.tasks.images import image_task

CLASSES, PADDING = 10, 4


@attrs.define(eq=False)
class Cifar10:
    """60,000 colour pictures of 32 x 32 pixels in 10 classes, as flat pixels (Krizhevsky, 2009).

    Read from the official binary files (cifar-10-batches-bin/) or from cifar10.npz (x_train, y_train,
    x_test, y_test; images [N, 32, 32, 3]) under --data-dir; downloaded if neither is there. Both are
    held against the official checksums; nothing is unpickled.

    Pictures for training may be changed as they are shown: `standard` is a window of 32 x 32 pixels of the picture
    with 4 of black around it, mirrored by a coin, for each by itself. Source: Yun et al., 2019 (CutMix).
    """

    model: str = model_option()
    dim: int = option(256, help="width of the model, but for direct", min=1)
    hidden: int = option(256, help="hidden width of an expert", min=1)
    centred: bool = option(False, help="pixels from -1 to 1 instead of 0 to 1")
    augment: str = option(
        "none", help="standard: random crops and flips of training pictures", choices=("none", "standard")
    )
    cutmix: float = option(
        0.0, help="share of batches that show a window of another picture in each, with mixed labels", min=0, max=1
    )

    @hookimpl
    def moe_task(self, spec):
        train, test = datasets.cifar10(spec.data_dir)
        task = image_task(train, test, CLASSES, self.dim, self.hidden, model=self.model, centred=self.centred)
        return attrs.evolve(task, augment=self._change())

    def _change(self):
        """(images, labels) -> those that are shown; None where nothing changes."""
        if self.augment == "none" and not self.cutmix:
            return None
        from torchvision.transforms import v2

        cutmix = v2.RandomApply([v2.CutMix(num_classes=CLASSES)], p=self.cutmix)
        crop = _cropped if self.augment == "standard" else lambda images: images
        return lambda batch: tuple(cutmix(crop(batch[0]), batch[1]))


def _cropped(images):
    """Each image by itself: torchvision's RandomCrop and RandomHorizontalFlip move a whole batch alike."""
    count, _, side, _ = images.shape
    y, x = torch.randint(2 * PADDING + 1, (2, count)).to(images.device)
    mirrored = (torch.rand(count) < 0.5).to(images.device)
    windows = F.pad(images, [PADDING] * 4).unfold(2, side, 1).unfold(3, side, 1)  # a view: [B, C, 9, 9, S, S]
    shown = windows[torch.arange(count, device=images.device), :, y, x]
    return torch.where(mirrored[:, None, None, None], shown.flip(-1), shown)
