"""Every error of the command line: one sentence on standard error, the right exit code, nothing half-written."""

import errno
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest

from moe_engine.cli import main
from moe_engine.errors import listed
from moe_engine.registry.discovery import find

VERSION = metadata.version("moe-engine")
QUICK = ("run", "--epochs", "1", "--no-plugin", "plots,html", "--quiet")
FORM = "is not of the form plugin.option=value"


def tree(folder):
    """Every path below a folder."""
    return sorted(str(path) for path in Path(folder).rglob("*"))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Each test runs in an empty folder of its own."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def call(capsys):
    """Run the command line: (exit code, standard output, standard error)."""

    def run(*argv):
        code = main([str(word) for word in argv])
        return (code, *capsys.readouterr())

    return run


@pytest.fixture
def refusal(call, here):
    """The sentence with which bad input is refused; code, one line, silence and cleanliness are checked."""

    def run(*argv):
        before = tree(here)
        code, out, err = call(*argv)
        assert (2, "", before) == (code, out, tree(here)), err
        return sentence_of(err)

    return run


def sentence_of(err):
    """What stands after "moe-engine: " on the one line of standard error."""
    found = re.fullmatch(r"moe-engine: (\S.*)\n", err)
    assert found is not None, err
    return found[1]


# -- names -----------------------------------------------------------------------------------------

TASKS = listed([name for name, found in find().items() if found[0].kind == "task"])
UNKNOWN = {
    "plugin": (["run", "--plugins", "swich_aux"], "there is no plugin 'swich_aux'; did you mean 'switch_aux'?"),
    "third": (["run", "--plugins", "z_loss,html,satur"], "there is no plugin 'satur'; did you mean 'saturation'?"),
    "no plugin": (["run", "--no-plugin", "htm"], "there is no plugin 'htm'; did you mean 'html'?"),
    "shown plugin": (["plugins", "tpk"], "there is no plugin 'tpk'; did you mean 'topk'?"),
    "task": (["run", "--task", "digit"], "there is no task 'digit'; did you mean 'digits'?"),
    "no task": (["run", "--task", "topk"], f"there is no task 'topk'; there is {TASKS}"),
    "device": (["run", "--device", "gpu"], "there is no device 'gpu' here; did you mean 'cpu'?"),
    "number": (["run", "--device", "cpu:1"], "there is no device 'cpu:1' here; leave the number away"),
    "option": (
        ["run", "--plugins", "switch_aux", "--set", "switch_aux.wait=1"],
        "loss 'switch_aux' has no option 'wait'; did you mean 'weight'?",
    ),
    "settings": (
        ["run", "--plugins", "switch_aux", "--set", "topq.groups=2"],
        "options are set for plugin 'topq', which does not exist; did you mean 'topk'?",
    ),
    "not chosen": (
        ["run", "--set", "switch_aux.weight=1"],
        "options are set for plugin 'switch_aux', which is not chosen; add it to --plugins",
    ),
    "taken away": (
        ["run", "--no-plugin", "health", "--set", "health.dead=0.2"],
        "options are set for plugin 'health', which is not chosen; add it to --plugins",
    ),
}


@pytest.mark.parametrize(("argv", "expected"), UNKNOWN.values(), ids=UNKNOWN)
def test_an_unknown_name_is_refused_with_the_nearest_ones(refusal, argv, expected):
    """Plugins, tasks, devices and options: what was typed, and what was meant."""
    assert expected == refusal(*argv)


FLAGS = {
    "flag": (["run", "--expert", "3"], ["--expert", "--experts"]),
    "command": (["rum"], ["rum"]),
    "plugins flag": (["plugins", "--chek"], ["--chek", "--check"]),
    "stray word": (["run", "digits"], ["digits"]),
    "no value": (["run", "--experts"], ["--experts"]),
    "no runs": (["compare"], ["RUN"]),
    "check and name": (["plugins", "--check", "topk"], ["--check"]),
}


@pytest.mark.parametrize(("argv", "words"), FLAGS.values(), ids=FLAGS)
def test_a_wrong_flag_is_refused_by_name(refusal, argv, words):
    """What the command line itself can't read is bad input as well."""
    sentence = refusal(*argv)
    assert words == [word for word in words if word in sentence]


@pytest.mark.parametrize("device", ["", "CPU", "cpu:", "cpu:00", "cpu:x", "cpu:-1", "cpu:\u0660", "cuda:99999", "meta"])
def test_a_device_that_is_not_there_is_refused_by_name(refusal, device):
    """Whatever follows the colon, it is bad input and no bug."""
    assert f"there is no device '{device}' here; " in refusal("run", "--device", device)


# -- options ---------------------------------------------------------------------------------------

