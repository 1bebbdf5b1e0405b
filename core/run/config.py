"""A run's configuration: declares every flag of `run`, and reads config files."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import attrs
import tomli_w

from ..contract.options import Settings, build, option, options_of, values_of
from ..errors import UsageError, listed
from ..files import MOST_TOML, read_file, read_toml
from ..registry.discovery import defaults, disabled, find


@attrs.define(eq=False)
class RunConfig:
    """The options of a run itself: the flags of `moe-engine run`, and [run] in a config file.

    A flag's help is the text given here, word for word.
    """

    task: str = option(defaults()["task"], help="Task plugin: data, model and score.")
    plugins: tuple[str, ...] = option((), help="Plugins to use; they act in this order.")
    no_plugin: tuple[str, ...] = option((), help="Plugins to leave out, including default ones.")
    experts: int | None = option(None, help="Experts per layer; unset: 8, or those of a loaded model.", min=1)
    top_k: int | None = option(None, help="Experts per token; unset: 2, or those of a loaded model.", min=1)
    dense: bool = option(
        False, help="Replace each MoE layer with an MLP as wide as the experts that one token is sent to."
    )
    capacity: float | None = option(
        None, help="Capacity factor C: in training an expert keeps at most ceil(C*T*K/E) of T tokens; unset: no limit."
    )
    eval_capacity: float | None = option(None, help="The same in evaluation; unset: no limit.")
    capacity_per: str = option(
        "batch", help="T is the number of tokens of a batch, or of each sequence.", choices=("batch", "sequence")
    )
    allow_no_gradient: bool = option(
        False, help="Allow a router that gets no gradient from the task and so cannot learn; the report says so."
    )
    epochs: int = option(20, help="Passes over the training data.", min=1)
    steps: int | None = option(None, help="Stop after this many optimizer steps; unset: run all epochs.", min=1)
    batch_size: int = option(64, help="Samples per optimizer step.", min=1)
    lr: float = option(0.001, help="Learning rate of Adam.", min=0)
    lr_schedule: str = option(
        "constant",
        help="Keep the learning rate constant, or decay it to 0 along a cosine.",
        choices=("constant", "cosine"),
    )
    weight_decay: float = option(0.0, help="Decoupled weight decay, as in AdamW.", min=0)
    seed: int = option(0, help="Seed of every random draw.", min=0)
    device: str = option("auto", help="Device, such as cpu or cuda:1; auto: the first available of cuda, mps and cpu.")
    precision: str = option(
        "fp32",
        help="bf16: run forward passes under autocast; weights stay fp32. fp64: weights, data and sums in float64.",
        choices=("fp32", "bf16", "fp64"),
    )
    bf16_matmul: str = option(
        "auto",
        help="Precision of expert matmuls on CPU under bf16; auto: measure and pick the faster.",
        choices=("auto", "bf16", "fp32"),
    )
    threads: int | None = option(None, help="CPU threads; unset: 1 for a model too small for more to help.", min=1)
    data_dir: str = option("data", help="Folder of data sets; missing ones are downloaded into it.")
    grow_until: float = option(
        0.8, help="Share of the steps after which no expert is added, so that none ends untrained.", min=0, max=1
    )
    eval_every: int | None = option(
        None, help="Steps between evaluations on the test set; unset: once per epoch.", min=1
    )
    log_every: int = option(50, help="Steps between log points.", min=1)
    checkpoint_every: int = option(500, help="Steps between checkpoints.", min=1)
    parallel: str = option(
        "data",
        help="Under torchrun: each rank holds all weights (data), or its part of them (shard).",
        choices=("data", "shard"),
    )
    expert_parallel: int = option(1, help="Under torchrun: ranks over which each layer's experts are spread.", min=1)
    local_losses: bool = option(False, help="Under torchrun: compute losses on each rank's tokens alone.")
    no_sample: bool = option(False, help="Keep no sample of the test set, which shows data, in the folder and reports.")
    record_routing: bool = option(False, help="Save the test set's routing, for replay and routing-stats.")


def read_config(file: Path | None, dropped: Iterable[str] = ()) -> tuple[dict[str, Any], Settings]:
    """([run], [plugins.NAME]) of a TOML file; ({}, {}) without one. Raises UsageError.

    dropped: plugins that are not needed.
    """
    if file is None:
        return {}, {}
    try:
        tables = read_toml(read_file(file, MOST_TOML))
    except OSError as error:
        raise UsageError(f"config file {file} can't be read: {error.strerror}", code="unreadable-file") from error
    except (ValueError, RecursionError) as error:  # a number of too many digits is not a TOMLDecodeError
        raise UsageError(f"config file {file} is not TOML: {error}", code="invalid-toml") from error
    if unknown := sorted(tables.keys() - {"run", "plugins", "installed"}):
        message = f"config file {file} has {listed(unknown)}; its tables are [run] and [plugins.NAME]"
        raise UsageError(message, code="unknown-table")
    run, plugins, installed = (tables.get(name, {}) for name in ("run", "plugins", "installed"))
    named = [("run", run), ("plugins", plugins), ("installed", installed)]
    for name, table in [*named, *(plugins.items() if isinstance(plugins, dict) else ())]:
        if not isinstance(table, dict):
            message = f"config file {file}: '{name}' must be a table of options, not {table!r}"
            raise UsageError(message, code="not-a-table")
    _check_installed(file, {name: home for name, home in installed.items() if name not in set(dropped)})
    return run, plugins


def _check_installed(file: Path, installed: Mapping[str, Any]) -> None:
    """Raise UsageError for a plugin of the run that is not here, with what to install."""
    missing = sorted(installed.keys() - find().keys() - disabled())
    if missing:
        name, home = missing[0], str(installed[missing[0]])
        message = f"config file {file} was made with plugin '{name}' of {home}, which is not installed"
        raise UsageError(f"{message}: pip install {home.replace(' ', '==')}", code="plugin-not-installed")


def merge_options(file: Mapping[str, Any], flags: Mapping[str, Any]) -> RunConfig:
    """The run's configuration: flags override the file, which overrides the defaults. None: a flag not given."""
    given = {**file, **{name: value for name, value in flags.items() if value is not None}}
    config: RunConfig = build(RunConfig, "run", given)
    return config


def config_toml(config: RunConfig, settings: Settings, plugins: Iterable[Mapping[str, str]]) -> str:
    """The config file that reproduces the run. plugins: name, distribution and version of each."""
    tables = {"run": _toml_values(values_of(config)), "plugins": {k: _toml_values(v) for k, v in settings.items() if v}}
    foreign = {one["name"]: f"{one['distribution']} {one['version']}" for one in plugins}
    return tomli_w.dumps({**tables, "installed": foreign})


def _toml_values(values: Mapping[str, Any]) -> dict[str, Any]:
    # TOML has no null; options of type `X | None` read it from the word "none"
    return {
        key: "none" if value is None else list(value) if isinstance(value, tuple) else value
        for key, value in values.items()
    }


def flag_names() -> dict[str, Any]:
    """Every option of a run by name."""
    return dict(options_of(RunConfig))
