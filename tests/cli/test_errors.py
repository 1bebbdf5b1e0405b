"""Every error of the command line: one sentence on standard error, the right exit code, nothing half-written."""

import errno
import io
import itertools
import json
import os
import re
import shutil
import signal
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest

from moe_engine.cli import main
from moe_engine.registry.discovery import find
from sentences import check, sentence_of
from support import forge
from warm import MOE_ENGINE

QUICK = ("run", "--epochs", "1", "--no-plugin", "plots,html", "--quiet")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Each test runs in an empty folder of its own."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


# -- names -----------------------------------------------------------------------------------------

# the sentences that users meet most, word for word; any other test goes by names and codes
PINNED = {
    "plugin": (["run", "--plugins", "swich_aux"], "there is no plugin 'swich_aux'; did you mean 'switch_aux'?"),
    "task": (["run", "--task", "digit"], "there is no task 'digit'; did you mean 'digits'?"),
    "option": (
        ["run", "--plugins", "switch_aux", "--set", "switch_aux.wait=1"],
        "loss 'switch_aux' has no option 'wait'; did you mean 'weight'?",
    ),
    "value": (
        ["run", "--plugins", "switch_aux", "--set", "switch_aux.weight=abc"],
        "loss 'switch_aux': option 'weight' is a number; 'abc' is not",
    ),
    "not chosen": (
        ["run", "--set", "switch_aux.weight=1"],
        "options are set for plugin 'switch_aux', which is not chosen; add it to --plugins",
    ),
    "two routers": (
        ["run", "--plugins", "topk,sigmoid_topk"],
        "a layer has one router, but 'topk' and 'sigmoid_topk' are all routers; choose one",
    ),
    "no router": (["run", "--no-plugin", "topk"], "no router is left; name one with --plugins"),
    "top_k": (["run", "--experts", "4", "--top-k", "5"], "top_k=5: with 4 experts it must be 1 to 4"),
    "missing run": (["compare", "absent"], "there is no run folder absent"),
    "resume": (["resume", "absent"], "there is no run folder absent"),
    "kind": (["new-plugin", "rooter", "mine"], "unknown kind of plugin 'rooter'; did you mean 'router'?"),
    "check": (["plugins", "--check", "topk"], "--check looks at all plugins; remove 'topk'"),
    "nothing": (
        ["compare-plugins"],
        "there is nothing to compare; name plugins with --routers, --biases, --losses or --growth",
    ),
    "study": (
        ["study", "growth", "--quick", "--check"],
        "--quick judges no criteria, so there is nothing to --check; remove one of them",
    ),
}


@pytest.mark.parametrize(("argv", "expected"), PINNED.values(), ids=PINNED)
def test_the_commonest_mistakes_get_these_sentences(refusal, argv, expected):
    assert expected == refusal(*argv)


TASKS = [name for name, found in find().items() if found[0].kind == "task"]
UNKNOWN = {
    "plugin": (["run", "--plugins", "swich_aux"], ["'swich_aux'", "'switch_aux'"]),
    "third": (["run", "--plugins", "z_loss,html,satur"], ["'satur'", "'saturation'"]),
    "no plugin": (["run", "--no-plugin", "htm"], ["'htm'", "'html'"]),
    "shown plugin": (["plugins", "tpk"], ["'tpk'", "'topk'"]),
    "task": (["run", "--task", "digit"], ["'digit'", "'digits'"]),
    "no task": (["run", "--task", "topk"], ["'topk'", *TASKS]),
    "device": (["run", "--device", "gpu"], ["'gpu'", "'cpu'"]),
    "number": (["run", "--device", "cpu:1"], ["'cpu:1'"]),
    "option": (
        ["run", "--plugins", "switch_aux", "--set", "switch_aux.wait=1"],
        ["loss 'switch_aux'", "'wait'", "'weight'"],
    ),
    "settings": (["run", "--plugins", "switch_aux", "--set", "topq.groups=2"], ["'topq'", "'topk'"]),
    "not chosen": (["run", "--set", "switch_aux.weight=1"], ["'switch_aux'", "--plugins"]),
    "taken away": (["run", "--no-plugin", "health", "--set", "health.dead=0.2"], ["'health'", "--plugins"]),
}


