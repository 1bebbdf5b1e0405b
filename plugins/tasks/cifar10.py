"""CIFAR-10."""

import os
import tarfile
from hashlib import md5
from pathlib import Path
from zipfile import BadZipFile, is_zipfile
from zlib import error as ZlibError

import attrs
import numpy as np
import torch

from moe_engine import UsageError, hookimpl, option
from moe_engine.runs import write_atomically
from moe_engine.tasks import download, image_task

ARCHIVE, ARCHIVE_MD5 = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"
FOLDER = "cifar-10-batches-bin"
MD5 = {
    "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
    "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
    "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
    "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
    "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
    "test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d",
}


@attrs.define(eq=False)
class Cifar10:
    """60,000 colour pictures of 32 x 32 pixels in 10 classes, as flat pixels (Krizhevsky, 2009).

    Read from the official binary files (cifar-10-batches-bin/) or from cifar10.npz (x_train, y_train,
    x_test, y_test; images [N, 32, 32, 3]) under --data-dir; downloaded if neither is there. Both are
    held against the official checksums; nothing is unpickled.
    """

    dim: int = option(256, help="width of the model", min=1)
    hidden: int = option(256, help="hidden width of an expert", min=1)

    @hookimpl
    def moe_task(self, spec):
        home = Path(spec.data_dir)
        archive = home / "cifar10.npz"
        if not all(os.path.exists(home / FOLDER / name) for name in MD5) and not os.path.exists(archive):
            _fetch(home)
        zipped = os.path.exists(archive)
        train, test = _from_npz(archive) if zipped else _from_binary(home / FOLDER)
        return image_task(train, test, 10, self.dim, self.hidden)


def _from_binary(folder):
    return _verified([np.fromfile(folder / name, np.uint8) for name in MD5], folder)


def _from_npz(archive):
    try:
        if not is_zipfile(archive):
            raise BadZipFile("it is no .npz")
        with open(archive, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            train, test = (_rows(arrays[f"x_{half}"], arrays[f"y_{half}"]) for half in ("train", "test"))
            return _verified([batch.ravel() for batch in (*np.split(train, 5), test)], archive)
    except (OSError, ValueError, KeyError, BadZipFile, ZlibError) as error:
        raise UsageError(f"data file {archive} is damaged ({error}); delete it and run again") from error


def _rows(images, labels):
    """[N, 3073]: label, then the R, G and B planes, as in the official binary format."""
    planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    return np.concatenate([labels.astype(np.uint8).reshape(-1, 1), planes], axis=1)


def _verified(batches, source):
    """(train, test) of the bytes of the six official files, which must have the official checksums."""
    for batch, (name, expected) in zip(batches, MD5.items(), strict=True):
        if md5(batch.tobytes(), usedforsecurity=False).hexdigest() != expected:
            raise UsageError(f"{name} of {source} is damaged; delete {source} and run again")
    return _batch(np.concatenate(batches[:-1])), _batch(batches[-1])


def _batch(data):
    rows = data.reshape(-1, 3073)
    return torch.from_numpy(rows[:, 1:].reshape(-1, 3, 32, 32)), torch.from_numpy(rows[:, 0].astype(np.int64))


def _fetch(home):
    from torchvision.datasets.utils import download_url

    packed = home / Path(ARCHIVE).name
    download(lambda: download_url(ARCHIVE, str(home), md5=ARCHIVE_MD5), "CIFAR-10", home)
    (home / FOLDER).mkdir(exist_ok=True)
    with tarfile.open(packed) as tar:
        for name in MD5:
            write_atomically(home / FOLDER / name, tar.extractfile(f"{FOLDER}/{name}").read())
