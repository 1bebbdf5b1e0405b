import attrs

from moe_engine import hookimpl, option
from moe_engine.tasks import image_task, load_fashion_mnist, model_option


@attrs.define(eq=False)
class FashionMnist:
    """Fashion-MNIST: 70,000 images of clothes, 28 x 28 pixels.

    Classify them into 10 classes, 60,000 for training and 10,000 for testing, from torchvision's files under
    --data-dir, which are downloaded if missing.

    Source: Xiao et al., 2017 (Fashion-MNIST).
    """

    model: str = model_option()
    dim: int = option(256, help="width of the model; unused by model=direct", min=1)
    hidden: int = option(128, help="hidden width of an expert", min=1)

    @hookimpl
    def moe_task(self, spec):
        train, test = load_fashion_mnist(spec.data_dir)
        return image_task(train, test, 10, self.dim, self.hidden, model=self.model)
