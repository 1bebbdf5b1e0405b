"""summary.json: what a finished run amounts to, the worst findings first."""

import sys
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from typing import Any

import attrs
import torch
from torch import nn

from ..contract.stats import Finding, Metrics, plain
from ..engine.engine import Engine
from ..layer.flops import model_flops, parameters_of
from ..layer.moe import MoE
from .config import RunConfig

BALANCE = ("active", "load", "cv", "gini", "entropy", "max_min", "maxvio", "dropped")  # of each layer


def versions() -> dict[str, str]:
    """The versions of the software that a run used."""
    names = ("moe-engine", "torch", "numpy")
    return {"python": sys.version.split()[0], **{name: _version(name) for name in names}}


@cache  # finding and parsing a distribution's metadata takes 8 ms, and each checkpoint asks
def _version(name: str) -> str:
    return metadata.version(name)


def summarize(
    config: RunConfig,
    engine: Engine,
    model: nn.Module,
    *,
    step: int,
    seconds: float,
    means: Mapping[str, float],
    layers: Mapping[str, Metrics],
    perplexity: bool,
    speed: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of summary.json. means, layers: from the last evaluation. perplexity: report exp(loss).

    speed: see `Pace`.
    """
    findings = _findings(engine, step, layers)
    verdicts = [finding["name"] for finding in findings if finding["metric"] == "verdict"]
    return {
        "task": config.task,
        "plugins": engine.plugins.described(),
        "versions": versions(),
        "seed": config.seed,
        "device": torch.device(config.device).type,
        "steps": step,
        "seconds": seconds,
        "speed": {name: plain(value) for name, value in speed.items()},
        "loss": plain(means["loss"]),
        "accuracy": plain(means.get("accuracy")),
        "perplexity": plain(float(torch.tensor(means["loss"]).exp())) if perplexity else None,
        "measures": {name: plain(value) for name, value in means.items() if name not in ("loss", "accuracy")},
        "verdict": verdicts[0] if verdicts else None,
        "findings": findings,
        "sizes": sizes(model),
        "layers": [_layer_summary(layer, layers.get(layer.name, {})) for layer in engine.layers],
        "growths": [plain(attrs.asdict(grown)) for grown in engine.growths],
    }


def sizes(model: nn.Module) -> dict[str, float]:
    """Learned parameters, all and those that a token uses, and the forward FLOPs of the MoE layers for one token."""
    parameters, flops = parameters_of(model), model_flops(model, {})
    return {
        "parameters": parameters.total,
        "active_parameters": parameters.active,
        "flops.active": flops.active,
        "flops.total": flops.total,
    }


def _findings(engine: Engine, step: int, layers: Mapping[str, Metrics]) -> list[dict[str, Any]]:
    """Verdicts first, then other findings; each sorted by severity, the worst first."""
    findings = [
        (finding.severity, {"layer": layer, "metric": name, **plain(_advised(engine, step, layer, name, finding))})
        for layer, metrics in layers.items()
        for name, finding in metrics.items()
        if isinstance(finding, Finding)
    ]
    findings += [
        (remark.severity, {"layer": "all layers", "metric": f"remark.{name}", **plain(remark)})
        for name, remark in engine.plugins.remarks.items()
    ]
    findings += [(finding["severity"], finding) for finding in _idle_triggers(engine, step)]
    findings.sort(key=lambda pair: (pair[1]["metric"] != "verdict", -pair[0]))
    return [finding for _, finding in findings]


def _advised(engine: Engine, step: int, layer: str, metric: str, finding: Finding) -> Finding:
    """A verdict with advice for a layer that grew: an expert that starts untrained gets little load for long."""
    added = [grown.step for grown in engine.growths if grown.layer == layer and None in grown.rows]
    if metric != "verdict" or not finding.advice or not added:
        return finding
    newest = f"the newest expert had {step - added[-1]} steps of training"
    start = (
        "more steps, or a start as a copy of a trained one (initializers: moe-engine plugins), may even out the load"
    )
    return attrs.evolve(finding, advice=f"{finding.advice}; {newest}: {start}")


def _idle_triggers(engine: Engine, step: int) -> list[dict[str, Any]]:
    """A finding for each trigger that caused no growth."""
    acted = {grown.why.partition(":")[0] for grown in engine.growths}
    idle = [bound.plugin for bound in engine.triggers.bounds if bound.plugin not in acted]
    return [
        {
            "layer": "all layers",
            "metric": f"inert.{name}",
            "name": "no effect",
            "severity": 1,
            "why": f"{name} triggered no growth in {step} steps",
            "advice": f"run longer, or let it act earlier: moe-engine plugins {name} lists its options",
        }
        for name in idle
    ]


def _layer_summary(layer: MoE, metrics: Metrics) -> dict[str, Any]:
    """The metrics that every layer has, null where no plugin returns them, then every other number."""
    measured = {name: plain(metrics.get(name)) for name in BALANCE}
    others = {name: plain(value) for name, value in metrics.items() if name not in BALANCE}
    numbers = {name: value for name, value in others.items() if value is None or isinstance(value, int | float)}
    return {"name": layer.name, "experts": layer.spec.experts, "top_k": layer.spec.top_k, **measured, **numbers}