OPTIONS = {
    "word": ("switch_aux.weight=abc", "loss 'switch_aux': option 'weight' is a number; 'abc' is not"),
    "empty": ("switch_aux.weight=", "loss 'switch_aux': option 'weight' is a number; '' is not"),
    "nan": ("switch_aux.weight=nan", "loss 'switch_aux': option 'weight' is a number; 'nan' is not"),
    "inf": ("switch_aux.weight=inf", "loss 'switch_aux': option 'weight' is a number; 'inf' is not"),
    "under": ("switch_aux.weight=-1", "loss 'switch_aux': 'weight' must be >= 0: -1.0"),
    "over": ("saturation.decay=1.5", "bias 'saturation': 'decay' must be <= 1: 1.5"),
    "choice": ("saturation.signal=line", "bias 'saturation': 'signal' must be in ('mass', 'weights') (got 'line')"),
    "bool": ("topk.renorm=maybe", "router 'topk': option 'renorm' is true or false or none; 'maybe' is not"),
    "lossy": ("topk.groups=1.5", "router 'topk': option 'groups' is a whole number; '1.5' is not"),
    "task's": ("digits.dim=0", "task 'digits': 'dim' must be >= 1: 0"),
    "no dot": ("weight=1", f"setting 'weight=1' {FORM}"),
    "no equals": ("switch_aux.weight", f"setting 'switch_aux.weight' {FORM}"),
    "no option": ("switch_aux.=1", f"setting 'switch_aux.=1' {FORM}"),
}


@pytest.mark.parametrize(("setting", "expected"), OPTIONS.values(), ids=OPTIONS)
def test_a_wrong_setting_is_refused(refusal, setting, expected):
    """Its type, its bounds, its form."""
    assert expected == refusal("run", "--plugins", "switch_aux,saturation", "--set", setting)


RUN_OPTIONS = {
    "no experts": (["--experts", "0"], "run: 'experts' must be >= 1: 0"),
    "no choice": (["--top-k", "0"], "run: 'top_k' must be >= 1: 0"),
    "no epochs": (["--epochs", "0"], "run: 'epochs' must be >= 1: 0"),
    "no batch": (["--batch-size", "-4"], "run: 'batch_size' must be >= 1: -4"),
    "no log": (["--log-every", "0"], "run: 'log_every' must be >= 1: 0"),
    "seed": (["--seed", "-1"], "run: 'seed' must be >= 0: -1"),
    "lr": (["--lr", "-0.1"], "run: 'lr' must be >= 0: -0.1"),
    "nan": (["--lr", "nan"], "run: option 'lr' is a number; nan is not"),
    "inf": (["--lr", "1e999"], "run: option 'lr' is a number; inf is not"),
    "capacity nan": (["--capacity", "nan"], "run: option 'capacity' is a number or none; nan is not"),
    "capacity 0": (["--capacity", "0"], "capacity is 0.0; it must be 1e-6 to 1e6, or unset to drop nothing"),
    "k over e": (["--experts", "4", "--top-k", "5"], "top_k is 5, but a token can choose 1 to 4 of 4 experts"),
}


@pytest.mark.parametrize(("argv", "expected"), RUN_OPTIONS.values(), ids=RUN_OPTIONS)
def test_a_wrong_value_of_a_flag_is_refused(refusal, argv, expected):
    """Flags have the bounds of options."""
    assert expected == refusal("run", *argv)


@pytest.mark.parametrize("flag", ["--experts", "--top-k", "--epochs", "--batch-size", "--seed", "--log-every"])
@pytest.mark.parametrize("value", ["2.5", "many", "", "1e3", "nan"])
def test_a_flag_that_is_no_whole_number_is_refused_by_name(refusal, flag, value):
    """No rounding, and no guess."""
    sentence = refusal("run", flag, value)
    assert [flag, repr(value)] == [word for word in (flag, repr(value)) if word in sentence]


@pytest.mark.parametrize(
    "argv",
    [
        ["--capacity", "1e300"],
        ["--capacity", "1e-300"],
        ["--batch-size", "9" * 30],
        ["--log-every", "9" * 30],
        ["--seed", "9" * 30],
        ["--experts", "9" * 30],
        ["--set", f"digits.dim={'9' * 30}"],
    ],
    ids=lambda argv: f"{argv[0]} {argv[1][:12]}",
)
def test_a_number_of_absurd_size_is_never_a_bug(call, argv):
    """It works, or it is refused before there is a folder."""
    code, _, err = call(*QUICK, *argv)
    assert (code, Path("runs").exists()) in [(0, True), (2, False)], err


# -- mixes -----------------------------------------------------------------------------------------

