"""The command line: a file for each command. Nothing here imports torch before it must."""

import sys
import traceback
from collections.abc import Sequence
from importlib import metadata

import click

from ..errors import PluginError, RunError, UsageError
from .check import check
from .compare import compare
from .compare_plugins import compare_plugins
from .new_plugin import new_plugin
from .plugins import plugins
from .replay import replay
from .resume import resume
from .routing_stats import routing_stats
from .run import run
from .study import study

USAGE, FAILED, STOPPED = 2, 1, 130


@click.group(
    invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(metadata.version("moe-engine"), prog_name="moe-engine")
@click.pass_context
def group(context: click.Context) -> None:
    """A Mixture-of-Experts engine in which every strategy is a plugin.

    \b
    Train on the embedded digits, balanced in two ways, and get a report:
        moe-engine run --plugins saturation,switch_aux
    See what there is to choose from, and what one plugin can be told:
        moe-engine plugins
        moe-engine plugins saturation
    Go on with a run that was stopped:
        moe-engine resume runs/A
    Grow by an expert every 100 steps, from 2 on; loss_plateau does it when the loss stops falling:
        moe-engine run --plugins saturation,switch_aux,schedule --experts 2
    Set two runs side by side; or all routers and a dense model, over three seeds:
        moe-engine compare runs/A runs/B
        moe-engine compare-plugins --routers all
    Run one of the published studies, beside its published figures:
        moe-engine study growth --quick
    Let another router choose on the logits of a run that recorded them:
        moe-engine replay runs/A --routers sigmoid_topk
    What the metrics say of routing counts that somebody published, or of a run's:
        moe-engine routing-stats counts.csv
    Write a router of your own, which works as written, and hold it against what is promised of every router:
        moe-engine new-plugin router my_router
        moe-engine check my_router
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


COMMANDS = (run, resume, plugins, compare, compare_plugins, study, replay, routing_stats, new_plugin, check)
for command in COMMANDS:
    group.add_command(command)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; answers the exit code: 0, 2 for bad input, 1 for a failed run, 130 or 143 if stopped."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        with group.make_context("moe-engine", words) as context:  # group.main takes EOFError and EPIPE for its own
            return group.invoke(context) or 0
    except click.exceptions.Exit as error:
        return error.exit_code
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output left; there is nobody to tell
        return FAILED
    except (Exception, KeyboardInterrupt) as error:
        sentence, code = _ending(error)
        if "--debug" in words and (code is None or isinstance(error, PluginError)):
            traceback.print_exception(error)
        print(f"moe-engine: {' '.join(sentence.split())}", file=sys.stderr)
        return code or FAILED


def _ending(error: BaseException) -> tuple[str, int | None]:
    """The sentence and the exit code of an exception; None for one that nobody foresaw."""
    if isinstance(error, click.ClickException):
        return error.format_message(), USAGE
    if isinstance(error, click.Abort | KeyboardInterrupt):
        return "stopped", STOPPED
    if isinstance(error, UsageError | RunError):
        return str(error), USAGE if isinstance(error, UsageError) else FAILED
    return f"unexpected {type(error).__name__}: {error}; this is a bug: --debug shows where", None
