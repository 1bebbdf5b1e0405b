"""Data sets: both forms of CIFAR-10, held against checksums, and generated images."""

import tarfile
from hashlib import md5

import numpy as np
import pytest
import torch

from moe_engine import generator
from moe_engine.tasks import datasets
from support import refused


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
    sums = {name: md5(batch.tobytes()).hexdigest() for name, batch in zip(datasets.CIFAR_MD5, batches, strict=True)}
    monkeypatch.setattr(datasets, "CIFAR_MD5", sums)
    return batches


def write_binary(folder, batches):
    (folder / datasets.CIFAR_FOLDER).mkdir()
    for name, batch in zip(datasets.CIFAR_MD5, batches, strict=True):
        (folder / datasets.CIFAR_FOLDER / name).write_bytes(batch.tobytes())


def write_npz(folder, batches):
    def images(rows):
        return rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)

    train, test = np.concatenate(batches[:5]), batches[5]
    arrays = {"x_train": images(train), "y_train": train[:, 0], "x_test": images(test), "y_test": test[:, 0]}
    np.savez(folder / "cifar10.npz", **arrays)


@pytest.mark.parametrize("write", [write_binary, write_npz])
def test_cifar10_reads_both_forms(small_cifar, tmp_path, write):
    write(tmp_path, small_cifar)
    (images, labels), (test_images, _) = datasets.load_cifar10(str(tmp_path))
    assert [tuple(images.shape), tuple(test_images.shape)] == [(20, 3, 32, 32), (4, 3, 32, 32)]
    assert images[5].flatten().tolist() == small_cifar[1][1, 1:].tolist()
    assert labels.tolist() == np.concatenate(small_cifar[:5])[:, 0].tolist()


@pytest.mark.parametrize("write", [write_binary, write_npz])
def test_cifar10_names_a_damaged_file(small_cifar, tmp_path, write):
    small_cifar[2][0, 7] ^= 1
    write(tmp_path, small_cifar)
    with refused("damaged-data", "data_batch_3.bin", tmp_path):
        datasets.load_cifar10(str(tmp_path))


def test_cifar10_reads_an_official_archive_that_is_already_there(small_cifar, tmp_path, monkeypatch):
    """Offline: the archive in the folder is unpacked as a downloaded one is."""
    (tmp_path / "source").mkdir()
    write_binary(tmp_path / "source", small_cifar)
    packed = tmp_path / "cifar-10-binary.tar.gz"
    with tarfile.open(packed, "w:gz") as tar:
        tar.add(tmp_path / "source" / datasets.CIFAR_FOLDER, datasets.CIFAR_FOLDER)
    monkeypatch.setattr(datasets, "CIFAR_ARCHIVE_MD5", md5(packed.read_bytes()).hexdigest())
    monkeypatch.setattr("torchvision.datasets.utils.urllib.request.urlopen", None)
    (images, labels), _ = datasets.load_cifar10(str(tmp_path))
    assert (len(images), labels.tolist()) == (20, np.concatenate(small_cifar[:5])[:, 0].tolist())


def test_cifar10_unpickles_nothing(tmp_path):
    np.savez(tmp_path / "cifar10.npz", x_train=np.array([{}], dtype=object))
    with refused("damaged-data", tmp_path / "cifar10.npz"):
        datasets.load_cifar10(str(tmp_path))


def still(*shape, generator):
    return torch.zeros(*shape)


def test_a_blob_lies_where_it_was_put(monkeypatch):
    """One blob of width 1/7 in the middle of 7 x 7 pixels: exp(-d^2 / 2) of the distance in pixels, times 255."""
    monkeypatch.setattr(torch, "rand", lambda *shape, generator: torch.full(shape, 0.5))
    monkeypatch.setattr(torch, "randn", still)
    ((images, labels),) = datasets.blob_images((2,), 1, generator(0, "here"), side=7, parts=1, width=1 / 7)
    expected = [[int(255 * np.exp(-((y - 3) ** 2 + (x - 3) ** 2) / 2)) for x in range(7)] for y in range(7)]
    assert ([0, 0], expected) == (labels.tolist(), images[1].tolist())


def test_coloured_blobs_have_channels_and_other_counts_other_rows():
    first, second = datasets.blob_images((5, 3), 2, generator(0, "here"), side=6, channels=3)
    assert [tuple(split[0].shape) for split in (first, second)] == [(5, 3, 6, 6), (3, 3, 6, 6)]
    assert first[0].dtype == torch.uint8 and int(first[1].max()) <= 1
    assert not torch.equal(first[0][0], second[0][0])


def test_joined_sets_keep_their_order_for_training_and_are_mixed_for_testing():
    """Two sets of two classes: the second's labels are 2 and 3; every test row is there, with its own label."""

    def split(first, count):
        return torch.arange(first, first + count)[:, None], torch.arange(count) % 2

    (images, labels), test = datasets.join_datasets([(split(0, 3), split(10, 40)), (split(3, 2), split(50, 40))], 2)
    assert (images[:, 0].tolist(), labels.tolist()) == ([0, 1, 2, 3, 4], [0, 1, 0, 2, 3])
    pairs = list(zip(test[0][:, 0].tolist(), test[1].tolist(), strict=True))
    assert [(10 + n, n % 2 + 2 * (n >= 40)) for n in range(80)] == sorted(pairs) != pairs
    assert 10 < sum(label >= 2 for _, label in pairs[:40]) < 30
