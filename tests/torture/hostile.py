"""Hostile cases: files of absurd kinds and sizes, and absurd numbers, given to every command that takes one.

Each ends with one sentence, within LIMIT seconds of a processor and MOST mebibytes.
"""

import gzip
import json
import os
import pickle
import socket
import struct
import zipfile
from contextlib import chdir
from itertools import product

import numpy as np

from torture.cases import Verdict
from torture.shim import command

LIMIT, MOST = 10, 1024
MANY = "9" * 30


# -- files -----------------------------------------------------------------------------------------


def fifo(path):
    os.mkfifo(path)


def link_to_zero(path):
    path.symlink_to("/dev/zero")


def link_to_itself(path):
    path.symlink_to(path.name)


def link_to_nothing(path):
    path.symlink_to("nothing")


def a_socket(path):
    with chdir(path.parent), socket.socket(socket.AF_UNIX) as one:  # its path must be short
        one.bind(path.name)


def folder(path):
    path.mkdir()


def folder_of_folders(path):
    for name in ("config.toml", "metrics.jsonl", "summary.json", "study.json", "checkpoints", "config.json"):
        (path / name).mkdir(parents=True)


def folder_of_fifos(path):
    path.mkdir()
    for name in ("config.toml", "metrics.jsonl", "summary.json", "study.json", "config.json", "routing.safetensors"):
        os.mkfifo(path / name)


def folder_of_zeros(path):
    path.mkdir()
    for name in ("config.toml", "metrics.jsonl", "summary.json", "study.json", "config.json", "routing.safetensors"):
        (path / name).symlink_to("/dev/zero")


def folder_of_depth(path):
    path.mkdir()
    (path / "config.toml").write_text("[run]\n")
    for name in ("metrics.jsonl", "summary.json", "study.json", "config.json"):
        (path / name).write_text("[" * 200_000)


def unreadable(path):
    path.write_bytes(b"layer,expert,count\n0,0,1\n")
    path.chmod(0)


def empty(path):
    path.write_bytes(b"")


def zeros(path):
    path.write_bytes(bytes(1 << 20))


def sparse(path):
    with path.open("wb") as file:
        file.truncate(1 << 40)


def keys(path):
    path.write_text("".join(f"k{number} = 1\n" for number in range(1_500_000)))


def one_deep_key(path):
    path.write_text("[" + "a." * 100_000 + "b]\n")


def deep_list(path):
    path.write_text("x = " + "[" * 100_000)


def deep_json(path):
    path.write_text("[" * 200_000 + "]" * 200_000)


def deep_objects(path):
    path.write_text('{"a":' * 100_000 + "1" + "}" * 100_000)


def many_digits(path):
    path.write_text("[" + "9" * 2_000_000 + "]")


def many_keys(path):
    path.write_text(json.dumps({f"k{number}": number for number in range(500_000)}))


def wide_csv(path):
    names = ",".join(f"expert{number}" for number in range(100_000))
    path.write_text(f"layer,split,{names}\n" + f"0,train,{','.join(['1'] * 100_000)}\n" * 3)


def wide_text_csv(path):
    names = ",".join(f"name{number}" for number in range(100_000))
    path.write_text(f"layer,expert,count,{names}\n" + f"0,0,5,{','.join(['x'] * 100_000)}\n" * 3)


def long_cell(path):
    path.write_text("layer,expert,count\n0,0," + "1" * 20_000_000 + "\n")


def open_quote(path):
    path.write_text('layer,expert,count\n0,0,"1\n' + "0,1,2\n" * 1_000_000)


def many_series(path):
    path.write_text("layer,expert,count\n" + "".join(f"{number},0,1\n" for number in range(300_000)))


def far_expert(path):
    path.write_text("layer,expert,count\n0,99999,1\n" + "".join(f"{number},99999,1\n" for number in range(5_000)))


def many_delimiters(path):
    path.write_text(",;\t|" * 2_000_000 + "\n1\n")


def many_lines(path):
    path.write_text("\n" * 20_000_000)


def gzip_bomb(path):
    with gzip.open(path, "wb") as file:
        for _ in range(64):
            file.write(bytes(1 << 24))


