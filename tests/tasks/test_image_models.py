"""Image models: what each computes, that all learn, and the dense model that replaces each."""

from math import isqrt

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from moe_engine import Engine, MoE, adam
from moe_engine.tasks.image_models import MODELS, image_model
from moe_engine.tasks.images import image_task
from support import refused

CLASSES, DIM, HIDDEN = 4, 12, 8
DENSENETS = ("densenet121", "densenet_slim")
SMALL = [name for name in MODELS if name not in DENSENETS]
models = pytest.mark.parametrize("name", SMALL)


def drawn(count, *shape):
    """Images of noise, brighter in a different corner for each of four classes, which any model can learn."""
    labels, side = torch.arange(count) % CLASSES, isqrt(shape[-1]) if len(shape) == 1 else shape[-1]
    images = torch.randint(100, (count, *shape[:-2], side, side))
    half = side // 2
    for image, label in zip(images, labels.tolist(), strict=True):
        image[..., half * (label // 2) :, half * (label % 2) :] += 40 * label
    return images.view(count, *shape).to(torch.uint8), labels


def build(name, shape=(3, 8, 8), plugins="topk", **spec):
    engine = Engine(plugins, experts=4, **{"top_k": 2, **spec})
    return engine, image_model(name, engine, torch.zeros(shape), CLASSES, DIM, HIDDEN, 255.0)


def trained(name, shape, steps):
    """The losses of some steps on one batch of 64."""
    engine, model = build(name, shape)
    batch = drawn(64, *shape)
    task = image_task(batch, batch, CLASSES, DIM, HIDDEN, model=name)
    optimizer, losses = adam(model, 1e-2), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = task.score(model, batch)["loss"]
        (loss + engine.aux_loss()).backward()
        engine.after_backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        engine.after_step()
        losses.append(loss.item())
    return losses


def test_each_formula():
    """On the tokens x that the stem makes: linear of x + MoE(x), linear of MoE(x), MoE of the pixels, MoE(x)."""
    images, _ = drawn(5, 3, 8, 8)
    pixels = images / 255
    for name in SMALL:
        model = build(name)[1].eval()
        x = model.stem(pixels)
        expected = {
            "residual": lambda m, x: m.head(x + m.moe(x)),
            "plain": lambda m, x: m.head(m.moe(x)),
            "direct": lambda m, x: m.moe(pixels.flatten(1)),
            "cnn": lambda m, x: m.moe(x),
        }[name](model, x)
        torch.testing.assert_close(model(images), expected)
        assert expected.shape == (5, CLASSES)


def test_the_linear_stem_and_the_convolutions_by_hand():
    """32 channels, pooled by 2, then 64, pooled by 2, then linear."""
    images, _ = drawn(5, 3, 8, 8)
    linear, conv = (build(name)[1].stem for name in ("residual", "cnn"))
    x = images / 255
    torch.testing.assert_close(linear(x), linear[1](x.flatten(1)).relu())
    for layer, channels in ((conv[1], 32), (conv[4], 64)):
        assert layer.weight.shape == (channels, x.shape[1], 3, 3)
        x = F.max_pool2d(F.conv2d(x, layer.weight, layer.bias, padding=1).relu(), 2)
    torch.testing.assert_close(conv(images / 255), conv[8](x.flatten(1)).relu())


@pytest.mark.parametrize(("name", "shape"), [("cnn", (8, 8)), ("cnn", (3, 8, 8)), ("densenet_slim", (3, 32, 32))])
def test_gradients_lie_in_memory_as_their_weights_do(name, shape):
    """Fused Adam walks both through memory without a look at their strides, so that another order goes unnoticed."""
    images, labels = drawn(4, *shape)
    _, model = build(name, shape)
    batched = images.view(4, -1, *shape[-2:])
    assert model.stem[0](batched).is_contiguous(memory_format=torch.channels_last)
    F.cross_entropy(model(images, labels), labels).backward()
    for weight in model.parameters():
        assert weight.is_contiguous()
        assert torch.equal(weight.grad.flatten(), weight.grad.as_strided((weight.numel(),), (1,)))


@models
@pytest.mark.parametrize("shape", [(64,), (8, 8), (3, 9, 9)])
def test_images_of_every_layout_are_learnt(name, shape):
    """Flat, grey and in colour; every parameter gets a gradient, and 64 samples are fitted."""
    losses = trained(name, shape, 40)
    assert losses[-1] < 0.3 * losses[0]


def test_the_slim_densenet_learns():
    losses = trained("densenet_slim", (3, 32, 32), 8)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("name", MODELS)
def test_a_forward_in_eval_repeats_and_labels_reach_the_layer(name):
    engine, model = build(name, (3, 32, 32))
    images, labels = drawn(6, 3, 32, 32)
    with torch.no_grad():
        logits = model.eval()(images, labels)
        assert torch.equal(logits, model(images))
    assert (logits.shape, bool(logits.isfinite().all())) == ((6, CLASSES), True)
    (layer,) = (module for module in model.modules() if isinstance(module, MoE))
    assert layer in engine.layers
    assert layer.spec.classes == CLASSES
    assert layer.experts.b_in is None if name in ("residual", "plain") else layer.experts.b_in is not None


@pytest.mark.parametrize("name", DENSENETS)
def test_a_densenet_is_torchvisions_but_for_its_first_convolution(name):
    """3 x 3 of stride 1, and the pooling kept: 32 -> 16 -> 8 -> 4 -> 2.

    Slim: 64 channels, + 3 * 12, halved to 50, + 6 * 12, to 61, + 12 * 12, to 102, + 8 * 12 are 198.
    """
    model = build(name, (3, 32, 32))[1]
    first = model.stem[1].conv0
    assert (first.weight.shape[1:], first.stride, first.padding) == ((3, 3, 3), (1, 1), (1, 1))
    assert model.stem[1](torch.rand(2, 3, 32, 32)).shape[2:] == (2, 2)
    assert (model.stem[-2].in_features, model.stem[-2].out_features) == (
        {"densenet121": 1024, "densenet_slim": 198}[name],
        DIM,
    )
    if name == "densenet121":  # 7,978,856 in all, of which 1024 * 1000 + 1000 classify
        features = sum(p.numel() for p in model.stem[1].parameters())
        assert features == 7_978_856 - 1_025_000 - 64 * 3 * 49 + 64 * 3 * 9


def test_a_densenet_refuses_small_images():
    with refused("image-too-small", 32, 28):
        build("densenet_slim", (28, 28))


@pytest.mark.parametrize("name", MODELS)
def test_the_dense_model(name):
    """An MLP of the active width replaces the layer; a DenseNet keeps its linear classifier."""
    engine, model = build(name, (3, 32, 32), plugins="", dense=True)
    assert engine.layers == []
    if name in DENSENETS:
        assert model.moe is None
        assert isinstance(model.head, nn.Linear)
    else:
        assert model.moe.enter.out_features == 2 * HIDDEN
    images, labels = drawn(6, 3, 32, 32)
    loss = F.cross_entropy(model(images, labels), labels)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_experts_that_a_dense_densenet_has_no_place_for_are_refused():
    with refused("acts-on-nothing", "'deep_mlp'"):
        build("densenet_slim", (3, 32, 32), plugins="deep_mlp", dense=True, top_k=1)


def test_the_dense_model_of_deep_experts_is_the_published_perceptron():
    """784-128-64-10 with biases on flat pixels: 109,386 weights, and the output of torch's own layers."""
    engine = Engine("deep_mlp", experts=8, top_k=1, dense=True)
    model = image_model("direct", engine, torch.zeros(28, 28), 10, 1, 1, 255.0)
    assert sum(p.numel() for p in model.parameters()) == 109_386
    images, bank = torch.randint(256, (5, 28, 28)), model.moe.bank
    x = images.flatten(1) / 255
    for i in range(2):
        x = F.linear(x, bank.get_parameter(f"w_{i}")[0].t(), bank.get_parameter(f"b_{i}")[0]).relu()
    torch.testing.assert_close(model(images), F.linear(x, bank.w_2[0].t(), bank.b_2[0]))
