"""The command line: `moe-engine run | plugins | compare`. Nothing here imports torch before it must."""

import sys
from collections.abc import Sequence
from importlib import metadata

import click

from ..errors import RunError, UsageError
from .compare import compare
from .plugins import plugins
from .run import run

USAGE, FAILED = 2, 1


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(metadata.version("moe-engine"), prog_name="moe-engine")
def group() -> None:
    """A Mixture-of-Experts engine in which every strategy is a plugin.

    \b
    Train on the embedded digits, balanced in two ways, and get a report:
        moe-engine run --plugins saturation,switch_aux
    See what there is to choose from, and what one plugin can be told:
        moe-engine plugins
        moe-engine plugins saturation
    Set two runs side by side:
        moe-engine compare runs/A runs/B
    """


for command in (run, plugins, compare):
    group.add_command(command)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; answers the exit code: 0, 2 for bad input, 1 for a run that failed, 130 or 143 if stopped."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return group.main(args=words, prog_name="moe-engine", standalone_mode=False) or 0
    except click.exceptions.Exit as error:
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return _say("stopped", 130)
    except click.ClickException as error:
        return _say(error.format_message(), USAGE)
    except UsageError as error:
        return _say(str(error), USAGE)
    except RunError as error:
        return _say(str(error), FAILED)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output left; there is nobody to tell
        return FAILED
    except Exception as error:
        if "--debug" in words:
            raise
        return _say(f"unexpected {type(error).__name__}: {error}; this is a bug: --debug shows where", FAILED)


def _say(sentence: str, code: int) -> int:
    one_line = " ".join(sentence.split())
    print(f"moe-engine: {one_line}", file=sys.stderr)
    return code