def zip_bomb(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file, file.open("x.csv", "w", force_zip64=True) as inner:
        for _ in range(64):
            inner.write(bytes(1 << 24))


def a_pickle(path):
    path.write_bytes(pickle.dumps(Bomb()))


def npy_claim(path):
    header = "{'descr': '<f8', 'fortran_order': False, 'shape': (1152921504606846976,), }".ljust(117) + "\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode())


def npz(path):
    with path.open("wb") as file:
        np.savez(file, counts=np.ones(3))


def header_claim(path):
    path.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")


def header_to_the_end(path):
    path.write_bytes(struct.pack("<Q", 50_000_000) + b"{" * 50_000_000)


def tensor_claim(path):
    _tensors(path, {"x": {"dtype": "F32", "shape": [1 << 40, 1 << 20], "data_offsets": [0, 1 << 62]}})


def tensor_overlap(path):
    one = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    _tensors(path, {"x": one, "y": one}, bytes(4))


def tree_depth(path):
    meta = {"tree": "[" * 100_000, "shards": "{}", "sha256": "0" * 64}
    _tensors(path, {"__metadata__": meta, "x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(4))


def _tensors(path, header, content=b""):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content)


class Bomb:
    """Unpickled, it would leave a mark."""

    def __reduce__(self):
        return os.system, ("touch unpickled",)


FILES = (
    *(fifo, link_to_zero, link_to_itself, link_to_nothing, a_socket, folder, folder_of_folders, folder_of_fifos),
    *(folder_of_zeros, folder_of_depth, unreadable, empty, zeros, sparse, keys, one_deep_key, deep_list, deep_json),
    *(deep_objects, many_digits, many_keys, wide_csv, wide_text_csv, long_cell, open_quote, many_series, far_expert),
    *(many_delimiters, many_lines, gzip_bomb, zip_bomb, a_pickle, npy_claim, npz, header_claim, header_to_the_end),
    *(tensor_claim, tensor_overlap, tree_depth),
)
READERS = (
    ("routing-stats", "{}", "--json"),
    ("run", "--config", "{}"),
    ("run", "--task", "mnist", "--data-dir", "{}", "--epochs", "1", "--steps", "1", "--quiet"),
    ("run", "--out", "{}", "--task", "blobs", "--steps", "1", "--quiet", "--no-plugin", "plots,html"),
    ("compare", "{}"),
    ("resume", "{}"),
    ("replay", "{}"),
    ("study", "{}.toml"),
    ("study", "growth", "--check", "--out", "{}"),
    ("export", "{}", "exported"),
)


# -- numbers ---------------------------------------------------------------------------------------

RUN = ("run", "--task", "blobs", "--steps", "1", "--quiet", "--no-plugin", "plots,html")
PLAN = ("plan", "--layers", "2", "--dim", "8", "--hidden", "8", "--experts", "4", "--ranks", "4")
CLUSTER = ("--memory", "80", "--rate", "300", "--bandwidth", "50")
SIZES = (
    *(
        (*RUN, flag, value)
        for flag in ("--experts", "--top-k", "--batch-size", "--epochs", "--seed")
        for value in (MANY, "-1", "0", "100000000")
    ),
    *(
        (*RUN, "--set", f"blobs.{name}={value}")
        for name in ("images", "test_images", "dim", "hidden", "classes")
        for value in (MANY, "-1", "0", "10000000000")
    ),
    *(
        (*PLAN, *CLUSTER, flag, value)
        for flag in ("--layers", "--dim", "--experts", "--ranks", "--sequence")
        for value in (MANY, "0", "1000000000000")
    ),
    *(
        (*PLAN, *CLUSTER, flag, value)
        for flag in ("--memory", "--rate", "--bandwidth", "--skew", "--latency")
        for value in ("1e308", "-1", "0", "1e-308")
    ),
    (*RUN, "--plugins", ",".join(["topk"] * 20_000)),
    (*RUN, "--plugins", "x" * 100_000),
    (*RUN, *("--set", "blobs.images=64") * 5_000),
    ("study", "growth", "--seeds", MANY),
    ("routing-stats", *["no"] * 20_000),
    ("compare", *["no"] * 20_000),
)


def cases():
    """(name, call of a folder) of every case: each file to each command, and each number."""
    for make, words in product(FILES, READERS):
        yield (
            f"{make.__name__} to {' '.join(words[:3])}",
            lambda place, make=make, words=words: of_file(place, make, words),
        )
    for number, words in enumerate(SIZES):
        yield f"size {number}", lambda place, words=words: judged(place, words)


def of_file(place, make, words):
    """A file, given to a command."""
    place.mkdir(exist_ok=True)
    path = place / ("x.toml" if "{}.toml" in words else "x")
    make(path)
    try:
        return judged(place, [word.format(place / "x") for word in words], make.__name__)
    finally:
        _remove(path)


def _remove(path):
    if path.is_dir() and not path.is_symlink():
        for child in path.iterdir():
            _remove(child)
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def judged(place, words, what=""):
    """A command that must end soon, small and with one sentence, in a folder."""
    place.mkdir(exist_ok=True)
    verdict = Verdict(f"{what} {' '.join(words)}"[:200])
    with chdir(place):
        outcome = command(words, limit=60, room=4 << 30)
    verdict.judge(outcome, verdict.case)
    verdict.seconds, verdict.mebibytes = outcome.seconds, outcome.mebibytes
    if outcome.code not in (0, 1, 2, None) or (outcome.code and len(outcome.err.splitlines()) != 1):
        verdict.blame("unclear", f"exit {outcome.code}: {outcome.err[:300]}")
    if outcome.seconds > LIMIT or outcome.mebibytes > MOST:
        verdict.blame("large", f"{outcome.seconds:.1f} s, {outcome.mebibytes} MiB")
    if (place / "unpickled").exists():
        verdict.blame("unpickled", verdict.case)
    return verdict
