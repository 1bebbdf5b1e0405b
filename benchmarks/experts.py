"""The experts relative to the necessary computation and to other libraries, cell by cell.

dense: an MLP on as many rows, in fp32. matmuls: the experts' matmuls alone. layer: with router, saturation, switch_aux
and ledger. Other libraries, if installed, get the same weights and routing. Every output and gradient is checked
against float64 before anything is timed. Ratios are medians over paired repetitions.
"""

import sys
from collections.abc import Mapping
from typing import Any

import attrs
import torch

from cells import Cell, dense, engine_experts, errors, matmuls, problem_of, step, weight_gradients, whole_layer
from moe_engine.layer.fused_cpu import matmul_dtype
from paired import RESULTS, Call, Criterion, Times, arguments, ratio, report, steady, timed
from peers import FORWARDS, ONLY_SMALL, WHOLE, installed

E8, WIDE = Cell(), Cell(dim=512, hidden=1024)
E64, E256 = Cell(experts=64), Cell(dim=512, hidden=512, experts=256)


def zipf(cell: Cell) -> Cell:
    return attrs.evolve(cell, load="zipf")


def bf16(cell: Cell) -> Cell:
    return attrs.evolve(cell, precision="bf16")


SHORT = attrs.evolve(bf16(E8), tokens=128)
BF16 = tuple(bf16(cell) for cell in (E8, E64, E256))
NATIVE = matmul_dtype(torch.bfloat16) == torch.bfloat16  # without, other libraries take seconds for the cells of BF16
WITH_PEERS = (E8, WIDE, E64, E256, zipf(E8), zipf(E64), SHORT, *(BF16 if NATIVE else ()))
WITH_LAYER = (E8, WIDE, E64, E256)
CELLS = (
    *WITH_PEERS,
    zipf(E256),
    attrs.evolve(E8, load="one"),
    Cell(tokens=8192, experts=1, top_k=1),
    *(Cell(experts=count) for count in (2, 4, 16, 32, 128, 512)),
    *(Cell(top_k=count) for count in (1, 4, 8)),
    *(attrs.evolve(cell, forward_only=True) for cell in (E8, E64)),
    *(attrs.evolve(cell, adam=True) for cell in (E8, E64)),
    Cell(activation="gelu"),
    Cell(activation="swiglu"),
    Cell(bias=True),
    *(() if NATIVE else BF16),
    attrs.evolve(E8, precision="autocast"),
    attrs.evolve(E8, threads=2),
)
ERROR_LIMITS = {"fp32": 1e-6, "bf16": 4e-3, "autocast": 4e-3}  # of the relative error
EXPERT_LIMITS = (  # the engine relative to what, at most
    (E8, "dense", 1.12),
    (E8, "transformers grouped_mm", 0.95),
    (WIDE, "dense", 1.08),
    (WIDE, "transformers grouped_mm", 0.95),
    (E64, "matmuls", 1.12),
    (E64, "best peer", 1.05),
    (E256, "matmuls", 1.12),
    (E256, "best peer", 1.08),
    *((zipf(cell), "matmuls", 1.18) for cell in (E8, E64, E256)),
    (E8, "st-moe-pytorch", 0.4),
    (E8, "GShard einsum", 0.4),
)
NATIVE_LIMITS = tuple((cell, "matmuls", 1.2) for cell in BF16)
UPCAST_LIMITS = (
    (SHORT, "best peer", 0.2),
    *((cell, "dense", at_most) for cell, at_most in zip(BF16, (1.25, 1.25, 2.2), strict=True)),
)
LAYER_LIMITS = (  # the whole layer relative to what, at most
    (E8, "dense", 1.25),
    (WIDE, "dense", 1.15),
    (E256, "engine", 1 / 0.75),  # everything but the experts takes under 25 % of the layer
)


def candidates(named: Cell, smoke: bool) -> tuple[dict[str, Call], dict[str, float]]:
    """(the calls timed in a cell, the engine's relative errors)."""
    cell = named.small() if smoke else named
    given = problem_of(cell)
    forward = engine_experts(cell, given)
    found = checked("engine", cell, errors(cell, given, forward))
    calls = {
        "dense": dense(cell, given),
        "matmuls": matmuls(cell, given),
        "weight gradients": weight_gradients(given),
        "engine": step(cell, given, forward),
    }
    if named in WITH_LAYER:
        calls["layer"] = whole_layer(cell)
    if named in WITH_PEERS:
        fit = [name for name in (*FORWARDS, *WHOLE) if installed(name) and (named == E8 or name not in ONLY_SMALL)]
        for name in fit:
            if name in WHOLE:
                calls[name] = WHOLE[name](cell, given)
                continue
            peer = FORWARDS[name](cell, given)
            checked(name, cell, errors(cell, given, peer, weights=False), slack=4)
            calls[name] = step(cell, given, peer)
    return calls, found


