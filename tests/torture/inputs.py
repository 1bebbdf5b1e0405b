"""Generated input: command lines, configurations, studies, counts and summaries, many to a case, in this process.

Whatever is typed or read: exit code 0, or one sentence and exit code 2; never a traceback, never "this is a bug".
What is accepted ends before it trains, with the sentence ACCEPTED.
"""

import contextlib
import json
import random
from pathlib import Path
from unittest import mock

import click

from moe_engine import RunError, cli
from support import forge
from torture.cases import Verdict
from torture.shim import INSTALLED, here

ACCEPTED = "the input was accepted"
COMMANDS = cli.group.commands
# words that many commands know, and words that none should
KNOWN = ("topk", "saturation", "switch_aux", "digits", "blobs", "html", "cpu", "router", "loss", "split", "growth", "x")
NUMBERS = ("0", "1", "-1", "2", "8", "1e3", "1e400", "-0.0", "nan", "inf", "9" * 30, "0x10", "1_000", "\u0663", "1.5")
ODD = ("", " ", "-", "--", "=", ".", "..", "/", "a=b", "a.b=c", ",", ",,", "\n", "\t", "\x1b[31m", "\x00"[:0], "\udcff")
LONG = ("x" * 5000, "\u00fc\u4e16\U0001f600", "\u202e\u200b", "%s%n{0}", "$(id)", "'; --", "[red]", "*", "~", "None")
CLUSTER = {"backend", "address", "jobs"}  # what would start processes
PLACES = ("no", "c.toml", "counts.csv", ".", "no/no", "/dev/null/x")


@contextlib.contextmanager
def cheap():
    """In the body, nothing trains, serves or starts processes."""

    def accepted(*_, **__):
        raise RunError(ACCEPTED)

    targets = (
        "moe_engine.run.training.Training",
        "moe_engine.study.results.run_study",
        "moe_engine.study.comparison.compare",
        "moe_engine.cli.view.serve",
        "moe_engine.testing.results",
        "moe_engine.cli.scaffold.write",
    )
    with contextlib.ExitStack() as stack:
        for target in targets:
            stack.enter_context(mock.patch(target, accepted))
        yield


def block(place, seed, count):
    """`count` inputs of every kind in turn, drawn from a seed, with a folder to work in."""
    verdict = Verdict(f"{count} inputs, seed {seed}")
    place.mkdir(exist_ok=True)
    with contextlib.chdir(place), cheap():
        for number in range(count):
            draws = random.Random(f"{seed} {number}")
            kind = KINDS[number % len(KINDS)]
            words = kind(draws)
            _judge(verdict, f"{kind.__name__} {number} of {words}"[:400], here(words, 20))
    return verdict


def _judge(verdict, what, outcome):
    """Blame an outcome that no input may have."""
    verdict.judge(outcome, what)
    accepted = outcome.code == 1 and ACCEPTED in outcome.err
    if outcome.code not in (0, 2, None) and not accepted:
        verdict.blame("unclear", f"{what}: exit {outcome.code}: {outcome.err[:300]}")
    if outcome.code == 2:
        lines = outcome.err.splitlines()
        if not (len(lines) == 1 and lines[0].startswith("moe-engine: ") and outcome.err.isprintable() is False):
            verdict.blame("unclear", f"{what}: {outcome.err[:300]!r}")
        if [char for char in outcome.err if not char.isprintable() and char != "\n"]:
            verdict.blame("unclear", f"{what}: control characters in {outcome.err[:300]!r}")


def _word(draws):
    """Something to type."""
    kind = draws.randrange(8)
    if kind == 0:
        return "".join(chr(draws.choice([draws.randrange(32, 127), draws.randrange(1, 0xD7FF)])) for _ in range(6))
    return draws.choice([KNOWN, NUMBERS, ODD, LONG, PLACES, KNOWN, NUMBERS][kind - 1])


# -- command lines ---------------------------------------------------------------------------------


def command_line(draws):
    """A command with some of its own flags, and values that fit or don't."""
    name = draws.choice([*COMMANDS, "run", "run", "routing-stats", "plan"])
    if draws.random() < 0.02:
        return [_word(draws) for _ in range(draws.randrange(4))]
    words = [name]
    for _ in range(draws.randrange(5)):
        words += _flag(draws, name)
    for parameter in COMMANDS[name].params:
        if isinstance(parameter, click.Argument) and draws.random() < 0.9:
            words += [_word(draws) for _ in range(draws.choice([1, 1, 1, 0, 2]))]
    if draws.random() < 0.1:
        words.insert(draws.randrange(1, len(words) + 1), _word(draws))
    return words


