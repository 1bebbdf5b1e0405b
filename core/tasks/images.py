"""Whole image tasks: classification and reconstruction."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import isqrt

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..contract.protocols import LayerBuilder
from ..contract.tasks import Batch, Task
from ..processes import all_reduce_sum
from ..seeds import generator
from .image_models import image_model


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
    """A task that classifies square images, with cross-entropy, accuracy, precision, recall and F1.

    train, test: (images uint8 [N, S * S], [N, S, S] or [N, C, S, S]; labels long [N]). dim: width of the model's
    tokens; hidden: width of an expert. Pixels 0..scale are mapped to [0, 1], or to [-1, 1] if centred. model: a name
    that `model_option` offers. If `Task.augment` mixes images, labels may be shares of classes [B, classes].
    """
    return Task(
        train,
        test,
        model=lambda engine: image_model(model, engine, train[0][0], classes, dim, hidden, scale, centred),
        score=_classification,
        show=partial(_visible, test[0]),
        measures=partial(ClassMeasures, classes),
    )


def _visible(test: Tensor, batch: Batch) -> Tensor:
    """Images as people see them, uint8 [B, S, S] or [B, 3, S, S]; other numbers of channels are averaged."""
    images, factor = batch[0], 255 / max(int(test.max()), 1)
    channels = images.shape[1] if images.dim() == 4 else 1
    side = isqrt(images[0].numel() // channels)
    bright = (images.reshape(-1, channels, side, side) * factor).round()
    return (bright if channels == 3 else bright.mean(1)).to(torch.uint8)


def _classification(model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
    images, labels = batch
    true_B = labels if labels.dim() == 1 else labels.argmax(-1)  # of a mixed image, the class with the largest share
    logits = model(images, true_B)
    predicted_B = logits.detach().argmax(-1)
    score = {"loss": F.cross_entropy(logits, labels), "correct": (predicted_B == true_B).sum()}
    return score if model.training else {**score, "predicted": predicted_B, "true": true_B}


class ClassMeasures:
    """Precision, recall and F1 of predictions, each the mean over the classes that occur in either (macro).

    It is used as a metric of torchmetrics is, whose values it has (a test compares them), and which takes seconds to
    import. Of several ranks, each counts its own part.
    """

    def __init__(self, classes: int) -> None:
        self.counts_CC = torch.zeros(classes, classes, dtype=torch.long)  # rows: true, columns: predicted

    def to(self, device: torch.device) -> "ClassMeasures":
        """Count on a device."""
        self.counts_CC = self.counts_CC.to(device)
        return self

    def update(self, predicted_B: Tensor, true_B: Tensor) -> None:
        """Count a batch of class indices."""
        classes = len(self.counts_CC)
        self.counts_CC += torch.bincount(true_B * classes + predicted_B, minlength=classes**2).view(classes, classes)

    def compute(self) -> dict[str, Tensor]:
        """The measures of all batches, of all ranks."""
        counts_CC = all_reduce_sum(self.counts_CC).double()
        right_C, predicted_C, true_C = counts_CC.diag(), counts_CC.sum(0), counts_CC.sum(1)
        occurs_C = predicted_C + true_C > 0
        of = {"precision": predicted_C, "recall": true_C, "f1": (predicted_C + true_C) / 2}
        return {name: (right_C / number_C.clamp(min=0.5))[occurs_C].mean() for name, number_C in of.items()}


def reconstruction_task(
    train: Batch,
    test: Batch,
    model: Callable[[LayerBuilder], nn.Module],
    sets: Sequence[str],
    classes: int,
    ordered: bool = False,
    scale: float = 1.0,
) -> Task:
    """A task that reconstructs images; the loss is the mean squared error of pixels in [0, 1].

    train, test: (images uint8 [N, ...], labels long [N]). model: builds a module that maps (pixels [B, ...], labels
    [B]) to pixels. sets: names of the joined data sets, `classes` labels each; evaluation reports the loss of each as
    loss.NAME. ordered: show training rows in order instead of shuffled. scale: factor of the training loss.
    """

    def score(model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        images, labels = batch
        pixels = images / 255
        error_B = (model(pixels, labels) - pixels).square().flatten(1).mean(1)
        sums = {"loss": error_B.mean() * (scale if model.training else 1)}
        if not model.training:
            for number, name in enumerate(sets):
                of_set_B = labels // classes == number
                sums |= {f"loss.{name}": error_B[of_set_B].sum(), f"count.loss.{name}": of_set_B.sum()}
        return sums

    return Task(train, test, model, score, ordered=ordered, show=partial(_visible, test[0]))


def shuffled_split(columns: Sequence[Tensor], test_share: float, seed: int, name: str) -> tuple[Batch, Batch]:
    """Split columns of equal length into (train, test) at random.

    test_share: the share of rows for testing. The order is drawn from moe_engine.generator(seed, name).
    """
    count = columns[0].shape[0]
    order = torch.randperm(count, generator=generator(seed, name))
    cut = count - round(count * test_share)
    return tuple(c[order[:cut]] for c in columns), tuple(c[order[cut:]] for c in columns)
