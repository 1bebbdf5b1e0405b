"""Read a study's TOML file and check the names in it."""

from collections.abc import Mapping
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import cattrs

from ..errors import UsageError, listed, nearest
from ..files import MOST_TOML, read_file, read_toml
from ..registry import discovery
from .spec import Study


def shipped() -> dict[str, Traversable]:
    """The studies that come with the engine, by name."""
    files = resources.files("moe_engine.studies").iterdir()
    return {file.name.removesuffix(".toml"): file for file in sorted(files, key=str) if file.name.endswith(".toml")}


def read_study(name: str) -> Study:
    """The study with that name, or from that TOML file. Raises UsageError."""
    file = Path(name) if name.endswith(".toml") else shipped().get(name)
    if file is None:
        raise UsageError(
            f"there is no study '{name}'; {nearest(name, shipped())}; a file must end in .toml", code="unknown-study"
        )
    try:
        tables = read_toml(_content(file))
        study = _converter().structure({"name": file.name.removesuffix(".toml"), **tables}, Study)
    except OSError as error:
        raise UsageError(f"cannot read study {name}: {error.strerror}", code="unreadable-file") from error
    except cattrs.BaseValidationError as error:
        problem = cattrs.transform_error(error, "study", _problem)[0]
        raise UsageError(f"study {name}: {problem}", code="invalid-study") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"study {name} is not valid TOML: {error}", code="invalid-toml") from error
    _check(study)
    return study


def _content(file: Traversable) -> bytes:
    return read_file(file, MOST_TOML) if isinstance(file, Path) else file.read_bytes()


def _problem(error: BaseException, kind: type | None) -> str:
    """What is wrong with a value: the message of its own check, if it has one."""
    checked = type(error) is ValueError and error.args
    return str(error.args[0]) if checked else cattrs.v.format_exception(error, kind)


def _converter() -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True)
    converter.register_structure_hook_func(lambda kind: kind == tuple[str, ...], _words)
    return converter


def _words(value: Any, _: Any) -> tuple[str, ...]:
    """A list of strings; a single string counts as a list of one."""
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        raise ValueError(f"{value!r} is not a list of strings")
    return tuple(value)


def _check(study: Study) -> None:
    """Raise UsageError for a name that does not exist."""
    parts = [part.name for part in study.part]
    if not parts:
        raise UsageError(f"study {study.name} has no [[part]]", code="invalid-study")
    if repeated := [name for name in parts if parts.count(name) > 1]:
        raise UsageError(f"study {study.name}: two parts are called '{repeated[0]}'", code="duplicate-name")
    for part in study.part:
        _check_names(study, f"part '{part.name}'", part.cross)
    for criterion in study.criterion:
        _check_names(study, f"criterion '{criterion.claim}'", criterion.where)
        _check_names(study, f"criterion '{criterion.claim}'", criterion.against)
    for figure in study.figure:
        x = {figure.x: ()} if figure.kind == "against" else {}
        _check_names(study, f"figure '{figure.name}'", {**figure.where, **x})
        _check_names(study, f"figure '{figure.name}'", figure.lines)
    for row in study.published:
        at = {axis: (choice,) for axis, choice in row.at.items()}
        _check_names(study, f"published '{row.name}'", {"part": (row.part,), **at})
    _check_names(study, "quick.titles", {"part": tuple(study.quick.titles)})
    if unknown := study.quick.figures.keys() - {figure.name for figure in study.figure}:
        message = f"study {study.name}, quick.figures: there is no figure '{min(unknown)}'"
        raise UsageError(message, code="unknown-figure")
    _check_plugins(study)


def _check_names(study: Study, where: str, names: Mapping[str, tuple[str, ...]]) -> None:
    """Raise UsageError for an axis that the study lacks, or a choice that the axis lacks."""
    axes = {"part": [part.name for part in study.part], **study.axis}
    for axis, choices in names.items():
        if axis not in axes:
            message = f"study {study.name}, {where}: there is no axis '{axis}'; {nearest(axis, axes)}"
            raise UsageError(message, code="unknown-axis")
        for choice in choices:
            if choice not in axes[axis]:
                known = listed(map(repr, axes[axis]))
                message = f"study {study.name}, {where}: axis '{axis}' has no choice '{choice}'; choose from {known}"
                raise UsageError(message, code="unknown-choice")


def _check_plugins(study: Study) -> None:
    """Raise UsageError for a plugin that is not installed."""
    added = [part.add for part in study.part]
    choices = [choice for axis in study.axis.values() for choice in axis.values()]
    installed = discovery.find()
    for plugin in [name for whole in (study.base, *added, *choices) for name in (*whole.plugins, *whole.set)]:
        if plugin not in installed:
            message = f"study {study.name}: there is no plugin '{plugin}'; {nearest(plugin, installed)}"
            raise UsageError(message, code="unknown-plugin")
