"""`moe-engine generate`: let a language model continue a text."""

from pathlib import Path

import click

from .flags import flags
from .output import echo


@click.command("generate", short_help="Let a language model continue a text.")
@click.argument("folder", type=click.Path(path_type=Path), metavar="RUN|FOLDER")
@click.option("--prompt", required=True, metavar="TEXT", help="What the text begins with.")
@click.option(
    "--tokens", type=click.IntRange(1), default=64, show_default=True, metavar="INTEGER", help="Tokens to write."
)
@click.option(
    "--temperature",
    type=click.FloatRange(0, 100),
    default=0.0,
    metavar="FLOAT",
    help="Of the draws; 0: always the likeliest token.  [default: 0]",
)
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, metavar="INTEGER", help="Seed of the draws."
)
@flags("device")
def generate(folder: Path, prompt: str, tokens: int, temperature: float, seed: int, device: str | None) -> None:
    """Let a language model continue a text.

    \b
    Read what a fine-tuned mixture writes:
        moe-engine generate runs/A --prompt "To be, or" --tokens 100
        moe-engine generate models/A --prompt "To be, or" \\
            --temperature 0.8 --seed 1

    RUN and FOLDER are those of `evaluate`. The text is written to standard
    output, prompt included. The same seed gives the same text on the same
    machine and versions.
    """
    from ..pretrained.loading import reading
    from ..pretrained.trained import continuation, open_trained
    from ..run.device import find_device

    trained = open_trained(
        folder, find_device(device or "auto"), lambda remark: echo(f"moe-engine: {remark}", err=True)
    )
    with reading(folder, "the model"):
        text = continuation(trained, prompt, tokens, temperature, seed)
    echo(prompt + text)
