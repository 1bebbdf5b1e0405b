"""Image classifiers: the stem and head around one MoE layer."""

from collections.abc import Callable
from math import isqrt
from typing import Any, NamedTuple

import attrs
import torch
from torch import Tensor, nn

from ..contract.options import option
from ..contract.protocols import LayerBuilder
from ..errors import UsageError, listed


class Pieces(NamedTuple):
    """stem: images [B, C, S, S] -> tokens [B, D]. moe: None if the model has no MoE layer. residual: x + MoE(x)."""

    stem: nn.Module
    moe: nn.Module | None
    head: nn.Module
    residual: bool = False


@attrs.frozen
class Sizes:
    """Images: channels, side in pixels, classes. dim: width of the layer's tokens; hidden: width of its experts."""

    channels: int
    side: int
    classes: int
    dim: int
    hidden: int

    @property
    def pixels(self) -> int:
        """The number of values in an image."""
        return self.channels * self.side**2


class ImageClassifier(nn.Module):
    """pixels / scale (mapped to [-1, 1] if centred) -> stem -> MoE layer -> head.

    Called with images [B, ...] of any shape that holds the pixels, and labels [B] or None; returns logits [B, classes].
    """

    def __init__(self, sizes: Sizes, scale: float, centred: bool, pieces: Pieces) -> None:
        super().__init__()
        self.shape, self.scale, self.centred = (sizes.channels, sizes.side, sizes.side), scale, centred
        self.stem, self.moe, self.head, self.residual = pieces

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        pixels = images.reshape(-1, *self.shape) / self.scale
        x_BD = self.stem(2 * pixels - 1 if self.centred else pixels)
        y_BO = x_BD if self.moe is None else self.moe(x_BD, labels=labels)
        logits: Tensor = self.head(x_BD + y_BO if self.residual else y_BO)
        return logits


class ChannelsLast(nn.Module):
    """The same images [B, C, S, S] with channels innermost in memory, which convolves faster on a CPU.

    Weights keep the default layout: fused optimizers ignore strides, so weights and state must share one.
    """

    def forward(self, images: Tensor) -> Tensor:
        return images.contiguous(memory_format=torch.channels_last)


def image_model(
    name: str,
    engine: LayerBuilder,
    sample: Tensor,
    classes: int,
    dim: int,
    hidden: int,
    scale: float,
    centred: bool = False,
) -> ImageClassifier:
    """Build the model `name` of `MODELS` for square images shaped like `sample`: [C, S, S], [S, S] or [S * S].

    Raises UsageError for images that are too small.
    """
    channels = sample.shape[0] if sample.dim() == 3 else 1
    sizes = Sizes(channels, isqrt(sample.numel() // channels), classes, dim, hidden)
    return ImageClassifier(sizes, scale, centred, MODELS[name](engine, sizes))


def _residual(engine: LayerBuilder, sizes: Sizes) -> Pieces:
    """linear -> x + MoE(x) -> linear."""
    return _plain(engine, sizes)._replace(residual=True)


def _plain(engine: LayerBuilder, sizes: Sizes) -> Pieces:
    """linear -> MoE -> linear; plain is the opposite of residual (He et al., 2015)."""
    stem = nn.Sequential(nn.Flatten(), nn.Linear(sizes.pixels, sizes.dim), nn.ReLU())
    moe = engine.moe(sizes.dim, sizes.hidden, classes=sizes.classes)
    return Pieces(stem, moe, nn.Linear(sizes.dim, sizes.classes))


def _direct(engine: LayerBuilder, sizes: Sizes) -> Pieces:
    """The MoE layer alone, from flat pixels to class logits."""
    return Pieces(nn.Flatten(), _last(engine, sizes, sizes.pixels), nn.Identity())


def _cnn(engine: LayerBuilder, sizes: Sizes) -> Pieces:
    """Two convolutions of 32 and 64 channels, each followed by pooling -> linear -> MoE to class logits."""
    stem = nn.Sequential(
        ChannelsLast(),
        *(nn.Conv2d(sizes.channels, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(64 * (sizes.side // 4) ** 2, sizes.dim), nn.ReLU()),
    )
    return Pieces(stem, _last(engine, sizes, sizes.dim), nn.Identity())


def _densenet(engine: LayerBuilder, sizes: Sizes, growth: int, blocks: tuple[int, ...]) -> Pieces:
    """DenseNet's features -> linear -> MoE to class logits; in a dense run, DenseNet's linear classifier.

    The first convolution is 3 x 3 with stride 1, because images are small; the pooling after it stays.
    Source: Huang et al., 2017 (DenseNet).
    """
    from torchvision.models import DenseNet

    if sizes.side < 32:
        why = f"a DenseNet halves an image five times, so it needs a side of at least 32 pixels, not {sizes.side}"
        raise UsageError(f"{why}; choose another model", code="image-too-small")
    net = DenseNet(growth, blocks, num_classes=sizes.classes)
    net.features.conv0 = nn.Conv2d(sizes.channels, net.features.conv0.out_channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(net.features.conv0.weight)
    stem = nn.Sequential(ChannelsLast(), net.features, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    if engine.dense:
        if idle := engine.implementing("moe_experts"):
            why = f"a dense DenseNet has no experts, so {listed(map(repr, idle))} has no effect"
            raise UsageError(f"{why}; remove it or choose another model", code="acts-on-nothing")
        return Pieces(stem, None, net.classifier)
    stem.extend([nn.Linear(net.classifier.in_features, sizes.dim), nn.ReLU()])
    return Pieces(stem, _last(engine, sizes, sizes.dim), nn.Identity())


def _densenet121(engine: LayerBuilder, sizes: Sizes) -> Pieces:
    return _densenet(engine, sizes, 32, (6, 12, 24, 16))


def _densenet_slim(engine: LayerBuilder, sizes: Sizes) -> Pieces:
    return _densenet(engine, sizes, 12, (3, 6, 12, 8))


def _last(engine: LayerBuilder, sizes: Sizes, dim: int) -> nn.Module:
    """A layer that returns class logits, and therefore has biases."""
    return engine.moe(dim, sizes.hidden, out=sizes.classes, classes=sizes.classes, bias=True)


MODELS: dict[str, Callable[[LayerBuilder, Sizes], Pieces]] = {
    "residual": _residual,
    "plain": _plain,
    "direct": _direct,
    "cnn": _cnn,
    "densenet121": _densenet121,
    "densenet_slim": _densenet_slim,
}


def model_option() -> Any:
    """An option for `image_task(model=...)`: the name of one of the built-in image models, "residual" by default."""
    explanation = (
        "residual: linear, x + MoE(x), linear; plain: MoE(x) instead; direct: the MoE layer alone, from pixels to "
        "classes; cnn and DenseNets: features, linear, MoE to classes"
    )
    return option("residual", help=explanation, choices=tuple(MODELS))