RENORM = "topk.renorm at top_k=1 makes every gate the constant 1, and the router can't learn; leave it unset"
PLATEAU = "loss_plateau.fast=0.99 must be below slow=0.99, and that below 1"
MIXES = {
    "two routers": (
        ["--plugins", "topk,sigmoid_topk"],
        "a layer has one router, but 'topk' and 'sigmoid_topk' are all routers; choose one",
    ),
    "renorm at 1": (["--top-k", "1", "--set", "topk.renorm=true"], RENORM),
    "two objections": (
        [
            *("--plugins", "topk,loss_plateau", "--top-k", "1", "--set", "topk.renorm=yes"),
            *("--set", "loss_plateau.fast=0.99"),
        ],
        f"{RENORM}; {PLATEAU}",
    ),
    "groups": (["--set", "topk.groups=3"], "groups=3 does not divide 8 experts"),
    "task as plugin": (["--plugins", "z_loss,digits"], "'digits' is a task; name it with --task digits"),
    "named twice": (["--plugins", "z_loss,switch_aux,z_loss"], "plugin 'z_loss' is named twice"),
    "no router": (["--no-plugin", "topk"], "no router is left; name one with --plugins"),
    "nothing left": (["--no-plugin", ",".join(find())], "no router is left; name one with --plugins"),
}


@pytest.mark.parametrize(("argv", "expected"), MIXES.values(), ids=MIXES)
def test_a_mix_that_makes_no_sense_is_refused(refusal, argv, expected):
    """Whatever a plugin or the core can tell from the settings, all of it at once."""
    assert expected == refusal("run", *argv)


@pytest.mark.parametrize("argv", [["--no-plugin", "digits"], ["--task", "blobs", "--no-plugin", "html,blobs"]])
def test_a_run_without_its_own_task_is_refused_by_its_name(refusal, argv):
    """--no-plugin removes any plugin, but a run has a task."""
    assert argv[-1].split(",")[-1] in refusal("run", *argv)


# -- config files ----------------------------------------------------------------------------------

TABLES = "its tables are [run] and [plugins.NAME]"
WRITTEN = {
    "unknown table": ("[runs]\nlr = 1\n", f"config file c.toml has runs; {TABLES}"),
    "two unknown": ("lr = 1\nexperts = 3\n", f"config file c.toml has experts and lr; {TABLES}"),
    "unknown key": ("[run]\nexpert = 3\n", "run has no option 'expert'; did you mean 'experts'?"),
    "whole": ("[run]\nexperts = 8.0\n", "run: option 'experts' is a whole number; 8.0 is not"),
    "true": ("[run]\nexperts = true\n", "run: option 'experts' is a whole number; True is not"),
    "nan": ("[run]\nlr = nan\n", "run: option 'lr' is a number; nan is not"),
    "task": ("[run]\ntask = 3\n", "run: option 'task' is a word; 3 is not"),
    "unknown task": ("[run]\ntask = 'digit'\n", "there is no task 'digit'; did you mean 'digits'?"),
    "one word": ("[run]\nplugins = 'z_loss'\n", "run: option 'plugins' is a list of words; 'z_loss' is not"),
    "no words": ("[run]\nplugins = ['z_loss', 3]\n", "run: option 'plugins' is a list of words; ['z_loss', 3] is not"),
    "named twice": ("[run]\nplugins = ['z_loss', 'z_loss']\n", "plugin 'z_loss' is named twice"),
    "bounds": ("[run]\ntop_k = 0\n", "run: 'top_k' must be >= 1: 0"),
    "mix": ("[run]\ntop_k = 9\n", "top_k is 9, but a token can choose 1 to 8 of 8 experts"),
    "run": ("run = 3\n", "config file c.toml: 'run' is a table of options, not 3"),
    "plugins": ("plugins = ['topk']\n", "config file c.toml: 'plugins' is a table of options, not ['topk']"),
    "plugin": ("[plugins]\ntopk = 1\n", "config file c.toml: 'topk' is a table of options, not 1"),
    "run hidden": ("run = 3\n[plugins.run]\n", "config file c.toml: 'run' is a table of options, not 3"),
    "no such option": ("[plugins.topk]\nrenrom = 1\n", "router 'topk' has no option 'renrom'; did you mean 'renorm'?"),
    "option": ("[plugins.topk]\nrenorm = [1]\n", "router 'topk': option 'renorm' is true or false or none; [1] is not"),
    "not chosen": (
        "[plugins.z_loss]\nweight = 1\n",
        "options are set for plugin 'z_loss', which is not chosen; add it to --plugins",
    ),
    "no such plugin": (
        "[plugins.topq]\ngroups = 1\n",
        "options are set for plugin 'topq', which does not exist; did you mean 'topk'?",
    ),
    "past floats": (f"[run]\nlr = {10**400}\n", f"run: option 'lr' is a number; {10**400} is not"),
}


@pytest.mark.parametrize(("text", "expected"), WRITTEN.values(), ids=WRITTEN)
def test_a_config_file_with_a_wrong_entry_is_refused(refusal, here, text, expected):
    """Unknown tables and keys, wrong types, and everything that flags are held against."""
    (here / "c.toml").write_text(text, "utf-8")
    assert expected == refusal("run", "--config", "c.toml")


NO_TOML = {
    "words": b"experts 8",
    "half": b"[run]\nexperts =",
    "not UTF-8": b"[run]\ntask = '\xff'",
    "too many digits": b"[run]\nseed = " + b"9" * 5000,
    "too deep": b"[run]\nplugins = " + b"[" * 5000,
    "twice": b"[run]\nseed = 1\nseed = 2\n",
}


