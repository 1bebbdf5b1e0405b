"""The cases of torture: each does one thing to a run and says what was lost. The long form and the tests share them."""

import random
import shutil
import signal

import attrs

from support import ends
from torture.shim import Strike, command

RUN = (
    *("run", "--task", "blobs", "--set", "blobs.images=64", "--set", "blobs.test_images=16", "--batch-size", "16"),
    *("--plugins", "saturation,switch_aux,schedule,split", "--set", "schedule.every=2", "--experts", "2"),
    *("--epochs", "1", "--log-every", "1", "--checkpoint-every", "1", "--no-plugin", "plots,html", "--quiet"),
)
ERRORS = ("ENOSPC", "EDQUOT", "EROFS", "EACCES", "EIO", "EMFILE")


def chosen(*names):
    """The run with further plugins."""
    words = list(RUN)
    words[words.index("--plugins") + 1] += "".join(f",{name}" for name in names)
    return words


@attrs.define
class Verdict:
    """What came of a case. wrong: in words, what should not have been; empty if all is well."""

    case: str
    kills: int = 0
    wrong: dict = attrs.field(factory=dict)

    def blame(self, what, why):
        """Count something that is wrong: lost, different, silent, traceback, hang, bug or unclear."""
        self.wrong.setdefault(what, []).append(why)

    def judge(self, outcome, where):
        """Look for what no command may do."""
        if outcome.code is None:
            self.blame("hang", where)
        if "Traceback" in outcome.err:
            self.blame("traceback", f"{where}: {outcome.err[-400:]}")
        if "this is a bug" in outcome.err:
            self.blame("bug", f"{where}: {outcome.last}")


def whole(folder):
    """The end of a run that nothing happened to, and the operations that it does on the disk."""
    outcome = command([*RUN, "--out", folder], Strike())
    assert outcome.code == 0, outcome.err
    return ends(folder), outcome.done


def go_on(folder, verdict):
    """Resume a run, or begin it where it had not begun."""
    began = (folder / "config.toml").exists()
    words = ["resume", folder, "--quiet"] if began else [*RUN, "--out", folder]
    outcome = command(words)
    verdict.judge(outcome, words[0])
    if left := [path.name for path in folder.rglob(".*")]:
        verdict.blame("unclear", f"left behind: {left}")
    return outcome


def struck(folder, strike, expected, resumed=False):
    """A run, or the resuming of one, in which an operation on the disk fails or kills; then it goes on to its end."""
    verdict = Verdict(f"{'resume' if resumed else 'run'} {strike.how} at {strike.at}{' and after' * strike.stays}")
    shutil.rmtree(folder, ignore_errors=True)
    words = [*RUN, "--out", folder]
    if resumed:
        command([*words, "--steps", "6"], kill_after=0.0, number=signal.SIGTERM)
        words = ["resume", folder, "--quiet"] if (folder / "config.toml").exists() else words
    outcome = command(words, strike)
    verdict.judge(outcome, "struck")
    kills = strike.how in ("kill", "half")
    verdict.kills = int(kills and outcome.code == -signal.SIGKILL)
    if not kills and outcome.code not in (0, None):
        if outcome.code not in (1, 2) or len(outcome.err.splitlines()) != 1:
            verdict.blame("unclear", f"exit {outcome.code}: {outcome.err}")
        if str(folder) not in outcome.err:
            verdict.blame("unclear", f"no path in: {outcome.err}")
    last = go_on(folder, verdict)
    if last.code != 0:
        verdict.blame("lost", f"exit {last.code}: {last.err}")
    elif ends(folder) != expected:
        verdict.blame("different", "the run's end")
    shutil.rmtree(folder, ignore_errors=True)
    return verdict


def killed_at_random(folder, seed, expected, longest):
    """A run that is killed at up to four random moments, by one signal or another."""
    draws, verdict = random.Random(seed), Verdict(f"kills at random moments, seed {seed}")
    shutil.rmtree(folder, ignore_errors=True)
    for _ in range(draws.randint(1, 4)):
        number = draws.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        began = (folder / "config.toml").exists()
        words = ["resume", folder, "--quiet"] if began else [*RUN, "--out", folder]
        outcome = command(words, kill_after=draws.uniform(0, longest), number=number)
        verdict.judge(outcome, words[0])
        verdict.kills += outcome.code not in (0, None)
    last = go_on(folder, verdict)
    if last.code != 0:
        verdict.blame("lost", f"exit {last.code}: {last.err}")
    elif ends(folder) != expected:
        verdict.blame("different", "the run's end")
    shutil.rmtree(folder, ignore_errors=True)
    return verdict


READERS = (("compare", "{}"), ("routing-stats", "{}"), ("resume", "{}", "--quiet"))


def damaged(finished, scratch, name, how, seed, expected):
    """A file of a finished run with a bit or a digit changed or its end cut off, read by every command that reads it.

    A command may refuse the file, or give the same result as before, but never another one.
    """
    draws, verdict = random.Random(seed), Verdict(f"{name} {how}, seed {seed}")
    for words in READERS:
        folder = scratch / "run"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(finished, folder)
        content = bytearray((folder / name).read_bytes())
        at = draws.randrange(len(content))
        if how == "flipped":
            content[at] ^= 1 << draws.randrange(8)
        if how == "digit":  # a file of text that stays well-formed
            at = draws.choice([place for place, byte in enumerate(content) if chr(byte).isdecimal()] or [at])
            content[at] ^= 1
        (folder / name).write_bytes(content[:at] if how == "cut off" else content)
        line = [word.format(folder) for word in words]
        if line[0] == "compare":
            line += ["--out", scratch / "figure.png", "--json"]
        elif line[0] == "routing-stats":
            line += ["--json"]
        outcome = command(line)
        verdict.judge(outcome, line[0])
        if outcome.code not in (0, 1, 2):
            verdict.blame("unclear", f"{line[0]}: exit {outcome.code}")
        if line[0] == "resume":
            if outcome.code == 0 and ends(folder) != expected["resume"]:
                verdict.blame("silent", f"resume after byte {at}")
        elif outcome.code == 0 and outcome.out != expected[line[0]]:
            verdict.blame("silent", f"{line[0]} after byte {at}")
    return verdict


def answers(finished, scratch):
    """What the commands that read a run say of an undamaged one."""
    found = {"resume": ends(finished)}
    folder = scratch / "run"
    shutil.copytree(finished, folder, dirs_exist_ok=True)
    for line in (["compare", folder, "--out", scratch / "figure.png", "--json"], ["routing-stats", folder, "--json"]):
        found[line[0]] = command(line).out
    return found


def files_of(folder):
    """The files of a run, relative to its folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def strike_of(seed, count):
    """A strike drawn from a seed, at one of `count` operations."""
    draws = random.Random(seed)
    how = draws.choice(["kill", "half", *ERRORS])
    return Strike(draws.randint(1, count), how, how not in ("kill", "half") and draws.random() < 0.5)