@pytest.mark.parametrize(("argv", "words"), UNKNOWN.values(), ids=UNKNOWN)
def test_an_unknown_name_is_refused_with_the_nearest_ones(refusal, argv, words):
    """Plugins, tasks, devices and options: the word typed, and the one meant."""
    check(refusal(*argv), *words)


OWN = {  # raised by the command line itself
    "check and name": (["plugins", "--check", "topk"], "check-with-name", ["--check", "'topk'"]),
    "nothing": (["compare-plugins"], "nothing-to-compare", ["--routers", "--biases", "--losses", "--growth"]),
    "both": (
        ["compare-plugins", "--biases", "saturation", "--no-plugin", "saturation"],
        "compared-and-left-out",
        ["'saturation'", "--no-plugin"],
    ),
    "quick check": (["study", "growth", "--quick", "--check"], "quick-and-check", ["--quick", "--check"]),
    "no results": (["study", "growth", "--check", "--out", "no"], "no-results", ["no/study.json", "--out"]),
    "no metric": (["routing-stats", "c.csv", "--plugins", "topk"], "not-a-metric", ["'topk'", "router"]),
    "heatmap": (["routing-stats", "c.csv", "--figure", "heat.txt"], "unknown-figure-format", ["heat.txt", ".svg"]),
    "numbers": (
        ["replay", "no", "--capacity", "1.0,much"],
        "not-a-list-of-numbers",
        ["--capacity", "'1.0,much'"],
    ),
    "whole numbers": (["replay", "no", "--top-k", "1.5"], "not-a-list-of-numbers", ["--top-k", "'1.5'"]),
    "not checked": (
        ["check", "topk", "--set", "z_loss.weight=1"],
        "settings-of-unused-plugin",
        ["'z_loss'", "topk"],
    ),
}


@pytest.mark.parametrize(("argv", "code", "words"), OWN.values(), ids=OWN)
def test_a_command_that_makes_no_sense_is_refused(refusal, argv, code, words):
    """With the code of the mistake, and the words that it is about."""
    check(refusal(*argv), *words, code=code)


FLAGS = {
    "flag": (["run", "--expert", "3"], ["--expert", "--experts"]),
    "command": (["rum"], ["rum"]),
    "plugins flag": (["plugins", "--chek"], ["--chek", "--check"]),
    "stray word": (["run", "digits"], ["digits"]),
    "no value": (["run", "--experts"], ["--experts"]),
    "no runs": (["compare"], ["RUN"]),
}


@pytest.mark.parametrize(("argv", "words"), FLAGS.values(), ids=FLAGS)
def test_a_wrong_flag_is_refused_by_name(refusal, argv, words):
    """Words that click refuses are bad input as well."""
    check(refusal(*argv), *words)


@pytest.mark.parametrize("device", ["", "CPU", "cpu:", "cpu:00", "cpu:x", "cpu:-1", "cpu:\u0660", "cuda:99999", "meta"])
def test_a_device_that_is_not_there_is_refused_by_name(refusal, device):
    """Whatever follows the colon, it is bad input, not a bug."""
    check(refusal("run", "--device", device), f"device '{device}'")


# -- options ---------------------------------------------------------------------------------------