@pytest.mark.parametrize("content", NO_TOML.values(), ids=NO_TOML)
def test_a_config_file_that_is_no_toml_is_refused_by_name(refusal, here, content):
    """Whatever the bytes are, they are the file's fault."""
    (here / "c.toml").write_bytes(content)
    assert refusal("run", "--config", "c.toml").startswith("config file c.toml is not TOML: ")


@pytest.mark.parametrize(
    ("name", "code"), [("absent.toml", errno.ENOENT), (".", errno.EISDIR), ("x" * 300, errno.ENAMETOOLONG)]
)
def test_a_config_file_that_cannot_be_read_is_refused(refusal, name, code):
    """Absent, a folder, or a name that can't be."""
    expected = f"config file {name} can't be read: {os.strerror(code)}"
    assert expected == refusal("run", "--config", name)


def test_a_flag_goes_before_a_wrong_entry_of_the_file(refusal, here):
    """What a flag replaces is not looked at; what --set replaces is neither."""
    (here / "c.toml").write_text("[run]\nexperts = 'x'\ntop_k = 9\n[plugins.topk]\ngroups = 'x'\n", "utf-8")
    expected = "top_k is 9, but a token can choose 1 to 4 of 4 experts"
    assert expected == refusal("run", "--config", "c.toml", "--experts", "4", "--set", "topk.groups=1")


# -- the run's folder ------------------------------------------------------------------------------


def test_a_folder_that_is_not_empty_is_refused(refusal, here):
    """Nothing in it is touched."""
    (here / "old").mkdir()
    (here / "old" / "summary.json").write_text("mine", "utf-8")
    expected = "old is not an empty folder; name another one with --out"
    assert expected == refusal(*QUICK, "--out", "old")
    assert (here / "old" / "summary.json").read_text("utf-8").startswith("mine")


def test_a_file_in_the_place_of_the_folder_is_refused(refusal, here):
    """The file stays as it is."""
    (here / "file").write_bytes(b"")
    expected = "file is not an empty folder; name another one with --out"
    assert expected == refusal(*QUICK, "--out", "file")


@pytest.mark.parametrize(("out", "code"), [("file/run", errno.ENOTDIR), ("x" * 300, errno.ENAMETOOLONG)])
def test_a_folder_that_cannot_be_made_is_refused(refusal, here, out, code):
    """Below a file, or with a name that can't be."""
    (here / "file").write_bytes(b"")
    expected = f"folder {out} can't be written: {os.strerror(code)}; name another one with --out"
    assert expected == refusal(*QUICK, "--out", out)


def test_a_file_in_the_place_of_the_default_folder_is_refused(refusal, here):
    """runs/ is where runs go; if it is a file, there is no run."""
    (here / "runs").write_bytes(b"")
    sentence = refusal(*QUICK)
    assert sentence.startswith("folder runs/digits-") and sentence.endswith("; name another one with --out")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="permissions do not bind root")
def test_a_folder_without_permission_is_refused(refusal, here):
    """Found out before the first step, not after the last one."""
    (here / "locked").mkdir(mode=0o500)
    expected = f"folder locked can't be written: {os.strerror(errno.EACCES)}; name another one with --out"
    assert expected == refusal(*QUICK, "--out", "locked")


@pytest.mark.parametrize("name", ["a[red]b", "a[/b]", "a[link=x]"])
def test_brackets_in_a_folders_name_are_no_markup(call, name):
    """A finished run is told with its folder as it was typed."""
    code, out, _ = call(*QUICK, "--out", name)
    assert (0, f"run: {name}") == (code, out.splitlines()[-1])


# -- data ------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path, monkeypatch):
    """An empty --data-dir, and no network."""

    def fail(*_, **__):
        raise URLError("offline")

    for name in ("mnist.download_and_extract_archive", "utils.download_url", "utils.urllib.request.urlopen"):
        monkeypatch.setattr(f"torchvision.datasets.{name}", fail)
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


ABSENT = {
    "mnist": ("MNIST", "MNIST/raw"),
    "fashion_mnist": ("FashionMNIST", "FashionMNIST/raw"),
    "cifar10": ("CIFAR-10", ""),
}
SOURCES = {
    "MNIST": "the four files of https://ossci-datasets.s3.amazonaws.com/mnist/",
    "FashionMNIST": "the four files of http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    "CIFAR-10": "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
}


def advice(name):
    return f"); name the folder that holds it with --data-dir, or put {SOURCES[name]} there yourself"


MNIST_FILES = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]


@pytest.mark.parametrize("task", ABSENT)
def test_data_that_is_absent_and_cannot_be_fetched_is_refused(refusal, data, task):
    """The data set, the folder where it was looked for, and what to do."""
    name, below = ABSENT[task]
    sentence = refusal("run", "--task", task, "--data-dir", data)
    assert sentence.startswith(f"{name} is not in {data / below}, and can't be downloaded (")
    assert sentence.endswith(advice(name))


