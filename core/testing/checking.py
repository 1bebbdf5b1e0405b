"""Checks: run the claims about one plugin, one by one or all at once."""

import time
import warnings
from collections.abc import Callable, Iterable, Iterator
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
from .plugin_under_test import HOOK_OF, PluginUnderTest, plugin_under_test


@attrs.frozen(eq=False)
class Check:
    """One claim about one plugin. Call it to run the test; `str(check)` is "plugin: claim", an id for pytest."""

    plugin: PluginUnderTest
    claim: Claim

    def __str__(self) -> str:
        return f"{self.plugin.name}: {self.claim.name}"

    def __call__(self) -> str | None:
        """Run the test without changing the caller's random state.

        Returns None or a remark, for example that the plugin refuses this combination. Raises Broken if the claim
        does not hold, NotApplicable if it does not apply to this plugin.
        """
        where, claims = f"{self.plugin.title} breaks '{self.claim.says}'", (self.claim.name,)
        with self.plugin.present(), own_random_state(0), warnings.catch_warnings(), TemporaryDirectory() as folder:
            warnings.simplefilter("ignore")
            try:
                return self.claim.test(Bench(self.plugin, Path(folder)))
            except NotApplicable:
                raise
            except (Broken, UsageError) as error:
                raise Broken(f"{where}: {error}", claims) from error
            except (Exception, SystemExit) as error:
                raise Broken(f"{where}: it raises {type(error).__name__}: {error}", claims) from error


@attrs.frozen
class Result:
    """The outcome of one check.

    outcome: "ok", "FAILED" or "skipped". why: the failure, the reason for skipping, or a remark. error: the failure
    as an exception.
    """

    claim: Claim
    outcome: str
    why: str | None
    seconds: float = 0.0
    error: Broken | None = None


def checks(plugin: Any, settings: Iterable[str] | Settings = (), data_dir: str = "data", ranks: int = 1) -> list[Check]:
    """The checks of a plugin, one for each claim that applies to its hooks.

    plugin: the name of an installed plugin, a plugin class, or an instance with options set. settings:
    "plugin.option=value" texts, or nested dicts. data_dir: the folder with a task's files; without them the claims
    about the task are skipped. ranks: with more than 1, also the claims about several ranks, in as many processes,
    which can import the plugin if it is at the top of a module. Raises UsageError for an unknown name or option,
    PluginError for a class that is not a plugin.
    """
    tested = plugin_under_test(plugin, settings, data_dir, ranks)
    wanted = [claim for claim in CLAIMS if ranks > 1 or not claim.on_ranks]
    return [Check(tested, claim) for claim in wanted if tested.hooks & set(claim.hooks)]


def results(checks: Iterable[Check]) -> Iterator[Result]:
    """Run checks in order and yield a result for each. If no layer can be built, the rest is skipped."""
    built = True
    for check in checks:
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
    """Run every check of a plugin of this kind. Raises Broken, which lists the claims that fail."""
    to_run = checks(plugin, settings, data_dir)
    tested = to_run[0].plugin
    if HOOK_OF[kind] not in tested.hooks:
        raise UsageError(f"{tested.title} is not a {kind}: it does not implement {HOOK_OF[kind]}", code="wrong-kind")
    failed = [result for result in results(to_run) if result.outcome == "FAILED"]
    if failed:
        message = listed(result.why for result in failed)
        many = f"{len(failed)} of {len(to_run)} claims fail: " if len(failed) > 1 else ""
        raise Broken(f"{many}{message}", tuple(result.claim.name for result in failed))


def checker(kind: str) -> Callable[..., None]:
    """`check` for one kind of plugin, under the name check_KIND."""

    def check_kind(plugin: Any, settings: Iterable[str] | Settings = (), data_dir: str = "data") -> None:
        check(kind, plugin, settings, data_dir)

    check_kind.__name__ = check_kind.__qualname__ = f"check_{kind}"
    check_kind.__doc__ = f"""Run every check of a plugin that implements {HOOK_OF[kind]}.

    plugin: the name of an installed plugin, a plugin class, or an instance with options set. settings:
    "plugin.option=value" texts, or nested dicts. data_dir: the folder with a task's files. Raises Broken, which lists
    the claims that fail, and UsageError for a plugin of another kind, an unknown name or an unknown option.
    """
    return check_kind
