"""The command line: one file per command. Nothing here imports torch before it must."""

import sys
import traceback
from collections.abc import Sequence
from importlib import metadata

import click

from ..errors import PluginError, RunError, UsageError
from ..parallel.launch import rank, started
from .check import check
from .compare import compare
from .compare_plugins import compare_plugins
from .evaluate import evaluate
from .export import export
from .generate import generate
from .inspect import inspect
from .new_plugin import new_plugin
from .plan import plan
from .plugins import plugins
from .replay import replay
from .resume import resume
from .routing_stats import routing_stats
from .run import run
from .study import study

USAGE, FAILED, STOPPED = 2, 1, 130
ON_RANKS = ("run", "resume", "plan", "check", "-h", "--help", "--version")  # what torchrun may start
SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 80}


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
        click.echo(context.get_help())


COMMANDS = (
    run,
    resume,
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
    group.add_command(command)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for bad input, 1 for a failed run, 130 or 143 if stopped."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        with group.make_context("moe-engine", words) as context:  # group.main handles EOFError and EPIPE itself
            if started() > 1 and words and words[0] not in ON_RANKS:
                message = f"'{words[0]}' works in one process; call it without torchrun"
                raise UsageError(message, code="one-process-command")
            return group.invoke(context) or 0
    except click.exceptions.Exit as error:
        return error.exit_code
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output is gone, so a message is pointless
        return FAILED
    except (Exception, KeyboardInterrupt) as error:
        sentence, code = _ending(error)
        if "--debug" in words and (code is None or isinstance(error, PluginError)):
            traceback.print_exception(error)
        joined = "torch" in sys.modules and started() > 1 and _joined()
        if joined or rank() == 0:  # before they have joined, all ranks fail alike
            who = f"moe-engine, rank {rank()}:" if joined else "moe-engine:"
            print(f"{who} {' '.join(sentence.split())}", file=sys.stderr)
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
    return f"unexpected {type(error).__name__}: {error}; this is a bug, --debug shows the traceback", None