OPTIONS = {
    "word": ("switch_aux.weight=abc", ["loss 'switch_aux'", "'weight'", "a number", "'abc'"]),
    "empty": ("switch_aux.weight=", ["loss 'switch_aux'", "'weight'", "a number", "''"]),
    "nan": ("switch_aux.weight=nan", ["loss 'switch_aux'", "'weight'", "a number", "'nan'"]),
    "inf": ("switch_aux.weight=inf", ["loss 'switch_aux'", "'weight'", "a number", "'inf'"]),
    "under": ("switch_aux.weight=-1", ["loss 'switch_aux'", "'weight'", ">= 0", "-1.0"]),
    "over": ("saturation.decay=1.5", ["bias 'saturation'", "'decay'", "<= 1", "1.5"]),
    "choice": ("saturation.signal=line", ["bias 'saturation'", "'signal'", "mass", "weights", "'line'"]),
    "bool": ("topk.renorm=maybe", ["router 'topk'", "'renorm'", "true or false", "none", "'maybe'"]),
    "lossy": ("topk.groups=1.5", ["router 'topk'", "'groups'", "whole number", "'1.5'"]),
    "task's": ("digits.dim=0", ["task 'digits'", "'dim'", ">= 1", "0"]),
    "no dot": ("weight=1", ["'weight=1'", "plugin.option=value"]),
    "no equals": ("switch_aux.weight", ["'switch_aux.weight'", "plugin.option=value"]),
    "no option": ("switch_aux.=1", ["'switch_aux.=1'", "plugin.option=value"]),
}


@pytest.mark.parametrize(("setting", "words"), OPTIONS.values(), ids=OPTIONS)
def test_a_wrong_setting_is_refused(refusal, setting, words):
    """Its type, its bounds, its form."""
    check(refusal("run", "--plugins", "switch_aux,saturation", "--set", setting), *words)


RUN_OPTIONS = {
    "no experts": (["--experts", "0"], ["'experts'", ">= 1", "0"]),
    "no choice": (["--top-k", "0"], ["'top_k'", ">= 1", "0"]),
    "no epochs": (["--epochs", "0"], ["'epochs'", ">= 1", "0"]),
    "no batch": (["--batch-size", "-4"], ["'batch_size'", ">= 1", "-4"]),
    "no log": (["--log-every", "0"], ["'log_every'", ">= 1", "0"]),
    "seed": (["--seed", "-1"], ["'seed'", ">= 0", "-1"]),
    "lr": (["--lr", "-0.1"], ["'lr'", ">= 0", "-0.1"]),
    "nan": (["--lr", "nan"], ["'lr'", "a number", "nan"]),
    "inf": (["--lr", "1e999"], ["'lr'", "a number", "inf"]),
    "precision": (["--precision", "fp8"], ["'precision'", "fp32", "bf16", "'fp8'"]),
    "capacity nan": (["--capacity", "nan"], ["'capacity'", "a number", "none", "nan"]),
    "capacity 0": (["--capacity", "0"], ["capacity", "0.0", "1e-6 to 1e6"]),
    "k over e": (["--experts", "4", "--top-k", "5"], ["top_k", "5", "4 experts"]),
}


@pytest.mark.parametrize(("argv", "words"), RUN_OPTIONS.values(), ids=RUN_OPTIONS)
def test_a_wrong_value_of_a_flag_is_refused(refusal, argv, words):
    """Flags have the bounds of options."""
    check(refusal("run", *argv), *words)


@pytest.mark.parametrize("flag", ["--experts", "--top-k", "--epochs", "--batch-size", "--seed", "--log-every"])
@pytest.mark.parametrize("value", ["2.5", "many", "", "1e3", "nan"])
def test_a_flag_that_is_no_whole_number_is_refused_by_name(refusal, flag, value):
    """No rounding, and no guess."""
    check(refusal("run", flag, value), flag, repr(value))


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

