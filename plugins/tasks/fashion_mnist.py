"""Fashion-MNIST."""

import attrs

from moe_engine import hookimpl, option
from moe_engine.tasks import image_task, mnist_like

SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}


@attrs.define(eq=False)
class FashionMnist:
    """70,000 pictures of clothes, 28 x 28, in torchvision's files under --data-dir (Xiao et al., 2017)."""

    dim: int = option(256, help="width of the model", min=1)
    hidden: int = option(128, help="hidden width of an expert", min=1)

    @hookimpl
    def moe_task(self, spec):
        from torchvision.datasets import FashionMNIST

        train, test = mnist_like(FashionMNIST, "FashionMNIST", SHA256, spec.data_dir)
        return image_task(train, test, 10, self.dim, self.hidden)
