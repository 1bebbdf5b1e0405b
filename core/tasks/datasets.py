"""Image data sets: read from their files, or generated."""

import os
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import md5, sha256
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile, is_zipfile
from zlib import error as ZlibError

import numpy as np
import torch
from torch import Tensor

from ..errors import UsageError
from ..files import check_file, read_file, write_atomically
from ..seeds import generator

Split = tuple[Tensor, Tensor]  # images uint8 [N, ...], labels long [N]
Bytes = np.ndarray[Any, np.dtype[np.uint8]]

MNIST_SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
FASHION_SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
MOST = 1 << 28  # bytes of one file, unpacked
CIFAR = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR_ARCHIVE_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
CIFAR_FOLDER = "cifar-10-batches-bin"
CIFAR_MD5 = {
    "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
    "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
    "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
    "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
    "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
    "test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d",
}


def load_mnist(data_dir: str) -> tuple[Split, Split]:
    """Load MNIST: 60,000 and 10,000 handwritten digits of 28 x 28 pixels (LeCun et al., 1998).

    Returns (train, test), each (images uint8 [N, 28, 28], labels long [N]), from torchvision's files under data_dir;
    missing files are downloaded and checked. Raises UsageError if a file is damaged or can't be downloaded.
    """
    from torchvision.datasets import MNIST

    return _mnist_like(MNIST, "MNIST", MNIST_SHA256, data_dir)


def load_fashion_mnist(data_dir: str) -> tuple[Split, Split]:
    """Load Fashion-MNIST: 60,000 and 10,000 images of clothes of 28 x 28 pixels (Xiao et al., 2017).

    Otherwise like `load_mnist`.
    """
    from torchvision.datasets import FashionMNIST

    return _mnist_like(FashionMNIST, "FashionMNIST", FASHION_SHA256, data_dir)


def load_cifar10(data_dir: str) -> tuple[Split, Split]:
    """Load CIFAR-10: 50,000 and 10,000 colour images of 32 x 32 pixels (Krizhevsky, 2009).

    Returns (train, test), each (images uint8 [N, 3, 32, 32], labels long [N]). They are read under data_dir from the
    official binary files (cifar-10-batches-bin/) or from cifar10.npz (x_train, y_train, x_test, y_test; images
    [N, 32, 32, 3]), and downloaded if neither exists. Both are verified against the official checksums; nothing is
    unpickled. Raises UsageError if a file is damaged or can't be downloaded.
    """
    home = Path(data_dir)
    archive = home / "cifar10.npz"
    if not all(os.path.exists(home / CIFAR_FOLDER / name) for name in CIFAR_MD5) and not os.path.exists(archive):
        _fetch_cifar(home)
    return _from_npz(archive) if os.path.exists(archive) else _from_binary(home / CIFAR_FOLDER)


def blob_images(
    counts: Sequence[int],
    classes: int,
    random: torch.Generator,
    *,
    side: int = 28,
    channels: int = 0,
    parts: int = 4,
    width: float = 0.08,
    jitter: float = 0.04,
    noise: float = 0.0,
) -> list[Split]:
    """Generate one data set of classified images for each count, all of the same classes.

    Returns (images uint8 [n, side, side], or [n, channels, side, side] with channels > 0; labels long [n]) for each n
    in counts, drawn from the generator `random`. A class fixes the places and colours of its `parts` soft blobs. Each
    image shifts all of them by N(0, 0.05^2), each blob by N(0, jitter^2) more, and adds pixel noise N(0, noise^2).
    Lengths are in units of the image's side; width is a blob's standard deviation, and its peak is 1.
    """
    centres_CP2 = torch.rand(classes, parts, 2, generator=random) * 0.7 + 0.15
    colours_CPK = torch.ones(classes, parts, 1)
    if channels:
        colours_CPK = torch.rand(classes, parts, channels, generator=random)
    line = (torch.arange(side) + 0.5) / side

    def draw(count: int) -> Split:
        labels = torch.randint(classes, (count,), generator=random)
        shift = 0.05 * torch.randn(count, 1, 2, generator=random)
        if jitter:
            shift = shift + jitter * torch.randn(count, parts, 2, generator=random)
        centres_NP2 = centres_CP2[labels] + shift
        images = torch.zeros(count, channels or 1, side, side)
        for part in range(parts):
            y, x = (torch.exp(-(((line - centres_NP2[:, part, axis, None]) / width) ** 2) / 2) for axis in (0, 1))
            y = colours_CPK[labels, part, :, None] * y[:, None]
            torch.maximum(images, y[..., None] * x[:, None, None], out=images)
        images = images if channels else images[:, 0]
        images = images + noise * torch.randn(images.shape, generator=random)
        return (images.clamp(0, 1) * 255).to(torch.uint8), labels

    return [draw(count) for count in counts]


