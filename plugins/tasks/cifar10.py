"""CIFAR-10."""

import attrs

from moe_engine import datasets, hookimpl, option
from moe_engine.models import model_option
from moe_engine.tasks import image_task


@attrs.define(eq=False)
class Cifar10:
    """60,000 colour pictures of 32 x 32 pixels in 10 classes, as flat pixels (Krizhevsky, 2009).

    Read from the official binary files (cifar-10-batches-bin/) or from cifar10.npz (x_train, y_train,
    x_test, y_test; images [N, 32, 32, 3]) under --data-dir; downloaded if neither is there. Both are
    held against the official checksums; nothing is unpickled.
    """

    model: str = model_option()
    dim: int = option(256, help="width of the model, but for direct", min=1)
    hidden: int = option(256, help="hidden width of an expert", min=1)

    @hookimpl
    def moe_task(self, spec):
        train, test = datasets.cifar10(spec.data_dir)
        return image_task(train, test, 10, self.dim, self.hidden, model=self.model)
