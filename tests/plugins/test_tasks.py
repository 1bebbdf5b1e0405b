"""Tasks: the data that is there, and that the model learns it."""

import os
from pathlib import Path

import pytest
import torch
from torchmetrics.classification import MulticlassF1Score, MulticlassPrecision, MulticlassRecall

from moe_engine import Engine, TaskSpec, UsageError
from moe_engine.plugins.tasks import autoencoder
from moe_engine.plugins.tasks.autoencoder import Autoencoder
from moe_engine.plugins.tasks.blobs import Blobs
from moe_engine.plugins.tasks.conv_autoencoder import ConvAutoencoder
from moe_engine.plugins.tasks.digits import Digits
from moe_engine.run.config import RunConfig
from moe_engine.run.training import Training
from moe_engine.tasks import image_task
from moe_engine.tasks.images import ClassMeasures
from support import refused

ROOT = Path(__file__).parents[2]


def test_digits_are_the_1797_of_uci():
    task = Digits().moe_task(TaskSpec())
    (images, labels), (test_images, test_labels) = task.train, task.test
    assert [tuple(images.shape), tuple(test_images.shape)] == [(1438, 64), (359, 64)]
    assert torch.cat([labels, test_labels]).bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert int(torch.cat([images, test_images]).max()) == 16
    assert (ROOT / "plugins" / "tasks" / "digits.csv.gz").stat().st_size < 100_000


def test_the_digits_split_does_not_depend_on_the_seed():
    one, two = (Digits().moe_task(TaskSpec(seed=seed)).test[0] for seed in (0, 1))
    assert torch.equal(one, two)


def test_blobs_are_of_any_number_and_drawn_from_the_seed():
    def draw(seed):
        return Blobs(images=50, test_images=7, classes=3, size=5).moe_task(TaskSpec(seed=seed))

    task = draw(0)
    assert [tuple(task.train[0].shape), tuple(task.test[0].shape)] == [(50, 5, 5), (7, 5, 5)]
    assert int(task.train[1].max()) == 2
    assert torch.equal(task.train[0], draw(0).train[0])
    assert not torch.equal(task.train[0], draw(1).train[0])


