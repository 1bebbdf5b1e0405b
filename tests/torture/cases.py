"""The cases of torture: each does one thing to a run and says what was lost. The long form and the tests share them."""

import random
import shutil
import signal

import attrs

from support import ends
from torture.shim import Strike, command, on_two_ranks

RUN = (
    *("run", "--task", "blobs", "--set", "blobs.images=64", "--set", "blobs.test_images=16", "--batch-size", "16"),
    *("--plugins", "noisy_topk,saturation,switch_aux,schedule,split", "--set", "schedule.every=2", "--experts", "2"),
    *("--epochs", "2", "--steps", "6", "--log-every", "2", "--checkpoint-every", "1"),  # sums outlast checkpoints
    *("--no-plugin", "plots,html", "--quiet"),
)
ERRORS = ("ENOSPC", "EDQUOT", "EROFS", "EACCES", "EIO", "EMFILE")


def chosen(*names):
    """The run with further plugins."""
    words = list(RUN)
    words[words.index("--plugins") + 1] += "".join(f",{name}" for name in names)
    return words


@attrs.define
class Verdict:
    """What came of a case. wrong: in words, what should not have been; empty if all is well.

    seconds, mebibytes: what a command took, where that is judged.
    """

    case: str
    kills: int = 0
    wrong: dict = attrs.field(factory=dict)
    seconds: float = 0.0
    mebibytes: int = 0

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


def halfway(folder, done):
    """The folder of a run that was killed in its fourth save: it holds records that no checkpoint knows, and leftovers.

    Returns the operations that resuming it does on the disk.
    """
    saves = [at for at, what in enumerate(done, 1) if what == "mkdir"]  # the first one is that of the folder
    outcome = command([*RUN, "--out", folder], Strike(saves[4] + 2, "half"))
    assert outcome.code == -signal.SIGKILL and len(list(folder.glob("checkpoints/step-*"))) == 2, outcome
    copy = folder.with_name(f"{folder.name} resumed")
    shutil.copytree(folder, copy)
    outcome = command(["resume", copy, "--quiet"], Strike())
    assert outcome.code == 0, outcome.err
    shutil.rmtree(copy)
    return outcome.done


def go_on(folder, verdict):
    """Resume a run, or begin it where it had not begun."""
    words = begin_or_resume(folder)
    outcome = command(words)
    verdict.judge(outcome, words[0])
    if left := [path.name for path in folder.rglob(".*")]:
        verdict.blame("unclear", f"left behind: {left}")
    return outcome


def struck(folder, strike, expected, half=None):
    """A run in which an operation on the disk fails or kills; then it goes on to its end.

    half: the folder of a run that was killed, whose resuming is struck instead.
    """
    verdict = Verdict(f"{'resume' if half else 'run'} {strike.how} at {strike.at}{' and after' * strike.stays}")
    shutil.rmtree(folder, ignore_errors=True)
    if half:
        shutil.copytree(half, folder)
    outcome = command(["resume", folder, "--quiet"] if half else [*RUN, "--out", folder], strike)
    verdict.judge(outcome, "struck")
    kills = strike.how in ("kill", "half")
    verdict.kills = int(kills and outcome.code == -signal.SIGKILL)
    if not kills and outcome.code not in (0, None):
        if outcome.code not in (1, 2) or len(outcome.err.splitlines()) != 1:
            verdict.blame("unclear", f"exit {outcome.code}: {outcome.err}")
        if str(folder) not in outcome.err:
            verdict.blame("unclear", f"no path in: {outcome.err}")
    return ended(folder, verdict, expected)


def ended(folder, verdict, expected):
    """Let a run go on to its end, and compare it with that of a run that nothing happened to."""
    last = go_on(folder, verdict)
    if last.code != 0:
        verdict.blame("lost", f"exit {last.code}: {last.err}")
    elif ends(folder) != expected:
        verdict.blame("different", "the run's end")
    shutil.rmtree(folder, ignore_errors=True)
    return verdict


TWO = [*RUN, "--parallel", "shard"]


def whole_on_two(folder):
    """The end of a run on two ranks that nothing happened to, and the operations of the first on the disk."""
    outcome = on_two_ranks([*TWO, "--out", folder], Strike())
    assert outcome.code == 0, outcome.err
    return ends(folder), outcome.done


def killed_on_two(folder, seed, expected, count):
    """A run on two ranks, one of which is killed: at one of `count` operations on the disk, or at a random moment."""
    draws, verdict = random.Random(seed), Verdict(f"a kill of one of two ranks, seed {seed}")
    shutil.rmtree(folder, ignore_errors=True)
    if seed % 2:
        how = {"kill_after": draws.uniform(0.2, 3), "struck": draws.randrange(2)}
    else:
        how = {"strike": Strike(draws.randint(1, count), draws.choice(["kill", "half"]))}
    outcome = on_two_ranks([*TWO, "--out", folder], **how)
    verdict.judge(outcome, str(how))
    verdict.kills = int(outcome.code == -signal.SIGKILL)
    words = begin_or_resume(folder)
    last = on_two_ranks(words if words[0] == "resume" else [*TWO, "--out", folder])
    verdict.judge(last, words[0])
    if last.code != 0:
        verdict.blame("lost", f"exit {last.code}: {last.err}")
    elif ends(folder) != expected:
        verdict.blame("different", "the run's end")
    return verdict


def begin_or_resume(folder):
    """The words that go on with a run in this folder."""
    return ["resume", folder, "--quiet"] if (folder / "config.toml").exists() else [*RUN, "--out", folder]


def killed_again(folder, seed, expected, most=6):
    """A run that is killed several times, each time at an operation on the disk, or in the middle of it."""
    draws, verdict = random.Random(seed), Verdict(f"kills at operations, seed {seed}")
    shutil.rmtree(folder, ignore_errors=True)
    for _ in range(most):
        strike = Strike(draws.randint(1, 24), draws.choice(["kill", "half"]))
        outcome = command(begin_or_resume(folder), strike)
        verdict.judge(outcome, f"{strike.how} at {strike.at}")
        verdict.kills += outcome.code == -signal.SIGKILL
    return ended(folder, verdict, expected)


def killed_at_random(folder, seed, expected, longest):
    """A run that is killed at up to four random moments, by one signal or another."""
    draws, verdict = random.Random(seed), Verdict(f"kills at random moments, seed {seed}")
    shutil.rmtree(folder, ignore_errors=True)
    for _ in range(draws.randint(1, 4)):
        number = draws.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        outcome = command(begin_or_resume(folder), kill_after=draws.uniform(0, longest), number=number)
        verdict.judge(outcome, "killed")
        verdict.kills += outcome.code not in (0, None)
    return ended(folder, verdict, expected)


def strike_of(seed, count):
    """A strike drawn from a seed, at one of `count` operations."""
    draws = random.Random(seed)
    how = draws.choice(["kill", "half", *ERRORS])
    return Strike(draws.randint(1, count), how, how not in ("kill", "half") and draws.random() < 0.5)