def join_datasets(sets: Iterable[tuple[Split, Split]], classes: int) -> tuple[Split, Split]:
    """Join the (train, test) of several data sets of `classes` classes each; labels of set n are offset by n classes.

    Training rows stay ordered by set. Test rows are shuffled in one fixed order, because a forward over the rows of
    a single set would look like collapse.
    """
    train, test = (
        (torch.cat([images for images, _ in split]), torch.cat([classes * n + y for n, (_, y) in enumerate(split)]))
        for split in zip(*sets, strict=True)
    )
    order = torch.randperm(len(test[0]), generator=generator(0, "joined test order"))
    return train, (test[0][order], test[1][order])


def _mnist_like(dataset: Callable[..., Any], name: str, sums: Mapping[str, str], data_dir: str) -> tuple[Split, Split]:
    """A torchvision data set in MNIST's format, verified against the SHA-256 sums of its four files.

    Missing files are downloaded into data_dir, with progress and the publisher's checksum. Raises UsageError if
    that fails, or if a file is damaged.
    """
    folder = Path(data_dir) / name / "raw"
    if not all(os.path.exists(folder / file) for file in sums):
        source = f"the four files of {dataset.mirrors[0]}"  # type: ignore[attr-defined]
        _download(lambda: dataset(data_dir, download=True), name, folder, source)
    for file, expected in sums.items():
        _verify(folder / file, expected)
    splits = [dataset(data_dir, train=train, download=False) for train in (True, False)]
    train, test = [(split.data, split.targets.long()) for split in splits]
    return train, test


def _download(fetch: Callable[[], Any], name: str, folder: Path, source: str) -> None:
    """Call `fetch` to download the source into `folder`; a failure becomes a UsageError that says what to do."""
    try:
        fetch()
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".:")
        raise UsageError(
            f"{name} is not in {folder} and can't be downloaded ({reason}); "
            f"name the folder that holds it with --data-dir, or put {source} there yourself",
            code="download-failed",
        ) from error


def _verify(file: Path, expected: str) -> None:
    try:
        found = sha256(read_file(file, MOST)).hexdigest()
    except OSError as error:
        raise UsageError(f"data file {file} can't be read: {error.strerror}", code="unreadable-file") from error
    if found != expected:
        raise UsageError(
            f"data file {file} is damaged (SHA-256 {found[:12]}..., not {expected[:12]}...); delete it and run again",
            code="damaged-data",
        )


def _from_binary(folder: Path) -> tuple[Split, Split]:
    try:
        return _verified(
            [np.frombuffer(bytearray(read_file(folder / name, MOST)), np.uint8) for name in CIFAR_MD5], folder
        )
    except OSError as error:
        raise UsageError(
            f"data file {error.filename} can't be read: {error.strerror}", code="unreadable-file"
        ) from error


def _from_npz(archive: Path) -> tuple[Split, Split]:
    try:
        check_file(archive)
        if not is_zipfile(archive):
            raise BadZipFile("not an .npz archive")
        with ZipFile(archive) as packed:
            if sum(member.file_size for member in packed.infolist()) > MOST:
                raise BadZipFile(f"unpacked, it is larger than {MOST} bytes")
        with open(archive, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            train, test = (_rows(arrays[f"x_{split}"], arrays[f"y_{split}"]) for split in ("train", "test"))
            return _verified([batch.ravel() for batch in (*np.split(train, 5), test)], archive)
    except (OSError, ValueError, KeyError, BadZipFile, ZlibError, MemoryError) as error:
        why = f"data file {archive} is damaged ({error}); delete it and run again"
        raise UsageError(why, code="damaged-data") from error


def _rows(images: Bytes, labels: Bytes) -> Bytes:
    """[N, 3073]: label, then the R, G and B planes, as in the official binary format."""
    planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    return np.concatenate([labels.astype(np.uint8).reshape(-1, 1), planes], axis=1)


def _verified(batches: Sequence[Bytes], source: Path) -> tuple[Split, Split]:
    """(train, test) from the bytes of the six official files, which must have the official checksums."""
    for batch, (name, expected) in zip(batches, CIFAR_MD5.items(), strict=True):
        if md5(batch.tobytes(), usedforsecurity=False).hexdigest() != expected:
            raise UsageError(f"{name} of {source} is damaged; delete {source} and run again", code="damaged-data")
    return _split(np.concatenate(batches[:-1])), _split(batches[-1])


def _split(data: Bytes) -> Split:
    rows = data.reshape(-1, 3073)
    return torch.from_numpy(rows[:, 1:].reshape(-1, 3, 32, 32)), torch.from_numpy(rows[:, 0].astype(np.int64))


def _fetch_cifar(home: Path) -> None:
    from torchvision.datasets.utils import download_url

    packed = home / Path(CIFAR).name
    _download(lambda: download_url(CIFAR, str(home), md5=CIFAR_ARCHIVE_MD5), "CIFAR-10", home, CIFAR)
    (home / CIFAR_FOLDER).mkdir(exist_ok=True)
    with tarfile.open(packed) as tar:
        for name in CIFAR_MD5:
            member = tar.extractfile(f"{CIFAR_FOLDER}/{name}")
            assert member is not None  # the archive's checksum was verified
            write_atomically(home / CIFAR_FOLDER / name, member.read())
