"""Helpers for tasks: image data sets, the built-in image models, and whole image tasks.

    from moe_engine.tasks import image_task, load_mnist, model_option

Importing this package loads torch, but not torchvision.
"""

from .datasets import blob_images, join_datasets, load_cifar10, load_fashion_mnist, load_mnist
from .image_models import model_option
from .images import image_task, reconstruction_task, shuffled_split

__all__ = [
    "blob_images",
    "image_task",
    "join_datasets",
    "load_cifar10",
    "load_fashion_mnist",
    "load_mnist",
    "model_option",
    "reconstruction_task",
    "shuffled_split",
]
