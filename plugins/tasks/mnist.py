"""MNIST."""

import attrs

from moe_engine import hookimpl, option
from moe_engine.tasks import image_task, mnist_like

SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


@attrs.define(eq=False)
class Mnist:
    """70,000 handwritten digits of 28 x 28 pixels, in torchvision's files under --data-dir (LeCun et al., 1998)."""

    dim: int = option(256, help="width of the model", min=1)
    hidden: int = option(128, help="hidden width of an expert", min=1)

    @hookimpl
    def moe_task(self, spec):
        from torchvision.datasets import MNIST

        train, test = mnist_like(MNIST, "MNIST", SHA256, spec.data_dir)
        return image_task(train, test, 10, self.dim, self.hidden)
