"""Tasks: the data, model and measure of a run, and what image tasks share."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..contract.protocols import LayerBuilder
from ..contract.tasks import Batch, Task
from ..seeds import generator
from .image_models import image_model

if TYPE_CHECKING:
    from torchmetrics import MetricCollection


def image_task(
    train: Batch,
    test: Batch,
    classes: int,
    dim: int,
    hidden: int,
    scale: float = 255.0,
    model: str = "residual",
    centred: bool = False,
) -> Task:
    """Classify images: (images uint8 [N, ...], labels long [N]) for train and test.

    Pixels of 0 to scale are seen as 0 to 1; centred: as -1 to 1. model: one of `models.MODELS`. A batch may also have
    shares of classes as labels, [B, classes], if images are mixed.
    """
    return Task(
        train,
        test,
        model=lambda engine: image_model(model, engine, train[0][0], classes, dim, hidden, scale, centred),
        score=_classification,
        measures=partial(_measures, classes),
    )


def _classification(model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
    images, labels = batch
    true_B = labels if labels.dim() == 1 else labels.argmax(-1)  # of a mixed image [B, C] the largest share's class
    logits = model(images, true_B)
    predicted_B = logits.detach().argmax(-1)
    score = {"loss": F.cross_entropy(logits, labels), "correct": (predicted_B == true_B).sum()}
    return score if model.training else {**score, "predicted": predicted_B, "true": true_B}


def _measures(classes: int) -> "MetricCollection":
    """Precision, recall and their harmonic mean, each the mean over the classes that occur (macro)."""
    from torchmetrics import MetricCollection
    from torchmetrics.classification import MulticlassF1Score, MulticlassPrecision, MulticlassRecall

    kinds = {"precision": MulticlassPrecision, "recall": MulticlassRecall, "f1": MulticlassF1Score}
    return MetricCollection({name: kind(classes, average="macro") for name, kind in kinds.items()})


def reconstruction_task(
    train: Batch,
    test: Batch,
    model: Callable[[LayerBuilder], nn.Module],
    sets: Sequence[str],
    classes: int,
    ordered: bool = False,
    scale: float = 1.0,
) -> Task:
    """Restore images: (images uint8 [N, ...], labels long [N]); the loss is the mean squared error of pixels in 0..1.

    model(pixels, labels) answers pixels. sets: the names of the data sets of which the images are, `classes` labels
    each, one after the other; evaluation tells their losses apart. scale: of the loss in training.
    """

    def score(model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        images, labels = batch
        pixels = images / 255
        error_B = (model(pixels, labels) - pixels).square().flatten(1).mean(1)
        sums = {"loss": error_B.mean() * (scale if model.training else 1)}
        if not model.training:
            for number, name in enumerate(sets):
                own_B = labels // classes == number
                sums |= {f"loss.{name}": error_B[own_B].sum(), f"count.loss.{name}": own_B.sum()}
        return sums

    return Task(train, test, model, score, ordered=ordered)


def shuffled_split(columns: Sequence[Tensor], test_share: float, seed: int, name: str) -> tuple[Batch, Batch]:
    """(train, test) of rows in an order drawn from the named generator."""
    count = columns[0].shape[0]
    order = torch.randperm(count, generator=generator(seed, name))
    cut = count - round(count * test_share)
    return tuple(c[order[:cut]] for c in columns), tuple(c[order[cut:]] for c in columns)