def _flag(draws, name):
    """One flag of a command, with a value."""
    options = [one for one in COMMANDS[name].params if isinstance(one, click.Option) and one.name not in CLUSTER]
    option = draws.choice([one for one in options if one.name not in ("measure",)])
    spelled = draws.choice(option.opts)
    if option.is_flag:
        return [spelled] if draws.random() < 0.9 else [f"{spelled}={_word(draws)}"]
    choices = getattr(option.type, "choices", ())
    value = draws.choice([_word(draws), *choices]) if choices else _value(draws, option)
    return [spelled, value] if draws.random() < 0.5 else [f"{spelled}={value}"]


def _value(draws, option):
    """A value of an option, which may fit."""
    if option.name == "settings":
        plugin = draws.choice([*KNOWN, _word(draws)])
        return f"{plugin}.{draws.choice(['weight', 'every', 'renorm', 'groups', _word(draws)])}={_word(draws)}"
    if option.name in ("plugins", "no_plugin", "chosen", "routers", "biases", "losses", "growth", "over"):
        return ",".join(draws.choice([*INSTALLED, _word(draws)]) for _ in range(draws.randrange(1, 5)))
    return _word(draws) if draws.random() < 0.5 else draws.choice(["1", "2", "3", "4", "0.5"])


# -- TOML --------------------------------------------------------------------------------------------

CONFIG = """\
[run]
plugins = ["saturation", "switch_aux"]
no_plugin = ["html"]
task = "blobs"
experts = 4
top_k = 2
lr = 1e-3
epochs = 1
[plugins.switch_aux]
weight = 0.1
[plugins.blobs]
images = 64
"""
STUDY = """\
title = "t"
question = "q"
source = "s"
seeds = 1
[base.run]
task = "blobs"
[[part]]
name = "p"
title = "P"
columns = ["loss"]
cross = { router = ["topk"] }
[axis.router.topk]
plugins = ["topk"]
[[criterion]]
claim = "c"
quantity = "loss"
where = { part = "p" }
at_most = 1.0
[[figure]]
name = "f"
title = "F"
where = { part = "p" }
kind = "numbers"
quantities = ["loss"]
"""


def configuration(draws):
    """`run --config` of a text that was a configuration."""
    Path("c.toml").write_bytes(_mangled(draws, CONFIG))
    return ["run", "--config", "c.toml", *(_flag(draws, "run") if draws.random() < 0.2 else [])]


def study(draws):
    """`study` of a text that was a study."""
    Path("s.toml").write_bytes(_mangled(draws, STUDY))
    return ["study", "s.toml", *(["--quick"] if draws.random() < 0.5 else ["--check", "--out", "no"])]


def _mangled(draws, text):
    """A text in which some lines, values or bytes are others."""
    lines = text.splitlines()
    for _ in range(draws.randrange(1, 4)):
        at, kind = draws.randrange(len(lines)), draws.randrange(5)
        if kind == 0:
            lines[at] = lines[draws.randrange(len(lines))]
        elif kind == 1:
            lines[at] = f"{lines[at].partition('=')[0]}= {_toml(draws)}"
        elif kind == 2:
            lines.insert(at, f"{draws.choice(KNOWN)} = {_toml(draws)}")
        elif kind == 3:
            del lines[at]
            lines = lines or [""]
        else:
            lines[at] = f"[{draws.choice(['run', 'plugins', 'axis', 'part', 'base', _word(draws)])}]"
    content = bytearray("\n".join(lines).encode(errors="surrogateescape"))
    for _ in range(draws.choice([0, 0, 0, 1, 5])):
        if content:
            content[draws.randrange(len(content))] = draws.randrange(256)
    return bytes(content)


def _toml(draws, depth=0):
    """A TOML value, or what looks like one."""
    simple = [
        "1",
        "-1",
        "1.5",
        "nan",
        "inf",
        "true",
        "9" * 30,
        "1e999",
        "1979-05-27",
        "07:32:00",
        '""',
        "'x'",
        '"\\u0000"',
    ]
    if depth > 2 or draws.random() < 0.6:
        return draws.choice([*simple, json.dumps(_word(draws).encode(errors="replace").decode()), _word(draws)])
    inner = [_toml(draws, depth + 1) for _ in range(draws.randrange(4))]
    if draws.random() < 0.5:
        return f"[{', '.join(inner)}]"
    return "{" + ", ".join(f"k{number} = {value}" for number, value in enumerate(inner)) + "}"


