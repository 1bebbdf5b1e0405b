"""The command line: one file per command. Nothing here imports torch before it must."""

import errno
import os
import sys
import threading
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from importlib import metadata

import click

from ..errors import PluginError, RunError, UsageError
from ..files import naming, refused
from ..parallel.launch import FAILED, USAGE, rank, started
from .check import check
from .compare import compare
from .compare_plugins import compare_plugins
from .evaluate import evaluate
from .export import export
from .generate import generate
from .inspect import inspect
from .new_plugin import new_plugin
from .output import answering, echo, flush, prepare
from .plan import plan
from .plugins import plugins
from .replay import replay
from .resume import resume
from .routing_stats import routing_stats
from .run import run
from .study import study
from .view import view

STOPPED = 130  # exit code
ON_RANKS = ("run", "resume", "plan", "check", "-h", "--help", "--version")  # what torchrun may start
SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 80}
HELP = {"-h", "--help", "--version"}


class Commands(click.Group):
    """A group that lists its commands in the order in which they were added, not by letter."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=Commands, invoke_without_command=True, context_settings=SETTINGS)
@click.version_option(metadata.version("moe-engine"), prog_name="moe-engine")
@click.pass_context
def group(context: click.Context) -> None:
    """Train, compare and analyse Mixture-of-Experts models. Every strategy is a
    plugin.

    \b
    Train on the built-in digits, and write a report:
        moe-engine run --plugins saturation,switch_aux
        moe-engine resume runs/A
        moe-engine view runs/A

    \b
    Find plugins and their options:
        moe-engine plugins
        moe-engine plugins saturation

    \b
    Compare runs, plugins, or a whole study:
        moe-engine compare runs/A runs/B
        moe-engine compare-plugins --routers all
        moe-engine study growth --quick

    \b
    Analyse routing after the fact:
        moe-engine replay runs/A --routers sigmoid_topk
        moe-engine routing-stats counts.csv

    \b
    Fine-tune a mixture of transformers (--task causal_lm), and use it:
        moe-engine evaluate runs/A --text prose.txt
        moe-engine export runs/A models/A

    \b
    See what the experts of a checkpoint do:
        moe-engine inspect models/olmoe --text prose.txt code.py

    \b
    Plan a model on many GPUs:
        moe-engine plan --layers 16 --dim 1024 --hidden 2048 --experts 64

    \b
    Write a plugin:
        moe-engine new-plugin router my_router
        moe-engine check my_router
    """
    if context.invoked_subcommand is None:
        echo(context.get_help())


COMMANDS = (
    run,
    resume,
    view,
    plugins,
    compare,
    compare_plugins,
    study,
    evaluate,
    generate,
    export,
    inspect,
    replay,
    routing_stats,
    plan,
    new_plugin,
    check,
)
for command in COMMANDS:
    group.add_command(answering(command))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for bad input, 1 for a failed run, 130 or 143 if stopped."""
    words = list(sys.argv[1:] if argv is None else argv)
    prepare()
    try:
        code = _invoke(words)
        sys.stdout.flush()
        return code
    except click.exceptions.Exit as error:
        return error.exit_code
    except BrokenPipeError:
        flush()  # its reader is gone, so a message is pointless
        return FAILED
    except BaseException as error:  # a plugin may raise any kind
        flush()
        return _report(error, words)


def script() -> None:
    """The program `moe-engine`: run the command line and exit, also if a plugin has left a thread running."""
    code = main()
    flush()
    if any(thread is not threading.main_thread() and not thread.daemon for thread in threading.enumerate()):
        os._exit(code)  # Python would wait for it
    sys.exit(code)


def _invoke(words: list[str]) -> int:
    """Call the command; returns its exit code."""
    helps = naming("standard output") if HELP & {*words} else nullcontext()  # click does not say where it writes
    with helps, group.make_context("moe-engine", words) as context:  # group.main handles EOFError and EPIPE itself
        if started() > 1 and words and words[0] not in ON_RANKS:
            message = f"'{words[0]}' works in one process; call it without torchrun"
            raise UsageError(message, code="one-process-command")
        return group.invoke(context) or 0


def _report(error: BaseException, words: list[str]) -> int:
    """Say in one sentence why a command ends; returns the exit code."""
    sentence, code = _ending(error)
    try:
        if "--debug" in words and (code is None or PluginError in (type(error), type(error.__cause__))):
            traceback.print_exception(error)
        joined = "torch" in sys.modules and started() > 1 and _joined()
        if joined or rank() == 0:  # before they have joined, all ranks fail alike
            who = f"moe-engine, rank {rank()}:" if joined else "moe-engine:"
            echo(f"{who} {' '.join(sentence.split())}", err=True)
    except OSError:
        flush()
    return code or FAILED


def _joined() -> bool:
    """Whether this rank has joined the others; then the first one that failed is the one that gets here."""
    import torch

    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _ending(error: BaseException) -> tuple[str, int | None]:
    """The message and exit code for an exception; the code is None for a bug."""
    if isinstance(error, click.ClickException):
        return error.format_message(), USAGE
    if isinstance(error, click.Abort | KeyboardInterrupt):
        return "stopped", STOPPED
    if isinstance(error, UsageError | RunError):
        return str(error), USAGE if isinstance(error, UsageError) else FAILED
    if sentence := _of_system(error):
        return sentence, USAGE if getattr(error, "errno", None) == errno.ENAMETOOLONG else FAILED
    return f"unexpected {type(error).__name__}: {error}; this is a bug, --debug shows the traceback", None


def _of_system(error: BaseException) -> str:
    """What the operating system refused, and what to do; empty for any other exception."""
    if isinstance(error, OSError):
        return refused(error)
    if isinstance(error, MemoryError):
        return f"the memory is full{f' ({error})' if str(error) else ''}; free some, or choose smaller sizes"
    if isinstance(error, UnicodeEncodeError) and error.encoding != "utf-8":  # a path
        return f"{error.object!a} can't be encoded here; choose a UTF-8 locale, such as LC_ALL=C.UTF-8"
    return ""