@pytest.mark.parametrize(
    ("task", "source", "name"), [("autoencoder", "mix", "MNIST"), ("conv_autoencoder", "cifar10", "CIFAR-10")]
)
def test_a_task_of_other_data_is_refused_where_they_are_absent(refusal, data, task, source, name):
    sentence = refusal("run", "--task", task, "--set", f"{task}.data={source}", "--data-dir", data)
    assert sentence.startswith(f"{name} is not in {data}")
    assert sentence.endswith(advice(name))


def write_mnist(folder, name, files=4):
    """Files with the names of a data set, and a few bytes of something else."""
    (folder / name / "raw").mkdir(parents=True)
    for file in MNIST_FILES[:files]:
        (folder / name / "raw" / file).write_bytes(b"\0\0\x08\x01")
    return folder / name / "raw" / MNIST_FILES[0]


@pytest.mark.parametrize("task", ["mnist", "fashion_mnist"])
def test_a_damaged_data_file_is_refused_by_name(refusal, data, task):
    """Held against its checksum before it is read; the file stays, for its owner to delete."""
    file = write_mnist(data, ABSENT[task][0])
    sentence = refusal("run", "--task", task, "--data-dir", data)
    assert sentence.startswith(f"data file {file} is damaged (SHA-256 ")
    assert sentence.endswith("); delete it and run again")


def test_a_data_set_with_a_file_missing_is_absent(refusal, data):
    """Three files of four are no data set."""
    write_mnist(data, "MNIST", files=3)
    sentence = refusal("run", "--task", "mnist", "--data-dir", data)
    assert sentence.startswith(f"MNIST is not in {data / 'MNIST/raw'}, and can't be downloaded (")


@pytest.mark.parametrize("task", ABSENT)
@pytest.mark.parametrize("folder", ["x" * 300, "file"], ids=["long", "file"])
def test_a_data_folder_that_cannot_be_is_refused(refusal, here, data, task, folder):
    """A name that is too long, or a file in its place."""
    (here / "file").write_bytes(b"")
    assert folder in refusal("run", "--task", task, "--data-dir", folder)


def saved(save, **arrays):
    """The bytes of a NumPy file."""
    out = io.BytesIO()
    save(out, **arrays)
    return out.getvalue()


