import attrs

from moe_engine import generator, hookimpl, option
from moe_engine.tasks import blob_images, image_task, model_option


@attrs.define(eq=False)
class Blobs:
    """Generated images of soft blobs: a task without data.

    Classify square grey images. A class determines the positions of its three blobs; each image shifts them together
    and adds noise.

    Source: this project.
    """

    images: int = option(6000, help="number of training images", min=1)
    test_images: int = option(1000, help="number of test images", min=1)
    classes: int = option(10, help="number of classes", min=2)
    size: int = option(12, help="side of an image, in pixels", min=4, max=64)
    noise: float = option(0.2, help="standard deviation of the pixel noise, where a blob's peak is 1", min=0)
    model: str = model_option()
    dim: int = option(64, help="width of the model; unused by model=direct", min=1)
    hidden: int = option(64, help="hidden width of an expert", min=1)

    @hookimpl
    def moe_task(self, spec):
        random = generator(spec.seed, "blobs")
        counts, shape = (self.images, self.test_images), {"side": self.size, "parts": 3, "width": 0.12, "jitter": 0.0}
        train, test = blob_images(counts, self.classes, random, noise=self.noise, **shape)
        return image_task(train, test, self.classes, self.dim, self.hidden, model=self.model)
