"""`moe-engine export`: write the model of a run as a folder of transformers."""

from pathlib import Path

import click

from .flags import json_flag
from .output import echo, echo_json


@click.command("export", short_help="Write the model of a run as a folder of transformers.")
@click.argument("run", type=click.Path(path_type=Path), metavar="RUN")
@click.argument("folder", type=click.Path(path_type=Path), metavar="FOLDER")
@json_flag("what was written")
def export(run: Path, folder: Path, as_json: bool) -> None:
    """Write the model of a run as a plain checkpoint of transformers, which
    from_pretrained loads.

    \b
    Fine-tune a mixture, then write it out:
        moe-engine run --task causal_lm --set causal_lm.model=FOLDER \\
            --set causal_lm.file=TEXT --plugins switch_aux --out runs/A
        moe-engine export runs/A models/A

    RUN is a run of task causal_lm, finished or running; its newest intact
    checkpoint counts, and the run is not changed. Adapters are merged. The
    folder is loaded again and its logits compared. What the architecture has no
    place for is refused: a bias in a model without a selection bias, say, or
    another router. Weights are written in float32.
    """
    from ..errors import UsageError
    from ..pretrained.exporting import export as write
    from ..pretrained.loading import reading
    from ..pretrained.trained import merge_adapters, of_run
    from ..run.device import find_device

    if folder.exists():
        raise UsageError(f"{folder} already exists; name another folder", code="folder-exists")
    trained = of_run(run, find_device("cpu"), lambda remark: echo(f"moe-engine: {remark}", err=True))
    merged = merge_adapters(trained.model)
    with reading(folder, "the export"):
        written = write(trained.engine, trained.model, folder, tokenizer=trained.language.tokenizer)
    if as_json:
        facts = {"folder": str(folder), "experts": written.experts, "change": written.change, "adapters": merged}
        echo_json(facts)
        return
    change = "" if written.change is None else f"; loaded again, logits differ by {written.change:.1e} of the largest"
    echo(f"{folder}: {written.experts} experts per layer{change}")