# -- counts ------------------------------------------------------------------------------------------

HEADS = ("layer", "split", "expert", "count", "tokens", "step", "domain", "top_k", "e0", "e1", "expert_2", "x", "")
CELLS = (
    "0",
    "1",
    "3",
    "17",
    "train",
    "test",
    "0.5",
    "50%",
    "1,234",
    "-1",
    "nan",
    "1e400",
    "total",
    "",
    " ",
    '"',
    "#",
    "all",
)


def csv_counts(draws):
    """`routing-stats` of a table with names and cells of any kind."""
    wide = draws.random() < 0.5
    heads = (
        ["layer", "split", *(f"e{n}" for n in range(draws.randrange(1, 6)))] if wide else ["layer", "expert", "count"]
    )
    heads = [draws.choice([*HEADS, _word(draws)]) if draws.random() < 0.1 else head for head in heads]
    rows = []
    for number in range(draws.randrange(6)):
        row = ["0", "train", *(str(draws.randrange(50)) for _ in heads[2:])] if wide else ["0", str(number), "5"]
        rows.append([draws.choice([*CELLS, _word(draws)]) if draws.random() < 0.08 else cell for cell in row])
        if draws.random() < 0.03:
            rows[-1] = rows[-1][: draws.randrange(len(row))]
    mark = draws.choice([",", ",", ",", ";", "\t", "|", " "])
    return _counted(draws, "\n".join(mark.join(row) for row in [heads, *rows]).encode(errors="surrogateescape"))


def json_counts(draws):
    """`routing-stats` of JSON, or of JSONL, that may hold counts."""
    records = [{"layer": 0, "split": "train", "counts": [3, 4, 5]}, {"layer": 1, "expert": 0, "count": 3}]
    value = [_json(draws, draws.choice(records)) for _ in range(draws.randrange(1, 4))]
    if draws.random() < 0.5:
        text = "\n".join(json.dumps(one) for one in value)
    else:
        text = json.dumps(draws.choice([value, value[0], {"data": value}, {"layers": {"0": value}}]))
    return _counted(draws, text.encode(errors="surrogatepass"))


def _json(draws, value):
    """A JSON value in which parts are others."""
    if draws.random() < 0.1:
        return draws.choice(
            [None, True, -1, 1e308, 10**20, "x", _word(draws), [], {}, [[]], [[1, 2], [3]], {"a": {"b": 1}}]
        )
    if isinstance(value, dict):
        return {(_word(draws) if draws.random() < 0.05 else name): _json(draws, item) for name, item in value.items()}
    return [_json(draws, item) for item in value] if isinstance(value, list) else value


def _counted(draws, content):
    """The command that reads these counts, in which a byte may be another."""
    content = bytearray(content)
    if content and draws.random() < 0.1:
        content[draws.randrange(len(content))] = draws.randrange(256)
    Path("counts").write_bytes(content)
    return ["routing-stats", "counts", *(_flag(draws, "routing-stats") if draws.random() < 0.2 else []), "--json"]


# -- summaries ---------------------------------------------------------------------------------------


def forged(draws):
    """`routing-stats` of a run whose summary or records are nonsense with the right checksums."""
    folder = Path("forged")
    folder.mkdir(exist_ok=True)
    record = {"split": "eval", "step": 4, "epoch": 1, "loss": 1.0, "layers": {"moe": {"load": [3.0, 5.0], "cv": 0.1}}}
    records = [_json(draws, record) for _ in range(draws.randrange(3))]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records), errors="surrogatepass")
    (folder / "config.toml").write_bytes(_mangled(draws, CONFIG) if draws.random() < 0.5 else CONFIG.encode())
    summary = {"loss": 1.0, "steps": 4, "verdict": "even", "layers": [{"name": "moe", "experts": 2, "top_k": 1}]}
    with contextlib.suppress(TypeError, ValueError):  # not an object, so without a checksum; or not UTF-8
        value = _json(draws, summary)
        forge(folder, 0 if value is None else value)
    return ["routing-stats", "forged", "--json"]


KINDS = (  # those that take longest less often
    *(command_line, configuration, csv_counts, command_line, study, command_line, configuration, json_counts),
    *(command_line, configuration, command_line, csv_counts, command_line, study, configuration, forged),
)
