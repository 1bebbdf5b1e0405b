"""What reports read from a run: its figures, and each expert's share of the load over time."""

from ..contract.run import Run
from .recorded import lives


def run_figures(run: Run, kind: str = "svg") -> dict[str, bytes]:
    """Draw every figure of a finished run; returns the file contents by figure name.

    Names: "loss" and "accuracy"; "balance", "usage", "classes" and "effects", each followed by a space and a
    layer's name. Figures without data are left out. kind: "svg" and "pdf" are transparent, "png" is white.
    """
    from .figures import figure_bytes, of_run

    return {name: figure_bytes(figure, kind) for name, figure in of_run(run).items()}


def expert_loads(run: Run, layer: str) -> list[tuple[int, dict[int, float]]]:
    """(step, {expert: share of the load}) at each training log point of one layer of a finished run.

    Experts are numbered in the order in which they were created. Unlike an index, that number survives the
    removal of other experts; removed ones are absent.
    """
    return lives(run, layer)[0]
