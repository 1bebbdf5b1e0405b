"""A run's configuration: flags and config files."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import tomli_w

from ..contract.options import Settings, build, option, options_of, values_of
from ..errors import UsageError, listed
from ..registry.discovery import defaults


@attrs.define(eq=False)
class RunConfig:
    """A run's options apart from the plugins': the flags of `moe-engine run`, and [run] of a config file."""

    task: str = option(defaults()["task"], help="task plugin: the data, the model and how it is measured")
    plugins: tuple[str, ...] = option((), help="plugins to use, in this order")
    no_plugin: tuple[str, ...] = option((), help="plugins to leave out, also default ones")
    experts: int = option(8, help="number of experts in a layer", min=1)
    top_k: int = option(2, help="experts that a token is sent to", min=1)
    dense: bool = option(
        False, help="a plain MLP as wide as the experts that a token is sent to, in each layer's place"
    )
    capacity: float | None = option(
        None, help="an expert keeps at most ceil(C*T*K/E) of T real tokens in training; unset: drops nothing"
    )
    allow_no_gradient: bool = option(
        False, help="run also with a router that can't learn, as the task gives it no gradient; the report says so"
    )
    epochs: int = option(20, help="passes over the training data", min=1)
    steps: int | None = option(None, help="optimizer steps after which to end before that; unset: all epochs", min=1)
    batch_size: int = option(64, help="samples in a step", min=1)
    lr: float = option(0.001, help="learning rate of Adam", min=0)
    lr_schedule: str = option(
        "constant", help="cosine: the learning rate falls to 0 over the run", choices=("constant", "cosine")
    )
    weight_decay: float = option(0.0, help="share of lr by which a step shrinks every weight, as AdamW does", min=0)
    seed: int = option(0, help="fixes every random draw", min=0)
    device: str = option("auto", help="auto (cuda, mps, cpu: the first there is), or a device by name")
    precision: str = option(
        "fp32", help="fp32, or bf16: forwards under autocast, weights stay fp32", choices=("fp32", "bf16")
    )
    bf16_matmul: str = option(
        "auto",
        help="at precision bf16, what a CPU multiplies experts' numbers in; auto: what it measures as faster",
        choices=("auto", "bf16", "fp32"),
    )
    data_dir: str = option("data", help="folder of the data sets that are not embedded")
    eval_every: int | None = option(
        None, help="steps between two evaluations on the test set; unset: at the end of each epoch", min=1
    )
    log_every: int = option(50, help="steps between two log points", min=1)
    checkpoint_every: int = option(500, help="steps between two checkpoints, from which a run is resumed", min=1)
    record_routing: bool = option(False, help="save what each layer chose on the test set, for `moe-engine replay`")


def read_config(file: Path | None) -> tuple[dict[str, Any], Settings]:
    """([run], [plugins.NAME]) of a TOML file; ({}, {}) without one. Raises UsageError."""
    if file is None:
        return {}, {}
    try:
        tables = tomllib.loads(file.read_text("utf-8"))
    except OSError as error:
        raise UsageError(f"config file {file} can't be read: {error.strerror}", code="unreadable-file") from error
    except (ValueError, RecursionError) as error:  # a number of too many digits is not a TOMLDecodeError
        raise UsageError(f"config file {file} is not TOML: {error}", code="invalid-toml") from error
    if unknown := sorted(tables.keys() - {"run", "plugins"}):
        message = f"config file {file} has {listed(unknown)}; its tables are [run] and [plugins.NAME]"
        raise UsageError(message, code="unknown-table")
    run, plugins = tables.get("run", {}), tables.get("plugins", {})
    for name, table in [("run", run), ("plugins", plugins), *(plugins.items() if isinstance(plugins, dict) else ())]:
        if not isinstance(table, dict):
            message = f"config file {file}: '{name}' must be a table of options, not {table!r}"
            raise UsageError(message, code="not-a-table")
    return run, plugins


def merge_options(file: Mapping[str, Any], flags: Mapping[str, Any]) -> RunConfig:
    """The run's configuration: a flag overrides the file, which overrides the default. None: a flag not given."""
    given = {**file, **{name: value for name, value in flags.items() if value is not None}}
    config: RunConfig = build(RunConfig, "run", given)
    return config


def config_toml(config: RunConfig, settings: Settings) -> str:
    """The config file that reproduces the run."""
    return tomli_w.dumps(
        {"run": _toml_values(values_of(config)), "plugins": {k: _toml_values(v) for k, v in settings.items() if v}}
    )


def _toml_values(values: Mapping[str, Any]) -> dict[str, Any]:
    # TOML has no null; options of type `X | None` read it from the word "none"
    return {
        key: "none" if value is None else list(value) if isinstance(value, tuple) else value
        for key, value in values.items()
    }


def flag_names() -> dict[str, Any]:
    """Every option of a run by name."""
    return dict(options_of(RunConfig))