RENORM = ("topk.renorm", "top_k=1")
MIXES = {
    "two routers": (["--plugins", "topk,sigmoid_topk"], ["'topk'", "'sigmoid_topk'", "one router"]),
    "renorm at 1": (["--top-k", "1", "--set", "topk.renorm=true"], RENORM),
    "two objections": (
        [
            *("--plugins", "topk,loss_plateau", "--top-k", "1", "--set", "topk.renorm=yes"),
            *("--set", "loss_plateau.fast=0.99"),
        ],
        [*RENORM, "loss_plateau.fast=0.99", "slow=0.99", "; "],
    ),
    "groups": (["--set", "topk.groups=3"], ["groups=3", "8 experts"]),
    "task as plugin": (["--plugins", "z_loss,digits"], ["'digits'", "--task digits"]),
    "named twice": (["--plugins", "z_loss,switch_aux,z_loss"], ["'z_loss'", "twice"]),
    "no router": (["--no-plugin", "topk"], ["router", "--plugins"]),
    "nothing left": (["--no-plugin", ",".join(find())], ["router", "--plugins"]),
}


@pytest.mark.parametrize(("argv", "words"), MIXES.values(), ids=MIXES)
def test_a_mix_that_makes_no_sense_is_refused(refusal, argv, words):
    """All that a plugin or the core can tell from the settings, at once."""
    check(refusal("run", *argv), *words)


@pytest.mark.parametrize("argv", [["--no-plugin", "digits"], ["--task", "blobs", "--no-plugin", "html,blobs"]])
def test_a_run_without_its_own_task_is_refused_by_its_name(refusal, argv):
    """--no-plugin removes any plugin, but a run has a task."""
    check(refusal("run", *argv), argv[-1].split(",")[-1])


# -- config files ----------------------------------------------------------------------------------

TABLES = ("c.toml", "[run]", "[plugins.NAME]")
WRITTEN = {
    "unknown table": ("[runs]\nlr = 1\n", ["runs", *TABLES]),
    "two unknown": ("lr = 1\nexperts = 3\n", ["experts", "lr", *TABLES]),
    "unknown key": ("[run]\nexpert = 3\n", ["'expert'", "'experts'"]),
    "whole": ("[run]\nexperts = 8.0\n", ["'experts'", "whole number", "8.0"]),
    "true": ("[run]\nexperts = true\n", ["'experts'", "whole number", "True"]),
    "nan": ("[run]\nlr = nan\n", ["'lr'", "a number", "nan"]),
    "task": ("[run]\ntask = 3\n", ["'task'", "3"]),
    "unknown task": ("[run]\ntask = 'digit'\n", ["'digit'", "'digits'"]),
    "one word": ("[run]\nplugins = 'z_loss'\n", ["'plugins'", "a list", "'z_loss'"]),
    "no words": ("[run]\nplugins = ['z_loss', 3]\n", ["'plugins'", "a list", "['z_loss', 3]"]),
    "named twice": ("[run]\nplugins = ['z_loss', 'z_loss']\n", ["'z_loss'", "twice"]),
    "bounds": ("[run]\ntop_k = 0\n", ["'top_k'", ">= 1", "0"]),
    "mix": ("[run]\ntop_k = 9\n", ["top_k", "9", "8 experts"]),
    "run": ("run = 3\n", ["c.toml", "'run'", "table", "3"]),
    "plugins": ("plugins = ['topk']\n", ["c.toml", "'plugins'", "table", "['topk']"]),
    "plugin": ("[plugins]\ntopk = 1\n", ["c.toml", "'topk'", "table", "1"]),
    "run hidden": ("run = 3\n[plugins.run]\n", ["c.toml", "'run'", "table", "3"]),
    "no such option": ("[plugins.topk]\nrenrom = 1\n", ["router 'topk'", "'renrom'", "'renorm'"]),
    "option": ("[plugins.topk]\nrenorm = [1]\n", ["router 'topk'", "'renorm'", "true or false", "none", "[1]"]),
    "not chosen": ("[plugins.z_loss]\nweight = 1\n", ["'z_loss'", "--plugins"]),
    "no such plugin": ("[plugins.topq]\ngroups = 1\n", ["'topq'", "'topk'"]),
    "past floats": (f"[run]\nlr = {10**400}\n", ["'lr'", "a number", 10**400]),
}


