"""Models that classify pictures: what lies before and behind their one MoE layer."""

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
    """stem: pictures [B, C, S, S] -> tokens [B, D]. moe: None where the head does without. residual: add the tokens."""

    stem: nn.Module
    moe: nn.Module | None
    head: nn.Module
    residual: bool = False


@attrs.frozen
class Sizes:
    """Of pictures: channels, side in pixels, classes. dim: width of the layer's tokens; hidden: of its experts."""

    channels: int
    side: int
    classes: int
    dim: int
    hidden: int

    @property
    def pixels(self) -> int:
        """How many numbers a picture is."""
        return self.channels * self.side**2


class ImageClassifier(nn.Module):
    """Pixels over scale, if centred from -1 to 1 -> stem -> MoE layer -> head.

    Called with images [B, ...] of any shape that holds the pixels, and labels [B] or None; answers logits [B, classes].
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
    """The same pictures [B, C, S, S] with channels innermost in memory: colour pictures are convolved faster on a CPU.

    Weights keep the usual order, in which any optimizer's state may come: a fused one looks at no strides.
    """

    def forward(self, images: Tensor) -> Tensor:
        return images.contiguous(memory_format=torch.channels_last)


def image_model(
    name: str,
    engine: LayerBuilder,
    picture: Tensor,
    classes: int,
    dim: int,
    hidden: int,
    scale: float,
    centred: bool = False,
) -> ImageClassifier:
    """The model of that name, one of `MODELS`, for square pictures like this one: [C, S, S], [S, S] or [S * S].

    Raises UsageError for pictures that are too small.
    """
    channels = picture.shape[0] if picture.dim() == 3 else 1
    sizes = Sizes(channels, isqrt(picture.numel() // channels), classes, dim, hidden)
    return ImageClassifier(sizes, scale, centred, MODELS[name](engine, sizes))


def _residual(engine: LayerBuilder, sizes: Sizes) -> Pieces:
    """linear -> x + MoE(x) -> linear."""
    return _plain(engine, sizes)._replace(residual=True)


def _plain(engine: LayerBuilder, sizes: Sizes) -> Pieces:
    """linear -> MoE -> linear: plain as opposed to residual (He et al., 2015)."""
    stem = nn.Sequential(nn.Flatten(), nn.Linear(sizes.pixels, sizes.dim), nn.ReLU())
    moe = engine.moe(sizes.dim, sizes.hidden, classes=sizes.classes)
    return Pieces(stem, moe, nn.Linear(sizes.dim, sizes.classes))


def _direct(engine: LayerBuilder, sizes: Sizes) -> Pieces:
    """The MoE layer alone, from flat pixels to class logits."""
    return Pieces(nn.Flatten(), _last(engine, sizes, sizes.pixels), nn.Identity())


def _cnn(engine: LayerBuilder, sizes: Sizes) -> Pieces:
    """Two convolutions of 32 and 64 channels, each with pooling behind it -> linear -> MoE to class logits."""
    stem = nn.Sequential(
        ChannelsLast(),
        *(nn.Conv2d(sizes.channels, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(64 * (sizes.side // 4) ** 2, sizes.dim), nn.ReLU()),
    )
    return Pieces(stem, _last(engine, sizes, sizes.dim), nn.Identity())


def _densenet(engine: LayerBuilder, sizes: Sizes, growth: int, blocks: tuple[int, ...]) -> Pieces:
    """DenseNet's features -> linear -> MoE to class logits; in a dense run its own linear classifier.

    The first convolution is 3 x 3 of stride 1, as pictures are small; the pooling behind it stays.
    Source: Huang et al., 2017 (DenseNet).
    """
    from torchvision.models import DenseNet

    if sizes.side < 32:
        raise UsageError(f"a DenseNet halves a picture five times, so it needs a side of 32 pixels, not {sizes.side}")
    net = DenseNet(growth, blocks, num_classes=sizes.classes)
    net.features.conv0 = nn.Conv2d(sizes.channels, net.features.conv0.out_channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(net.features.conv0.weight)
    stem = nn.Sequential(ChannelsLast(), net.features, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    if engine.dense:
        if idle := engine.implementing("moe_experts"):
            raise UsageError(f"a dense DenseNet has a classifier of its own: {listed(map(repr, idle))} acts on nothing")
        return Pieces(stem, None, net.classifier)
    stem.extend([nn.Linear(net.classifier.in_features, sizes.dim), nn.ReLU()])
    return Pieces(stem, _last(engine, sizes, sizes.dim), nn.Identity())


def _densenet121(engine: LayerBuilder, sizes: Sizes) -> Pieces:
    return _densenet(engine, sizes, 32, (6, 12, 24, 16))


def _densenet_slim(engine: LayerBuilder, sizes: Sizes) -> Pieces:
    return _densenet(engine, sizes, 12, (3, 6, 12, 8))


def _last(engine: LayerBuilder, sizes: Sizes, dim: int) -> nn.Module:
    """A layer that answers class logits, and so has biases."""
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
    """The option by which a task of pictures chooses among them."""
    what = (
        "residual: linear, x + MoE(x), linear; plain: MoE(x) instead; direct: the MoE layer alone, from pixels to "
        "classes; cnn and DenseNets: features, linear, MoE to classes"
    )
    return option("residual", help=what, choices=tuple(MODELS))