def flipped(content):
    """The same bytes with the one in the middle inverted."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]


ARCHIVE = saved(np.savez_compressed, x_train=np.arange(5000) % 251)
DAMAGED = {
    "empty": b"",
    "text": b"nonsense",
    "half": ARCHIVE[: len(ARCHIVE) // 2],
    "flipped": flipped(ARCHIVE),
    "one array": saved(np.save, arr=np.zeros(3)),
    "other arrays": ARCHIVE,
    "other shapes": saved(np.savez, **dict.fromkeys(("x_train", "y_train", "x_test", "y_test"), np.zeros(3))),
    "pickled": saved(np.savez, **dict.fromkeys(("x_train", "y_train", "x_test", "y_test"), np.array([None]))),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_archive_is_refused_by_name(refusal, data, content):
    """However it is damaged; nothing is unpickled."""
    (data / "cifar10.npz").write_bytes(content)
    sentence = refusal("run", "--task", "cifar10", "--data-dir", data)
    assert sentence.startswith(f"data file {data / 'cifar10.npz'} is damaged (") and "delete" in sentence


def test_damaged_binary_batches_are_refused_by_name(refusal, data):
    """The first of them that is not as published."""
    folder = data / "cifar-10-batches-bin"
    folder.mkdir()
    for name in (*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"):
        (folder / name).write_bytes(b"\0" * 3073)
    expected = f"data_batch_1.bin of {folder} is damaged; delete {folder} and run again"
    assert expected == refusal("run", "--task", "cifar10", "--data-dir", data)


# -- compare ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert not main([*QUICK, "--out", str(folder)])
    return folder


@pytest.fixture
def copied(finished, here):
    """A copy of it, to be damaged."""
    return shutil.copytree(finished, here / "copy")


@pytest.mark.parametrize("name", ["absent", "file"])
def test_a_run_folder_that_is_not_there_is_refused(refusal, here, finished, name):
    """Named among others that are there."""
    (here / "file").write_bytes(b"")
    expected = f"there is no run folder {name}"
    assert expected == refusal("compare", finished, name)


def test_a_run_folder_with_an_impossible_name_is_refused(refusal):
    """No file system holds a name of 300 characters."""
    assert "x" * 300 in refusal("compare", "x" * 300)


@pytest.mark.parametrize("name", ["summary.json", "metrics.jsonl", "config.toml"])
def test_an_unfinished_run_is_refused_by_what_is_missing(refusal, copied, name):
    """A run that was stopped has no summary."""
    (copied / name).unlink()
    advice = "" if name in ("config.toml", "metrics.jsonl") else f"; moe-engine resume {copied} goes on with it"
    expected = f"{copied} holds no finished run: {name} is missing{advice}"
    assert expected == refusal("compare", copied)


BROKEN_RUN = {
    "empty summary": ("summary.json", b""),
    "half a summary": ("summary.json", b'{"loss": 1'),
    "a list": ("summary.json", b"[]"),
    "a summary without numbers": ("summary.json", b"{}"),
    "not UTF-8": ("summary.json", b"\xff"),
    "layers are no list": ("summary.json", b'{"layers": 3}'),
    "layers of numbers": ("summary.json", b'{"layers": [3]}'),
    "deep": ("summary.json", b"[" * 100_000),
    "empty records": ("metrics.jsonl", b""),
    "half a record": ("metrics.jsonl", b'{"split": "eval", "st'),
    "records are numbers": ("metrics.jsonl", b"3\n"),
    "records without anything": ("metrics.jsonl", b"{}\n"),
    "records without layers": ("metrics.jsonl", b'{"split": "eval", "step": 1, "loss": 1, "layers": 3}\n'),
    "half a config": ("config.toml", b"[run"),
    "a config without run": ("config.toml", b"run = 3\n"),
    "plugins are no list": ("config.toml", b"[run]\nplugins = 3\n"),
    "plugins are numbers": ("config.toml", b"[run]\nplugins = [3]\n"),
}


@pytest.mark.parametrize(("name", "content"), BROKEN_RUN.values(), ids=BROKEN_RUN)
def test_a_damaged_run_is_refused_by_its_folder(refusal, copied, name, content):
    """Whatever is wrong with its files, no picture is left."""
    (copied / name).write_bytes(content)
    assert refusal("compare", copied).startswith(f"run folder {copied} is damaged: ")


def test_a_picture_of_another_kind_is_refused(refusal, finished):
    """The ending says what is drawn."""
    expected = "the picture's name x.gif must end in .png, .svg or .pdf"
    assert expected == refusal("compare", finished, "--out", "x.gif")


@pytest.mark.parametrize(("out", "code"), [("no/x.png", errno.ENOENT), ("file/x.png", errno.ENOTDIR)])
def test_a_picture_that_cannot_be_written_is_refused(refusal, here, finished, out, code):
    """No table is printed before it is."""
    (here / "file").write_bytes(b"")
    expected = f"{out} can't be written: {os.strerror(code)}; name another file with --out"
    assert expected == refusal("compare", finished, "--out", out)


def test_a_run_in_a_folder_with_brackets_keeps_its_name(call, here, finished, monkeypatch):
    """The table's cells are no markup."""
    monkeypatch.setenv("COLUMNS", "250")
    shutil.copytree(finished, here / "a[red]b")
    code, out, _ = call("compare", "a[red]b", "--json")
    expected = (0, ["a[red]b"])
    assert expected == (code, [row["run"] for row in json.loads(out)])
    assert " a[red]b " in call("compare", "a[red]b")[1]


# -- a run that fails later ------------------------------------------------------------------------


def failed(call, *argv):
    """Standard error of a run that fails after it began; the code and silence are checked."""
    expected = (1, "")
    code, out, err = call(*argv)
    assert expected == (code, out), err
    return err


def later(call, *argv):
    """The one sentence with which a quick run fails after it began."""
    return sentence_of(failed(call, *QUICK, *argv))


def test_a_loss_that_is_not_finite_ends_the_run_at_its_step(call):
    """The sentence names the step and what to lower."""
    expected = "the task loss stopped being finite at step 2; lower --lr, or a loss's weight"
    assert expected == later(call, "--lr", "1e30")


def test_a_term_that_is_not_finite_is_named_with_its_layer(call):
    """The step is the first one that failed, not the one at which it was found."""
    sentence = later(call, "--lr", "1e30", "--plugins", "z_loss,switch_aux")
    assert "the loss term 'z_loss.expert' of layer 'moe'" in sentence
    assert " at step 2; lower --lr" in sentence


def test_a_loss_that_is_first_seen_not_finite_on_the_test_set_is_no_bug(call):
    """An evaluation may come before the log point that finds it; progress is shown all the same."""
    argv = ("run", "--no-plugin", "plots,html", "--epochs", "2", "--lr", "1e30", "--log-every", "1000")
    last = failed(call, *argv).splitlines()[-1]
    assert last.startswith("moe-engine: the task loss stopped being finite at step 2; ")


NUMBERS = itertools.count()


