"""Checks: claims about one plugin, tested one by one or all together."""

import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import attrs

from ..contract.options import Settings
from ..errors import UsageError, listed
from ..seeds import own_random_state
from .bench import Bench
from .claims import CLAIMS, Broken, Claim, NotApplicable
from .layers import builds
from .subjects import HOOK_OF, Subject, subject


@attrs.frozen(eq=False)
class Check:
    """One claim about one plugin: call it. Its text is "plugin: claim"."""

    subject: Subject
    claim: Claim

    def __str__(self) -> str:
        return f"{self.subject.name}: {self.claim.name}"

    def __call__(self) -> str | None:
        """Test the claim, on random numbers of its own. Answers None, or a remark, as that a mix is refused.

        Raises Broken, or NotApplicable.
        """
        where = f"{self.subject.title} breaks '{self.claim.says}'"
        with self.subject.present(), own_random_state(0), warnings.catch_warnings(), TemporaryDirectory() as folder:
            warnings.simplefilter("ignore")
            try:
                return self.claim.test(Bench(self.subject, Path(folder)))
            except NotApplicable:
                raise
            except (Broken, UsageError) as error:
                raise Broken(f"{where}: {error}") from error
            except (Exception, SystemExit) as error:
                raise Broken(f"{where}: it raises {type(error).__name__}: {error}") from error


@attrs.frozen
class Result:
    """What came of one check. outcome: ok, FAILED or skipped. why: the failure, the reason, or a remark."""

    claim: Claim
    outcome: str
    why: str | None
    seconds: float = 0.0
    error: Broken | None = None


def checks(plugin: Any, settings: Iterable[str] | Settings = (), data_dir: str = "data") -> list[Check]:
    """Every claim about a plugin, as functions without arguments, whose texts are ids for pytest.

    plugin: an installed one's name, a plugin class or an instance. settings: "plugin.option=value" texts, or nested
    dicts. data_dir: where a task's files are. Raises UsageError for a name that nobody has.
    """
    one = subject(plugin, settings, data_dir)
    return [Check(one, claim) for claim in CLAIMS if one.hooks & set(claim.hooks)]


def results(several: Iterable[Check]) -> Iterator[Result]:
    """Test them one after the other. Where no layer can be built, the rest is skipped: it would say the same."""
    built = True
    for check in several:
        if not built:
            yield Result(check.claim, "skipped", "no layer can be built with it")
            continue
        start, error = time.perf_counter(), None
        try:
            outcome, why = "ok", check()
        except NotApplicable as reason:
            outcome, why = "skipped", str(reason)
        except Broken as failure:
            outcome, why, error = "FAILED", str(failure), failure
            built = built and check.claim.test is not builds
        yield Result(check.claim, outcome, why, time.perf_counter() - start, error)


def check(kind: str, plugin: Any, settings: Iterable[str] | Settings = (), data_dir: str = "data") -> None:
    """Test every claim about a plugin of this kind. Raises Broken, which lists all that fail."""
    several = checks(plugin, settings, data_dir)
    if HOOK_OF[kind] not in several[0].subject.hooks:
        raise UsageError(f"{several[0].subject.title} is no {kind}: it does not implement {HOOK_OF[kind]}")
    failed = [one.why for one in results(several) if one.outcome == "FAILED"]
    if failed:
        raise Broken(f"{len(failed)} of {len(several)} claims fail: {listed(failed)}" if len(failed) > 1 else failed[0])