def checked(name: str, cell: Cell, found: dict[str, float], slack: float = 1) -> dict[str, float]:
    """The errors, if they are within this precision; exits otherwise."""
    worst = max(found.values())
    if not worst <= slack * ERROR_LIMITS[cell.precision]:
        raise SystemExit(f"{name} in {cell.name}: relative error {worst:.1e} against float64; {found}")
    return found


def summary(cell: Cell, times: Times) -> dict[str, Any]:
    """Every candidate relative to dense, and the engine relative to the matmuls and to every other library."""
    clock = "wall" if cell.threads > 1 else "cpu"
    found = {
        "over dense": {name: ratio(times, name, "dense", clock) for name in times if name != "dense"},
        "over matmuls": {"engine": ratio(times, "engine", "matmuls", clock)},
        "engine over": {name: ratio(times, "engine", name, clock) for name in times if name in {**FORWARDS, **WHOLE}},
    }
    if "layer" in times:
        found["layer over"] = {name: ratio(times, "layer", name, clock) for name in ("dense", "engine")}
    matched = {name: numbers for name, numbers in found["engine over"].items() if name in FORWARDS}
    if matched:
        best = max(matched, key=lambda name: matched[name]["median"])
        found["engine over"]["best peer"] = {**matched[best], "peer": best}
    return found


def criteria(found: Mapping[Cell, Mapping[str, Any]]) -> list[Criterion]:
    """The criteria whose cell and candidates were measured."""
    judged = []
    for cell, base, at_most in (*EXPERT_LIMITS, *(NATIVE_LIMITS if NATIVE else UPCAST_LIMITS)):
        measured = found.get(cell, {})
        ratios = measured.get("engine over", {}) | {
            name: measured[f"over {name}"]["engine"] for name in ("dense", "matmuls") if measured
        }
        if base in ratios:
            named = f"{base} ({ratios[base]['peer']})" if base == "best peer" else base
            judged.append(Criterion(f"{cell.name}: experts over {named}", ratios[base], at_most))
    for cell, base, at_most in LAYER_LIMITS:
        if cell in found:
            judged.append(Criterion(f"{cell.name}: layer over {base}", found[cell]["layer over"][base], at_most))
    return judged


def table(found: Mapping[Cell, Mapping[str, Any]]) -> str:
    """A line for each cell, in Markdown: ratios to dense, and of the engine to the others."""
    columns = ("matmuls", "weight gradients", "engine", "layer")
    lines = [
        "| cell | dense ms | " + " | ".join(columns) + " | engine/matmuls | engine over others |",
        "|---" * 8 + "|",
    ]
    for cell, measured in found.items():
        ratios = measured["over dense"]
        values = [f"{ratios[name]['median']:.2f}" if name in ratios else "" for name in columns]
        low, high = ratios["engine"]["quartiles"]
        values[2] += f" [{low:.2f}, {high:.2f}]"
        others = {name: numbers for name, numbers in measured["engine over"].items() if name != "best peer"}
        listed = ", ".join(f"{name} {numbers['median']:.2f}" for name, numbers in others.items())
        base, over_matmuls = ratios["engine"]["base_ms"], measured["over matmuls"]["engine"]["median"]
        lines.append(f"| {cell.name} | {base:.0f} | " + " | ".join(values) + f" | {over_matmuls:.2f} | {listed} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    options = arguments("The experts relative to floors and other libraries.", repetitions=15)
    if absent := [name for name in (*FORWARDS, *WHOLE) if not installed(name)]:
        print(f"left out, not installed: {', '.join(absent)}; pip install 'moe-engine[peers]'", file=sys.stderr)
    steady()
    found: dict[Cell, dict[str, Any]] = {}
    for number, cell in enumerate(CELLS, start=1):
        torch.manual_seed(0)
        torch.set_num_threads(cell.threads)
        calls, wrong = candidates(cell, options.smoke)
        found[cell] = summary(cell, timed(calls, options.repetitions)) | {"errors": wrong}
        torch.set_num_threads(1)
        over_dense = found[cell]["over dense"]["engine"]["median"]
        print(f"{number}/{len(CELLS)}  {cell.name}: {over_dense:.2f} of dense", file=sys.stderr, flush=True)
    if not options.smoke:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "experts.md").write_text(table(found), encoding="utf-8")
    cells = {cell.name: measured for cell, measured in found.items()}
    return report("experts", criteria(found), options.smoke, cells=cells)


if __name__ == "__main__":
    sys.exit(main())