@pytest.fixture
def distribution(tmp_path, monkeypatch):
    """Install a distribution of plugins, {name: (group, body of its class)}, all in one module."""

    def make(**plugins):
        number = next(NUMBERS)
        module, home = f"plugins_of_a_test_{number}", tmp_path / f"site{number}"
        heads = [f"@attrs.define(eq=False)\nclass {name.title()}:\n    '''A test's.'''\n" for name in plugins]
        classes = [head + body for head, (_, body) in zip(heads, plugins.values(), strict=True)]
        home.mkdir()
        imports = "import attrs\nfrom moe_engine import LinearRouter, UsageError, hookimpl, option\n"
        (home / f"{module}.py").write_text("\n\n".join([imports, *classes]), "utf-8")
        info = home / "fragile-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fragile\nVersion: 1.0\n", "utf-8")
        points = [f"[moe_engine.{group}]\n{name} = {module}:{name.title()}\n" for name, (group, _) in plugins.items()]
        (info / "entry_points.txt").write_text("".join(points), "utf-8")
        monkeypatch.syspath_prepend(str(home))

    return make


def hook(signature, *lines):
    """The source of a hook's implementation."""
    return "".join(["    @hookimpl\n", f"    def {signature}:\n", *(f"        {line}\n" for line in lines)])


LATER = {
    "metrics": ("metrics", "metric", hook("moe_metrics(self, stats)", "raise ValueError('why')")),
    "loss": (
        "losses",
        "loss",
        "    calls: int = attrs.field(default=0, init=False)\n"
        + hook(
            "moe_aux_loss(self, routing)",
            "self.calls += 1",
            "if self.calls > 3: raise ValueError('why')",
            "return routing.probs.sum()",
        ),
    ),
    "report": ("reports", "report", hook("moe_report(self, run)", "raise ValueError('why')")),
    "usage": ("metrics", "metric", hook("moe_metrics(self, stats)", "raise UsageError('why')")),
    "two lines": ("metrics", "metric", hook("moe_metrics(self, stats)", "raise ValueError('why\\n\\tso')")),
    "end of file": ("metrics", "metric", hook("moe_metrics(self, stats)", "raise EOFError('why')")),
    "pipe": ("metrics", "metric", hook("moe_metrics(self, stats)", "raise BrokenPipeError(32, 'why')")),
    "exit": ("metrics", "metric", hook("moe_metrics(self, stats)", "raise SystemExit('why')")),
}


@pytest.mark.parametrize(("group", "kind", "body"), LATER.values(), ids=LATER)
def test_a_plugin_that_raises_in_a_run_is_named(call, distribution, group, kind, body):
    """Kind, plugin, distribution, hook, step and error in one sentence; the traceback is in the run's log."""
    distribution(fragile=(group, body))
    sentence = later(call, "--plugins", "fragile", "--out", "out")
    named = re.match(rf"{kind} 'fragile' \(fragile 1\.0\) in (moe_\w+) failed at step \d+: \w+: ", sentence)
    assert named and f"def {named[1]}(" in body
    assert "why" in sentence and sentence.endswith(" (traceback in out/run.log, or use --debug)")
    assert "Traceback (most recent call last)" in Path("out/run.log").read_text("utf-8")


def test_debug_shows_the_traceback_of_a_plugin_that_raises(call, distribution):
    """Before the same sentence, with the same exit code."""
    distribution(fragile=LATER["metrics"][::2])
    err = failed(call, *QUICK, "--plugins", "fragile", "--debug")
    assert err.startswith("Traceback (most recent call last)") and "raise ValueError('why')" in err
    assert err.splitlines()[-1].startswith("moe-engine: metric 'fragile' (fragile 1.0) in moe_metrics failed at step ")


@pytest.mark.parametrize("order", ["first,second", "second,first"])
def test_of_two_plugins_in_one_file_the_one_that_raised_is_named(call, distribution, order):
    """A file may hold several plugins: who raised is told by the code that ran, not by its file."""
    distribution(
        first=("metrics", hook("moe_metrics(self, stats)", "raise ValueError('why')")),
        second=("metrics", hook("moe_metrics(self, stats)", "return {'second': 1.0}")),
    )
    assert later(call, "--plugins", order).startswith("metric 'first' (fragile 1.0) in moe_metrics failed")


def test_two_plugins_with_one_metric_are_both_named(call, distribution):
    """Found before the run has a folder: exit code 2; found after: 1."""
    distribution(fragile=("metrics", hook("moe_metrics(self, stats)", "return {'cv': 1.0}")))
    code, out, err = call(*QUICK, "--plugins", "fragile", "--out", "out")
    names = ["cv", "fragile", "balance"]
    assert names == [name for name in names if name in sentence_of(err)] and not out
    assert (code, Path("out").exists()) in [(2, False), (1, True)]


ANSWERS = {
    "metrics are None": ("metrics", hook("moe_metrics(self, stats)", "return None")),
    "a metric is an object": ("metrics", hook("moe_metrics(self, stats)", "return {'x': object()}")),
    "sums are None": ("metrics", hook("moe_measure(self, routing)", "return None")),
    "a sum is a number": ("metrics", hook("moe_measure(self, routing)", "return {'x': 1.0}")),
    "a loss is a word": ("losses", hook("moe_aux_loss(self, routing)", "return 'x'")),
    "a loss is None": ("losses", hook("moe_aux_loss(self, routing)", "return None")),
    "a bias is a number": ("biases", hook("moe_bias(self, spec, level)", "return 5")),
    "a state is a number": ("losses", hook("moe_state(self, spec)", "return 5")),
    "a router is None": ("routers", hook("moe_router(self, spec)", "return None")),
    "a router is a number": ("routers", hook("moe_router(self, spec)", "return 5")),
    "a router cannot select": ("routers", hook("moe_router(self, spec)", "return LinearRouter(spec)")),
    "an objection is no sentence": ("losses", hook("moe_check(self, setup)", "return True")),
}


