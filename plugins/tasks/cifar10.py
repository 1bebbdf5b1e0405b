import attrs
import torch
from torch.nn import functional as F

from moe_engine import hookimpl, option
from moe_engine.tasks import image_task, load_cifar10, model_option

CLASSES, PADDING = 10, 4


@attrs.define(eq=False)
class Cifar10:
    """CIFAR-10: 60,000 colour images of 32 x 32 pixels.

    Classify them into 10 classes, 50,000 for training and 10,000 for testing. Read under --data-dir from the
    official binary files (cifar-10-batches-bin/) or from cifar10.npz (x_train, y_train, x_test, y_test; images [N,
    32, 32, 3]), and downloaded if neither exists. Both are verified against the official checksums; nothing is
    unpickled.

    augment=standard: each training image is a random 32 x 32 window of the image padded with 4 black pixels, with an
    independent random horizontal flip. cutmix: the share of batches in which a window of each image shows another
    one, with labels mixed accordingly.

    Sources: Krizhevsky, 2009 (Learning Multiple Layers of Features from Tiny Images); Yun et al., 2019 (CutMix).
    """

    model: str = model_option()
    dim: int = option(256, help="width of the model; unused by model=direct", min=1)
    hidden: int = option(256, help="hidden width of an expert", min=1)
    centred: bool = option(False, help="scale pixels to [-1, 1] instead of [0, 1]")
    augment: str = option("none", help="standard: random crops and flips in training", choices=("none", "standard"))
    cutmix: float = option(0.0, help="share of training batches that are mixed by CutMix", min=0, max=1)

    @hookimpl
    def moe_task(self, spec):
        train, test = load_cifar10(spec.data_dir)
        task = image_task(train, test, CLASSES, self.dim, self.hidden, model=self.model, centred=self.centred)
        return attrs.evolve(task, augment=self._augmentation())

    def _augmentation(self):
        """The augmentation (images, labels) -> (images, labels), or None."""
        if self.augment == "none" and not self.cutmix:
            return None
        from torchvision.transforms import v2

        cutmix = v2.RandomApply([v2.CutMix(num_classes=CLASSES)], p=self.cutmix)
        crop = _cropped if self.augment == "standard" else lambda images: images
        return lambda batch: tuple(cutmix(crop(batch[0]), batch[1]))


def _cropped(images):
    """Crop and flip each image independently; torchvision's transforms treat a whole batch alike."""
    count, _, side, _ = images.shape
    y, x = torch.randint(2 * PADDING + 1, (2, count)).to(images.device)
    mirrored = (torch.rand(count) < 0.5).to(images.device)
    windows = F.pad(images, [PADDING] * 4).unfold(2, side, 1).unfold(3, side, 1)  # a view: [B, C, 9, 9, S, S]
    cropped = windows[torch.arange(count, device=images.device), :, y, x]
    return torch.where(mirrored[:, None, None, None], cropped.flip(-1), cropped)
