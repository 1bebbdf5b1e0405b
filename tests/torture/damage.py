"""Damaged files of runs, studies, traces and language models, each read by every command that reads it.

A command may refuse the file in one sentence, or give the same result as before, but never another one. The files of
transformers hold no checksums: there, a changed weight gives another result, which nobody can notice.
"""

import json
import random
import shutil

import attrs

from moe_engine.cli.view import Page
from moe_engine.errors import UsageError
from moe_engine.testing import tiny_checkpoint
from support import ends
from torture.cases import RUN, Verdict
from torture.shim import Outcome, command, here

HOWS = ("bit", "digit", "cut off", "zeros", "swapped", "emptied", "longer")
STUDY = """\
title = "torture"
question = "Is anything lost?"
source = "none"
seeds = 2
[base.run]
task = "blobs"
epochs = 1
batch_size = 16
[base.set.blobs]
images = 48
test_images = 16
[[part]]
name = "router"
title = "Router"
columns = ["loss", "cv"]
cross = { router = ["topk", "sigmoid_topk"] }
[axis.router.topk]
plugins = ["topk"]
[axis.router.sigmoid_topk]
plugins = ["sigmoid_topk"]
[[criterion]]
claim = "the loss is finite"
quantity = "loss"
where = { part = "router" }
at_most = 1e6
"""


@attrs.define
class Folder:
    """A folder, and the commands that read each of its files.

    readers: {pattern of a file: names of commands}, of which the first that matches counts. ask: {name of a command:
    function of the folder that returns (outcome, what must stay the same)}. expected: what undamaged files give.
    sealed: its files hold checksums.
    """

    path: object
    readers: dict
    ask: dict
    expected: dict = attrs.field(factory=dict)
    sealed: bool = True

    def names(self):
        """The files, relative to the folder."""
        found = [str(path.relative_to(self.path)) for path in self.path.rglob("*") if path.is_file()]
        return sorted(name for name in found if self.commands(name))

    def commands(self, name):
        """The commands that read a file."""
        return next((ask for pattern, ask in self.readers.items() if name.startswith(pattern)), ())


# -- what reads ------------------------------------------------------------------------------------


def _answer(*words, at="{}"):
    """A command whose answer must stay the same."""

    def ask(folder):
        outcome = here([str(word).format(folder) for word in words])
        return outcome, outcome.out

    return ask


def _view(folder):
    try:
        return Outcome(0, "", ""), Page(folder).content()
    except UsageError as error:
        return Outcome(2, "", f"moe-engine: {error}\n"), b""


def _resume(folder):
    outcome = here(["resume", folder, "--quiet"])
    return outcome, ends(folder) if outcome.code == 0 else None


def _study(folder):
    outcome = here(["study", folder.parent / "s.toml", "--out", folder, "--jobs", "1", "--quiet", "--json"])
    return outcome, _timeless(outcome.out)


def _check(folder):
    outcome = here(["study", folder.parent / "s.toml", "--out", folder, "--check", "--json"])
    return outcome, _timeless(outcome.out)


def _timeless(text):
    """The results of a study without what takes another time each time."""
    rows = json.loads(text)["rows"] if text else []
    return [{**row, "numbers": {"loss": row["numbers"].get("loss"), "cv": row["numbers"].get("cv")}} for row in rows]


def of_run(place):
    """The folder of a finished run, with a trace of its routing, which a router of noise can't replay."""
    folder = place / "finished"
    words = [word.replace("noisy_topk,", "") for word in RUN]
    assert command([*words, "--record-routing", "--out", folder]).code == 0
    readers = {
        "summary.json": ("compare", "routing-stats", "resume"),
        "metrics.jsonl": ("compare", "routing-stats", "resume", "view"),
        "config.toml": ("compare", "routing-stats", "resume", "view", "export"),
        "checkpoints/best": ("resume",),
        "checkpoints/": ("resume",),
        "model.safetensors": ("resume",),
        "sample.safetensors": ("resume",),
        "routing.safetensors": ("replay", "routing-stats of a trace", "resume"),
    }
    ask = {
        "compare": _answer("compare", "{}", "--out", f"{place}/figure.svg", "--json"),
        "routing-stats": _answer("routing-stats", "{}", "--json"),
        "routing-stats of a trace": _answer("routing-stats", "{}/routing.safetensors", "--json"),
        "replay": _answer("replay", "{}", "--json"),
        "export": _answer("export", "{}", f"{place}/exported"),
        "view": _view,
        "resume": _resume,
    }
    return _asked(Folder(folder, readers, ask), place)