@pytest.mark.parametrize(("text", "words"), WRITTEN.values(), ids=WRITTEN)
def test_a_config_file_with_a_wrong_entry_is_refused(refusal, here, text, words):
    """Unknown tables and keys, wrong types, and whatever flags are checked for."""
    (here / "c.toml").write_text(text, "utf-8")
    check(refusal("run", "--config", "c.toml"), *words)


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
    """Whatever the bytes are, the file is to blame."""
    (here / "c.toml").write_bytes(content)
    check(refusal("run", "--config", "c.toml"), "c.toml", "TOML")


@pytest.mark.parametrize(
    ("name", "code"), [("absent.toml", errno.ENOENT), (".", errno.EISDIR), ("x" * 300, errno.ENAMETOOLONG)]
)
def test_a_config_file_that_cannot_be_read_is_refused(refusal, name, code):
    """Absent, a folder, or a name that can't be."""
    check(refusal("run", "--config", name), name, os.strerror(code))


def test_a_flag_goes_before_a_wrong_entry_of_the_file(refusal, here):
    """What a flag replaces is not looked at; what --set replaces is neither."""
    (here / "c.toml").write_text("[run]\nexperts = 'x'\ntop_k = 9\n[plugins.topk]\ngroups = 'x'\n", "utf-8")
    words = ("--config", "c.toml", "--experts", "4", "--set", "topk.groups=1")
    check(refusal("run", *words), "top_k", "9", "4 experts")


# -- the run's folder ------------------------------------------------------------------------------


def test_a_folder_that_is_not_empty_is_refused(refusal, here):
    """Nothing in it is touched."""
    (here / "old").mkdir()
    (here / "old" / "summary.json").write_text("mine", "utf-8")
    check(refusal(*QUICK, "--out", "old"), "old", "empty", "--out")
    assert (here / "old" / "summary.json").read_text("utf-8").startswith("mine")


def test_a_file_in_the_place_of_the_folder_is_refused(refusal, here):
    """The file stays as it is."""
    (here / "file").write_bytes(b"")
    check(refusal(*QUICK, "--out", "file"), "file", "folder", "--out")


@pytest.mark.parametrize(("out", "code"), [("file/run", errno.ENOTDIR), ("x" * 300, errno.ENAMETOOLONG)])
def test_a_folder_that_cannot_be_made_is_refused(refusal, here, out, code):
    """Below a file, or with a name that can't be."""
    (here / "file").write_bytes(b"")
    check(refusal(*QUICK, "--out", out), out, os.strerror(code), "--out")


def test_a_file_in_the_place_of_the_default_folder_is_refused(refusal, here):
    """runs/ is where runs go; if it is a file, there is no run."""
    (here / "runs").write_bytes(b"")
    check(refusal(*QUICK), "runs/digits-", "--out")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="permissions do not bind root")
def test_a_folder_without_permission_is_refused(refusal, here):
    """Found out before the first step, not after the last one."""
    (here / "locked").mkdir(mode=0o500)
    check(refusal(*QUICK, "--out", "locked"), "locked", os.strerror(errno.EACCES), "--out")


@pytest.mark.parametrize("name", ["a[red]b", "a[/b]", "a[link=x]"])
def test_brackets_in_a_folders_name_are_no_markup(call, name):
    """The last line of a run names its folder as it was typed."""
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
    "MNIST": "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "FashionMNIST": "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    "CIFAR-10": "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
}


MNIST_FILES = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]


@pytest.mark.parametrize("task", ABSENT)
def test_data_that_is_absent_and_cannot_be_fetched_is_refused(refusal, data, task):
    """The data set, the folder where it was looked for, and what to do."""
    name, below = ABSENT[task]
    check(refusal("run", "--task", task, "--data-dir", data), name, data / below, "--data-dir", SOURCES[name])


