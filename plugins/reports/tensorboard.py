import shutil
from importlib.util import find_spec

import attrs

from moe_engine import UsageError, hookimpl

MISSING = "report 'tensorboard' needs the package tensorboard, which is not installed: pip install tensorboard"


@attrs.define(eq=False)
class TensorBoard:
    """The metrics of a run for TensorBoard.

    tensorboard/train and tensorboard/eval: event files with the run's metrics, and LAYER/METRIC for each layer;
    writing them again replaces them. View them with: tensorboard --logdir runs. Needs pip install
    "moe-engine[tensorboard]".
    """

    @hookimpl
    def moe_check(self, setup):
        return None if find_spec("tensorboard") else MISSING

    @hookimpl
    def moe_report(self, run):
        if not find_spec("tensorboard"):
            raise UsageError(MISSING, code="missing-package")
        fresh, folder = run.folder / "tensorboard.new", run.folder / "tensorboard"
        shutil.rmtree(fresh, ignore_errors=True)  # left by a killed process
        for split in dict.fromkeys(record["split"] for record in run.records):
            _write(fresh / split, [record for record in run.records if record["split"] == split])
        shutil.rmtree(folder, ignore_errors=True)
        fresh.rename(folder)
        return sorted(str(path.relative_to(run.folder)) for path in folder.rglob("*") if path.is_file())


def _write(folder, records):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for record in records:
            for name, value in _scalars(record).items():
                writer.add_scalar(name, value, record["step"])
    (events,) = folder.iterdir()
    events.rename(folder / "events.out.tfevents.run")  # the default name holds the time


def _scalars(record):
    layers = {f"{layer}/{name}": v for layer, metrics in record["layers"].items() for name, v in metrics.items()}
    values = {**{name: value for name, value in record.items() if name not in ("step", "epoch")}, **layers}
    return {name: value for name, value in values.items() if isinstance(value, int | float)}