def test_the_autoencoders_generated_data_are_two_sets_of_ten_classes():
    task = Autoencoder().moe_task(TaskSpec())
    (images, labels), (test_images, test_labels) = task.train, task.test
    assert [tuple(images.shape), tuple(test_images.shape)] == [(12000, 28, 28), (2000, 28, 28)]
    assert (test_labels // 10).bincount().tolist() == [1000, 1000]
    assert (labels // 10).bincount().tolist() == [6000, 6000]


def test_samples_are_drawn_by_the_seed_and_shown_set_after_set_in_turn():
    def rows(seed, **options):
        return Autoencoder(**options).moe_task(TaskSpec(seed=seed)).train

    _, labels = rows(0, samples=500, order="in_turn")
    assert torch.equal(labels // 10, (labels // 10).sort().values)
    assert 200 < int((labels >= 10).sum()) < 300  # half of 500, five standard deviations of 11.2 either way
    every, images = (rows(0, **options)[0] for options in ({}, {"samples": 500}))
    assert torch.equal(every[:500], images)
    with refused("too-many-samples", "autoencoder.samples=12001", 12000, "blobs"):
        rows(0, samples=12001)


def test_a_reconstruction_is_scored_by_set_in_evaluation_alone():
    """Answering 0 everywhere, the error of an image is the mean of its squared pixels."""
    task = Autoencoder().moe_task(TaskSpec())
    images, labels = (column[:7] for column in task.test)
    labels = torch.tensor([3, 12, 3, 19, 0, 10, 11])
    answer = torch.nn.Module()
    answer.forward = lambda pixels, labels: torch.zeros_like(pixels)
    assert list(task.score(answer, (images, labels))) == ["loss"]
    score = task.score(answer.eval(), (images, labels))
    error = [sum((int(v) / 255) ** 2 for v in image.flatten()) / 784 for image in images]
    expected = {
        "loss": sum(error) / 7,
        "loss.large": error[0] + error[2] + error[4],
        "count.loss.large": 3,
        "loss.small": error[1] + error[3] + error[5] + error[6],
        "count.loss.small": 4,
    }
    assert pytest.approx(expected, rel=1e-5) == {name: float(value) for name, value in score.items()}


def test_everything_passes_the_autoencoders_experts():
    """With experts that answer 0 an image comes back as the last linear map's bias, which starts at 0."""
    task = Autoencoder().moe_task(TaskSpec())
    engine = Engine("topk", experts=4)
    model = task.model(engine)
    with torch.no_grad():
        for parameter in (model.moe.experts.w_out, model.moe.experts.b_out):
            parameter.zero_()
    pixels = torch.rand(3, 28, 28)
    assert torch.equal(torch.zeros(3, 28, 28), model(pixels, None))
    assert model.encoder.weight.std().item() == pytest.approx(784**-0.5, rel=0.02)  # 50,176 draws


@pytest.mark.parametrize("data", ["mnist", "fashion_mnist"])
def test_one_set_has_no_turn(data):
    with pytest.raises(UsageError, match=f"autoencoder.order=in_turn .*autoencoder.data=mix.*{data}"):
        Engine("topk", [f"autoencoder.data={data}", "autoencoder.order=in_turn"], task="autoencoder").check(TaskSpec())


def test_mix_is_both_sets(monkeypatch):
    def half(count, value):
        return torch.full((count, 28, 28), value, dtype=torch.uint8), torch.arange(count) % 10

    both = {"a": lambda _: (half(20, 1), half(3, 2)), "b": lambda _: (half(30, 3), half(2, 4))}
    monkeypatch.setattr(autoencoder, "READERS", both)
    task = Autoencoder(data="mix", order="in_turn").moe_task(TaskSpec())
    assert task.train[0][:, 0, 0].tolist() == [1] * 20 + [3] * 30
    score = task.score(task.model(Engine("topk")).eval(), task.test)
    assert list(score) == ["loss", "loss.a", "count.loss.a", "loss.b", "count.loss.b"]
    assert not Autoencoder(data="mix").moe_task(TaskSpec()).ordered and task.ordered


@pytest.mark.parametrize("skips", [True, False])
def test_skips_bypass_the_latent_vector(skips):
    """With the map back from it at 0, one image still differs from another, or does not."""
    task = ConvAutoencoder(skips=skips, width=4, latent=8).moe_task(TaskSpec())
    model = task.model(Engine("topk", experts=4)).eval()
    with torch.no_grad():
        for parameter in model.from_latent.parameters():
            parameter.zero_()
    pixels = task.test[0][:2] / 255
    one, other = model(pixels, None)
    assert tuple(one.shape) == (3, 32, 32)
    assert skips == (not torch.equal(one, other))


def test_the_latent_vector_goes_round_the_experts_too():
    """z + MoE(z): with experts that answer 0 the model is the one without a layer."""
    task = ConvAutoencoder(width=4, latent=8).moe_task(TaskSpec())
    model = task.model(Engine("topk", experts=4)).eval()
    pixels = task.test[0][:2] / 255
    before = model(pixels, None)
    with torch.no_grad():
        for parameter in model.moe.experts.parameters():
            parameter.zero_()
    alone = model(pixels, None)
    assert not torch.equal(before, alone) and not torch.equal(alone[0], alone[1])
    model.moe.forward = lambda z, labels: torch.zeros_like(z)
    assert torch.equal(model(pixels, None), alone)


@pytest.mark.parametrize("task", [Digits(), Blobs(images=100, test_images=10)])
def test_the_model_of_a_task_has_a_layer_that_is_given_labels(task):
    task = task.moe_task(TaskSpec())
    engine = Engine("topk", experts=4)
    model = task.model(engine)
    score = task.score(model.eval(), task.test)
    assert engine.metrics("eval")["moe0"]["class_expert"].sum() == 2 * task.test[0].shape[0]
    assert set(score) == {"loss", "correct", "predicted", "true"}
    assert set(task.score(model.train(), task.test)) == {"loss", "correct"}


def test_precision_recall_and_f1_are_means_over_classes():
    """Of [0, 0, 0, 1] and then [1, 2], 0, 0, 1, 1 and then 1, 1 are predicted: by class 2/2, 2/4, 0 and 2/3, 2/2, 0."""
    images = torch.tensor([0, 0, 1, 1, 1, 1], dtype=torch.uint8)[:, None]
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    task = image_task((images, labels), (images, labels), 3, 4, 4)
    measures = task.measures()
    for rows in (slice(0, 4), slice(4, 6)):
        score = task.score(Oracle().eval(), (images[rows], labels[rows]))
        measures.update(score["predicted"], score["true"])
    found = {name: float(value) for name, value in measures.compute().items()}
    f1 = [2 * 1 * (2 / 3) / (1 + 2 / 3), 2 * 0.5 * 1 / (0.5 + 1), 0]
    assert found == pytest.approx({"precision": 1.5 / 3, "recall": (5 / 3) / 3, "f1": sum(f1) / 3})


@pytest.mark.parametrize("seen", [3, 7])
def test_measures_are_those_of_torchmetrics(seen):
    """Of 7 classes, `seen` occur."""
    drawn = torch.Generator().manual_seed(0)
    measures = ClassMeasures(7)
    theirs = {
        "precision": MulticlassPrecision(7, average="macro"),
        "recall": MulticlassRecall(7, average="macro"),
        "f1": MulticlassF1Score(7, average="macro"),
    }
    for _ in range(3):
        predicted, true = torch.randint(seen, (2, 40), generator=drawn)
        for one in (measures, *theirs.values()):
            one.update(predicted, true)
    found = {name: float(value) for name, value in measures.compute().items()}
    assert found == pytest.approx({name: float(one.compute()) for name, one in theirs.items()}, abs=1e-6)


class Oracle(torch.nn.Module):
    """Takes the pixel for the class."""

    def forward(self, images, labels=None):
        return torch.nn.functional.one_hot(images[:, 0].long(), 3).float()


def test_a_run_reports_them(tmp_path):
    config = RunConfig(task="blobs", steps=5, no_plugin=("plots", "html"))
    summary = Training(config, {"blobs": {"images": 64, "test_images": 600}}, tmp_path / "run").run().summary
    assert {"precision", "recall", "f1"} == summary["measures"].keys()
    assert summary["measures"]["recall"] == pytest.approx(summary["accuracy"], abs=0.1)  # classes are about as frequent


def accuracy_of(tmp_path, **config):
    run = Training(RunConfig(no_plugin=("plots", "html"), **config), {}, tmp_path / "run").run()
    return run.summary["accuracy"], run.summary["layers"][0]["active"]


def test_the_demo_learns_the_digits_with_no_dead_expert(tmp_path):
    accuracy, active = accuracy_of(tmp_path, plugins=("saturation", "switch_aux"))
    assert accuracy >= 0.95
    assert active == 8


@pytest.mark.long
@pytest.mark.parametrize(("task", "least"), [("mnist", 0.97), ("fashion_mnist", 0.84), ("cifar10", 0.40)])
def test_real_images(tmp_path, task, least):
    """Three epochs on the data sets under $DATA; the bar is met with every expert active."""
    data = os.environ.get("DATA")
    if not data:
        pytest.skip("set DATA to the folder of the data sets")
    accuracy, active = accuracy_of(tmp_path, task=task, data_dir=data, epochs=3, plugins=("saturation", "switch_aux"))
    assert accuracy >= least
    assert active == 8


@pytest.mark.long
def test_real_images_grow_a_layer_from_2_to_16_experts(tmp_path):
    """The trigger's defaults, on MNIST under $DATA: live growth, all experts active at the end."""
    data = os.environ.get("DATA")
    if not data:
        pytest.skip("set DATA to the folder of the data sets")
    plugins = ("saturation", "switch_aux", "loss_plateau")
    accuracy, active = accuracy_of(tmp_path, task="mnist", data_dir=data, epochs=3, experts=2, plugins=plugins)
    assert accuracy >= 0.97
    assert active == 16