@pytest.mark.parametrize(
    ("task", "source", "name"), [("autoencoder", "mix", "MNIST"), ("conv_autoencoder", "cifar10", "CIFAR-10")]
)
def test_a_task_of_other_data_is_refused_where_they_are_absent(refusal, data, task, source, name):
    words = ("--task", task, "--set", f"{task}.data={source}", "--data-dir", data)
    check(refusal("run", *words), name, data, "--data-dir", SOURCES[name])


def write_mnist(folder, name, files=4):
    """Files with the names of a data set, and a few bytes of something else."""
    (folder / name / "raw").mkdir(parents=True)
    for file in MNIST_FILES[:files]:
        (folder / name / "raw" / file).write_bytes(b"\0\0\x08\x01")
    return folder / name / "raw" / MNIST_FILES[0]


@pytest.mark.parametrize("task", ["mnist", "fashion_mnist"])
def test_a_damaged_data_file_is_refused_by_name(refusal, data, task):
    """Its checksum is verified before it is read; the file stays, for its owner to delete."""
    file = write_mnist(data, ABSENT[task][0])
    check(refusal("run", "--task", task, "--data-dir", data), file, "damaged", "SHA-256", "delete")


def test_a_data_set_with_a_file_missing_is_absent(refusal, data):
    """Three files of four are not a data set."""
    write_mnist(data, "MNIST", files=3)
    check(refusal("run", "--task", "mnist", "--data-dir", data), "MNIST", data / "MNIST/raw", "--data-dir")


@pytest.mark.parametrize("task", ABSENT)
@pytest.mark.parametrize("folder", ["x" * 300, "file"], ids=["long", "file"])
def test_a_data_folder_that_cannot_be_is_refused(refusal, here, data, task, folder):
    """A name that is too long, or a file in its place."""
    (here / "file").write_bytes(b"")
    check(refusal("run", "--task", task, "--data-dir", folder), folder)


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
    """Whatever the damage, nothing is unpickled."""
    (data / "cifar10.npz").write_bytes(content)
    check(refusal("run", "--task", "cifar10", "--data-dir", data), data / "cifar10.npz", "damaged", "delete")


