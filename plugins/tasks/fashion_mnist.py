"""Fashion-MNIST."""

import attrs

from moe_engine import hookimpl, option
from moe_engine.tasks import datasets
from moe_engine.tasks.image_models import model_option
from moe_engine.tasks.images import image_task


@attrs.define(eq=False)
class FashionMnist:
    """70,000 pictures of clothes, 28 x 28, in torchvision's files under --data-dir (Xiao et al., 2017)."""

    model: str = model_option()
    dim: int = option(256, help="width of the model, but for direct", min=1)
    hidden: int = option(128, help="hidden width of an expert", min=1)

    @hookimpl
    def moe_task(self, spec):
        train, test = datasets.fashion_mnist(spec.data_dir)
        return image_task(train, test, 10, self.dim, self.hidden, model=self.model)
