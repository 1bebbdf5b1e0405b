"""`moe-engine run`: train, evaluate, report."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import click

from ..contract.options import Settings, parse_settings
from ..parallel.launch import joined
from ..registry.discovery import find
from ..registry.manager import Plugins
from ..run.config import RunConfig, merge_options, read_config
from .flags import debug_flag, flags, json_flag, out_flag, quiet_flag, settings_flag
from .follow import follow


@click.command(short_help="Train a model, watch its balance, and write a report.")
@flags("plugins", "no_plugin", "task", "experts", "top_k")
@flags("capacity", "eval_capacity", "capacity_per", "allow_no_gradient")
@flags("epochs", "steps", "batch_size", "lr", "lr_schedule", "weight_decay", "seed")
@flags("device", "precision", "bf16_matmul", "threads", "data_dir")
@flags("parallel", "expert_parallel", "local_losses")
@flags("grow_until", "eval_every", "log_every", "checkpoint_every", "no_sample", "record_routing")
@settings_flag
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    help="Read flags and options from a TOML file; flags and --set override it.",
)
@out_flag("Run folder.", "runs/TASK-TIME")
@json_flag("the summary")
@quiet_flag
@debug_flag
def run(
    settings: tuple[str, ...],
    config: Path | None,
    out: Path | None,
    as_json: bool,
    quiet: bool,
    debug: bool,
    **flags: Any,
) -> int:
    """Train a Mixture-of-Experts model, watch its balance, and write a report.

    \b
    Train on the built-in digits, balanced by a bias and a loss:
        moe-engine run --plugins saturation,switch_aux
    Train on MNIST, with a stronger loss:
        moe-engine run --task mnist --plugins switch_aux \\
            --set switch_aux.weight=0.1
    Repeat a run with another seed:
        moe-engine run --config runs/A/config.toml --seed 1

    The folder gets config.toml, metrics.jsonl, checkpoints, summary.json,
    model.safetensors and report.html. Ctrl-C stops the run after the
    current step; `moe-engine resume RUN` continues it.
    """
    file_flags, file_settings = read_config(config)
    run_config = merge_options(file_flags, flags)
    if any(flags[name] is not None for name in ("plugins", "no_plugin", "task")):
        file_settings = _of_active(file_settings, run_config)
    merged_settings: Settings = {name: dict(table) for name, table in file_settings.items()}
    for plugin, table in parse_settings(settings).items():
        merged_settings.setdefault(plugin, {}).update(table)

    with joined(run_config.device) as device:
        from ..run.elastic import begun
        from ..run.training import Training

        run_config = attrs.evolve(run_config, device=device)
        earlier = begun(out, run_config.task)
        training = Training(run_config, merged_settings, earlier or out, resumed=earlier is not None)
        return follow(training, as_json, quiet, debug)


def _of_active(settings: Mapping[str, dict[str, Any]], config: RunConfig) -> Settings:
    """A file's options without those of installed plugins that a flag removed from the run."""
    active = Plugins(config.plugins, config.no_plugin, task=config.task).active
    removed = find().keys() - active.keys()
    return {name: table for name, table in settings.items() if name not in removed}