def test_damaged_binary_batches_are_refused_by_name(refusal, data):
    """The first of them that is not as published."""
    folder = data / "cifar-10-batches-bin"
    folder.mkdir()
    for name in (*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"):
        (folder / name).write_bytes(b"\0" * 3073)
    check(refusal("run", "--task", "cifar10", "--data-dir", data), "data_batch_1.bin", f"delete {folder}")


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
    check(refusal("compare", finished, name), name)


@pytest.mark.parametrize("command", [["replay"], ["resume"], ["view"], ["export", "x"]])
def test_a_name_that_is_too_long_is_refused_by_every_command(refusal, command):
    """Bad input, though the operating system says so."""
    check(refusal(*command, "x" * 300), "x" * 300)


def test_a_run_folder_with_an_impossible_name_is_refused(refusal):
    """No file system holds a name of 300 characters."""
    check(refusal("compare", "x" * 300), "x" * 300)


@pytest.mark.parametrize("name", ["summary.json", "metrics.jsonl", "config.toml"])
def test_an_unfinished_run_is_refused_by_what_is_missing(refusal, copied, name):
    """A run that was stopped has no summary."""
    (copied / name).unlink()
    sentence = refusal("compare", copied)
    check(sentence, copied, name)
    assert ("moe-engine resume" in sentence) == (name == "summary.json")


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
    """Whatever is wrong with its files, no figure is left."""
    (copied / name).write_bytes(content)
    check(refusal("compare", copied), copied, "damaged")


@pytest.mark.parametrize(("name", "content"), BROKEN_RUN.values(), ids=BROKEN_RUN)
def test_checksums_of_nonsense_do_not_make_it_sense(refusal, copied, name, content):
    """As a program could write them that knows the checksum."""
    if name != "summary.json":
        (copied / name).write_bytes(content)
        forge(copied)
    elif content in (b"{}", b'{"layers": 3}', b'{"layers": [3]}'):
        forge(copied, json.loads(content))
    else:
        pytest.skip("it is not an object, so it has no checksum")
    check(refusal("compare", copied), copied, "damaged")


@pytest.mark.parametrize("change", [{"top_k": "x"}, {"top_k": [1]}, {"name": 3}, {"name": None}])
def test_a_layer_of_nonsense_with_the_right_checksum_is_refused(refusal, copied, change):
    """By the command that computes with what it says."""
    summary = json.loads((copied / "summary.json").read_text("utf-8"))
    del summary["sha256"], summary["files"]
    summary["layers"][0] |= change
    forge(copied, summary)
    check(refusal("routing-stats", copied), copied)


@pytest.mark.parametrize("load", ["3", "[[1, 2], [3, 4]]", "[1, NaN]", "[1, -1]", '["a"]', "[1e999, 1]"])
def test_a_load_of_nonsense_with_the_right_checksum_is_refused(refusal, copied, load):
    """No run writes it, and JSON allows some of it."""
    text = (copied / "metrics.jsonl").read_text("utf-8")
    (copied / "metrics.jsonl").write_text(re.sub(r'"load": \[[^]]*\]', f'"load": {load}', text), "utf-8")
    forge(copied)
    check(refusal("routing-stats", copied), copied)


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.toml", "summary.json"])
@pytest.mark.parametrize("command", [["compare"], ["routing-stats"]])
def test_one_changed_bit_in_a_run_is_noticed(refusal, copied, name, command):
    content = bytearray((copied / name).read_bytes())
    digits = [at for at, byte in enumerate(content) if 48 <= byte < 58]
    content[digits[len(digits) // 2]] ^= 1  # a digit becomes another one
    (copied / name).write_bytes(content)
    check(refusal(*command, copied), copied, "damaged")


def test_a_config_that_was_emptied_is_noticed(refusal, copied):
    (copied / "config.toml").write_bytes(b"")
    check(refusal("compare", copied), copied, "config.toml changed after the run ended")


def test_a_figure_of_another_format_is_refused(refusal, finished):
    """The ending is the format."""
    check(refusal("compare", finished, "--out", "x.gif"), "x.gif", ".png, .svg or .pdf", code="unknown-figure-format")


@pytest.mark.parametrize(("out", "code"), [("no/x.png", errno.ENOENT), ("file/x.png", errno.ENOTDIR)])
def test_a_figure_that_cannot_be_written_is_refused(refusal, here, finished, out, code):
    """Before any table is printed."""
    (here / "file").write_bytes(b"")
    check(refusal("compare", finished, "--out", out), out, os.strerror(code), "--out", code="unwritable-file")


def test_a_run_in_a_folder_with_brackets_keeps_its_name(call, here, finished):
    """The table's cells are not markup."""
    shutil.copytree(finished, here / "a[red]b")
    code, out, _ = call("compare", "a[red]b", "--json")
    expected = (0, ["a[red]b"])
    assert expected == (code, [row["run"] for row in json.loads(out)])
    assert "\na[red]b " in call("compare", "a[red]b")[1]


# -- a run that fails later ------------------------------------------------------------------------


def failed(call, *argv):
    """Standard error of a run that fails after it began; the code and silence are checked."""
    expected = (1, "")
    code, out, err = call(*argv)
    assert expected == (code, out), err
    return err


def later(call, *argv):
    """The one sentence with which a quick run fails after it began."""
    return sentence_of(failed(call, *QUICK, *argv), call.error)


def test_a_loss_that_is_not_finite_ends_the_run_at_its_step(call):
    """The sentence names the step and what to lower."""
    check(later(call, "--lr", "1e30"), "task loss", "at step 2", "finite", "--lr")


def test_a_term_that_is_not_finite_is_named_with_its_layer(call):
    """The step is the first one that failed, not the one at which it was found."""
    sentence = later(call, "--lr", "1e30", "--plugins", "z_loss,switch_aux")
    check(sentence, "'z_loss.expert'", "layer 'moe'", "at step 2", "--lr")


def test_a_loss_that_is_first_seen_not_finite_on_the_test_set_is_no_bug(call):
    """An evaluation may come before the log point that finds it; progress is shown all the same."""
    argv = ("run", "--no-plugin", "plots,html", "--epochs", "2", "--lr", "1e30", "--log-every", "1000")
    last = failed(call, *argv).splitlines()[-1]
    check(sentence_of(f"{last}\n"), "task loss", "at step 2", "finite")


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
    check(sentence, "why", "out/run.log", "--debug", code="plugin-failed")
    assert "Traceback (most recent call last)" in Path("out/run.log").read_text("utf-8")


def test_debug_shows_the_traceback_of_a_plugin_that_raises(call, distribution):
    """Before the same sentence, with the same exit code."""
    distribution(fragile=LATER["metrics"][::2])
    err = failed(call, *QUICK, "--plugins", "fragile", "--debug")
    assert err.startswith("Traceback (most recent call last)") and "raise ValueError('why')" in err
    assert err.splitlines()[-1].startswith("moe-engine: metric 'fragile' (fragile 1.0) in moe_metrics failed at step ")


@pytest.mark.parametrize("order", ["first,second", "second,first"])
def test_of_two_plugins_in_one_file_the_one_that_raised_is_named(call, distribution, order):
    """A file may hold several plugins: who raised is known from the code that ran, not from the file."""
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
    check(sentence, "'fragile'")
    assert "this is a bug" not in sentence and not out
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
    check(refusal(*QUICK, "--plugins", "fragile"), "loss 'fragile'")


TASK_BODIES = {
    "raises": hook("moe_task(self, spec)", "raise ValueError('why')"),
    "answers nothing": hook("moe_task(self, spec)", "return None"),
    "is no task": hook("moe_metrics(self, stats)", "return {}"),
}


@pytest.mark.parametrize("body", TASK_BODIES.values(), ids=TASK_BODIES)
def test_a_task_that_cannot_be_used_is_refused_by_name(refusal, distribution, body):
    """A task is a plugin like any other."""
    distribution(fragile=("tasks", body))
    check(refusal(*QUICK, "--task", "fragile"), "task 'fragile'")


def test_a_plugin_without_any_hook_is_refused_by_name(refusal, distribution):
    """A chosen plugin without any effect is an error."""
    distribution(fragile=("losses", "    weight: float = option(1.0, help='coefficient')\n"))
    check(refusal(*QUICK, "--plugins", "fragile"), "fragile")


# -- signals ---------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_the_run_after_a_checkpoint(here, commands, number, code):
    """One sentence, the code of the signal, and no traceback."""
    argv = ("run", "--epochs", "100000", "--log-every", "1", "--no-plugin", "plots,html", "--out", "out")
    with open("stdout", "w") as stdout, open("stderr", "w") as stderr:
        process = commands.start([*MOE_ENGINE, *argv], stdout=stdout, stderr=stderr)
    while "train" not in Path("stderr").read_text():
        assert not process.ended(), "the run ended by itself"
    process.kill(number)
    assert (code, "") == (process.wait(), Path("stdout").read_text())
    err = Path("stderr").read_text()
    last = err.splitlines()[-1]
    assert re.fullmatch(r"moe-engine: stopped at step [1-9]\d* of \d+; continue with: moe-engine resume out", last)
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
    """An unforeseen exception exits 1 and says how to see more; --debug shows it."""

    def surprise(*_, **__):
        raise LookupError("surprise")

    monkeypatch.setattr("moe_engine.run.training.Training", surprise)
    expected = (1, "", "moe-engine: unexpected LookupError: surprise; this is a bug, --debug shows the traceback\n")
    assert expected == call(*QUICK)
    code, _, err = call(*QUICK, "--debug")
    assert code == 1
    assert "Traceback" in err
    assert err.endswith(expected[2])