def of_study(place):
    """The folder of a study that was run."""
    (place / "s.toml").write_text(STUDY)
    folder = place / "study"
    outcome, _ = _study(folder)
    assert outcome.code == 0, outcome
    readers = {"study.json": ("study --check", "study"), "cells/": ("study",)}
    return _asked(Folder(folder, readers, {"study --check": _check, "study": _study}), place)


TEXT = "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer. " * 8
LANGUAGE = ("--batch-size", "4", "--steps", "4", "--checkpoint-every", "2", "--no-plugin", "html", "--quiet")


def of_language(place):
    """The folder of a tiny mixture as transformers writes it, and that of a run that has trained it."""
    text, model = place / "text.txt", tiny_checkpoint(place / "model", "mixtral", num_hidden_layers=1)
    text.write_text(TEXT)
    at_length = ("--length", "16", "--json")
    ask = {
        "evaluate": _answer("evaluate", "{}", "--text", text, *at_length),
        "generate": _answer("generate", "{}", "--prompt", "To be", "--tokens", "4"),
        "inspect": _answer("inspect", "{}", "--text", text, *at_length),
    }
    readers = {"": tuple(ask)}
    yield _asked(Folder(model, readers, ask, sealed=False), place)
    options = {"model": model, "file": text, "length": 16}
    settings = [word for name, value in options.items() for word in ("--set", f"causal_lm.{name}={value}")]
    words = ["run", "--task", "causal_lm", *settings, "--plugins", "switch_aux", *LANGUAGE]
    assert command([*words, "--out", place / "trained"]).code == 0
    of_run = ("evaluate", "generate", "resume")
    readers = {"config.toml": of_run, "metrics.jsonl": ("resume",), "checkpoints/": of_run}
    ask = {"evaluate": ask["evaluate"], "generate": ask["generate"], "resume": _resume}
    yield _asked(Folder(place / "trained", readers, ask), place)


def _asked(folder, place):
    """A folder with what each command says of it as it is."""
    for name, ask in folder.ask.items():
        outcome, result = ask(_copied(folder, place))
        assert outcome.code == (2 if name == "export" else 0), outcome
        folder.expected[name] = result
    return folder


# -- damage ----------------------------------------------------------------------------------------


def changed(content, how, draws):
    """(damaged bytes, the place)."""
    content, at = bytearray(content), draws.randrange(len(content))
    if how == "bit":
        content[at] ^= 1 << draws.randrange(8)
    elif how == "digit":  # a file of text that stays well-formed
        at = draws.choice([place for place, byte in enumerate(content) if chr(byte).isdecimal()] or [at])
        content[at] ^= 1
    elif how == "zeros":  # as a file system leaves a block that never reached the disk
        size = draws.choice([1, 16, 512, 4096])
        content[at : at + size] = bytes(len(content[at : at + size]))
    elif how == "swapped":  # two lines, or two bytes
        lines = bytes(content).split(b"\n")
        at = draws.randrange(len(lines))
        other = draws.randrange(len(lines))
        lines[at], lines[other] = lines[other], lines[at]
        content = bytearray(b"\n".join(lines))
    elif how == "longer":
        content += content[: draws.randrange(1, 200)]
    else:
        del content[0 if how == "emptied" else at :]
    return bytes(content), at


def _copied(folder, place):
    """A copy of a folder, under one name."""
    copy = place / "copies" / folder.path.name
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder.path, copy)
    if (place / "s.toml").exists():
        shutil.copy(place / "s.toml", copy.parent)
    return copy


def damaged(folder, place, seed, name=None, how=None):
    """One file with one damage, drawn from a seed unless given, read by every command that reads it."""
    draws = random.Random(seed)
    name, how = name or draws.choice(folder.names()), how or draws.choice(HOWS)
    verdict = Verdict(f"{folder.path.name}/{name} {how}, seed {seed}")
    content = (folder.path / name).read_bytes()
    broken, at = changed(content, how, draws)
    if broken == content:
        verdict.case += ", which changes nothing"
        return verdict
    for command_ in folder.commands(name):
        copy = _copied(folder, place)
        (copy / name).write_bytes(broken)
        outcome, result = folder.ask[command_](copy)
        where = f"{command_} after byte {at}"
        verdict.judge(outcome, where)
        if outcome.code not in (0, 1, 2):
            verdict.blame("unclear", f"{where}: exit {outcome.code}")
        if outcome.code in (1, 2) and len(outcome.err.splitlines()) not in range(1, 5):
            verdict.blame("unclear", f"{where}: {outcome.err[:300]}")
        told = "is damaged" in outcome.err  # and the checkpoint before it was taken
        if folder.sealed and outcome.code == 0 and result != folder.expected[command_] and not told:
            verdict.blame("silent", where)
    return verdict