@pytest.mark.parametrize(("group", "body"), ANSWERS.values(), ids=ANSWERS)
def test_a_plugin_with_a_senseless_answer_is_named(call, distribution, group, body):
    """Refused before there is a folder, or failed in it; never a bug of the core."""
    distribution(fragile=(group, body))
    code, out, err = call(*QUICK, "--plugins", "fragile", "--out", "out")
    sentence = sentence_of(err)
    assert "'fragile'" in sentence and "this is a bug" not in sentence and not out
    assert (code, Path("out").exists()) in [(2, False), (1, True)]


EARLY = {
    "check raises": hook("moe_check(self, setup)", "raise ValueError('why')"),
    "loss raises": hook("moe_aux_loss(self, routing)", "raise ValueError('why')"),
    "state raises": hook("moe_state(self, spec)", "raise ValueError('why')"),
    "does not build": "    def __attrs_post_init__(self):\n        raise RuntimeError('why')\n",
    "no such hook": hook("moe_why(self, routing)", "return None"),
    "no such argument": hook("moe_aux_loss(self, why)", "return None"),
    "no mark": "    def moe_aux_loss(self, routing):\n        return 'why'\n",
    "no such type": "    count: 'why' = option(1, help='a count')\n",
    "no such name": "    count: int = why\n",
}


@pytest.mark.parametrize("body", EARLY.values(), ids=EARLY)
def test_a_plugin_that_cannot_be_used_is_refused_by_name(refusal, distribution, body):
    """Before anything is written: exit code 2."""
    distribution(fragile=("losses", body))
    assert "loss 'fragile'" in refusal(*QUICK, "--plugins", "fragile")


TASK_BODIES = {
    "raises": hook("moe_task(self, spec)", "raise ValueError('why')"),
    "answers nothing": hook("moe_task(self, spec)", "return None"),
    "is no task": hook("moe_metrics(self, stats)", "return {}"),
}


@pytest.mark.parametrize("body", TASK_BODIES.values(), ids=TASK_BODIES)
def test_a_task_that_cannot_be_used_is_refused_by_name(refusal, distribution, body):
    """A task is a plugin like any other."""
    distribution(fragile=("tasks", body))
    assert "task 'fragile'" in refusal(*QUICK, "--task", "fragile")


def test_a_plugin_without_any_hook_is_refused_by_name(refusal, distribution):
    """A chosen plugin that acts on nothing is an error."""
    distribution(fragile=("losses", "    weight: float = option(1.0, help='coefficient')\n"))
    assert "fragile" in refusal(*QUICK, "--plugins", "fragile")


# -- signals ---------------------------------------------------------------------------------------

COMMAND = (sys.executable, "-c", "import sys; from moe_engine.cli import main; sys.exit(main())")


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_the_run_after_a_checkpoint(here, number, code):
    """One sentence, the code of the signal, and no traceback."""
    argv = ("run", "--epochs", "100000", "--log-every", "1", "--no-plugin", "plots,html", "--out", "out")
    with subprocess.Popen([*COMMAND, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            while "step" not in (line := process.stderr.readline()) or "train" not in line:
                assert line, "the run ended by itself"
            process.send_signal(number)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    last = err.splitlines()[-1]
    assert (code, "") == (process.returncode, out)
    assert re.fullmatch(r"moe-engine: stopped at step [1-9]\d* of \d+; go on with: moe-engine resume out", last)
    assert ("Traceback" in err, len(list((here / "out" / "checkpoints").iterdir()))) == (False, 1)


def test_an_interrupt_before_the_first_step_is_one_line(call, monkeypatch):
    """Exit code 130, nothing written."""

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("moe_engine.run.training.Training", interrupt)
    expected = (130, "", "moe-engine: stopped\n")
    assert expected == call(*QUICK)
    assert not Path("runs").exists()


def test_a_bug_is_one_line_too(call, monkeypatch):
    """What nobody foresaw exits 1 and says how to see more; --debug shows it."""

    def surprise(*_, **__):
        raise LookupError("surprise")

    monkeypatch.setattr("moe_engine.run.training.Training", surprise)
    expected = (1, "", "moe-engine: unexpected LookupError: surprise; this is a bug: --debug shows where\n")
    assert expected == call(*QUICK)
    code, _, err = call(*QUICK, "--debug")
    assert code == 1
    assert "Traceback" in err
    assert err.endswith(expected[2])
