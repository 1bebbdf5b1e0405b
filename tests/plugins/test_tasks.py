"""Tasks: the data that is there, and that the model learns it."""

import os
from hashlib import md5
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_engine import Engine, TaskSpec, UsageError
from moe_engine.plugins.tasks import cifar10
from moe_engine.plugins.tasks.blobs import Blobs
from moe_engine.plugins.tasks.cifar10 import Cifar10
from moe_engine.plugins.tasks.digits import Digits
from moe_engine.runs import RunConfig
from moe_engine.training import Training

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


def official(count):
    """Six batches in CIFAR-10's binary format, `count` rows each."""
    random = np.random.default_rng(0)
    batches = [random.integers(256, size=(count, 3073), dtype=np.uint8) for _ in range(6)]
    for batch in batches:
        batch[:, 0] %= 10
    return batches


@pytest.fixture
def small_cifar(monkeypatch):
    batches = official(4)
    sums = {name: md5(batch.tobytes()).hexdigest() for name, batch in zip(cifar10.MD5, batches, strict=True)}
    monkeypatch.setattr(cifar10, "MD5", sums)
    return batches


def write_binary(folder, batches):
    (folder / cifar10.FOLDER).mkdir()
    for name, batch in zip(cifar10.MD5, batches, strict=True):
        (folder / cifar10.FOLDER / name).write_bytes(batch.tobytes())


def write_npz(folder, batches):
    def images(rows):
        return rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)

    train, test = np.concatenate(batches[:5]), batches[5]
    arrays = {"x_train": images(train), "y_train": train[:, 0], "x_test": images(test), "y_test": test[:, 0]}
    np.savez(folder / "cifar10.npz", **arrays)


@pytest.mark.parametrize("write", [write_binary, write_npz])
def test_cifar10_reads_both_forms(small_cifar, tmp_path, write):
    write(tmp_path, small_cifar)
    task = Cifar10().moe_task(TaskSpec(str(tmp_path)))
    (images, labels), (test_images, _) = task.train, task.test
    assert [tuple(images.shape), tuple(test_images.shape)] == [(20, 3, 32, 32), (4, 3, 32, 32)]
    assert images[5].flatten().tolist() == small_cifar[1][1, 1:].tolist()
    assert labels.tolist() == np.concatenate(small_cifar[:5])[:, 0].tolist()


@pytest.mark.parametrize("write", [write_binary, write_npz])
def test_cifar10_names_a_damaged_file(small_cifar, tmp_path, write):
    small_cifar[2][0, 7] ^= 1
    write(tmp_path, small_cifar)
    with pytest.raises(UsageError, match=r"data_batch_3.bin of .* is damaged; delete"):
        Cifar10().moe_task(TaskSpec(str(tmp_path)))


def test_cifar10_unpickles_nothing(tmp_path):
    np.savez(tmp_path / "cifar10.npz", x_train=np.array([{}], dtype=object))
    with pytest.raises(UsageError, match="damaged"):
        Cifar10().moe_task(TaskSpec(str(tmp_path)))


@pytest.mark.parametrize("task", [Digits(), Blobs(images=100, test_images=10)])
def test_the_model_of_a_task_has_a_layer_that_is_given_labels(task):
    task = task.moe_task(TaskSpec())
    engine = Engine("topk", experts=4)
    model = task.model(engine)
    score = task.score(model.eval(), task.test)
    assert engine.metrics("eval")["moe0"]["class_expert"].sum() == 2 * task.test[0].shape[0]
    assert set(score) == {"loss", "correct"}


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
