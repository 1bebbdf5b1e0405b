"""The numbers of a run for TensorBoard."""

import shutil
from importlib.util import find_spec

import attrs

from moe_engine import UsageError, hookimpl

MISSING = "report 'tensorboard' needs the package tensorboard, which is not installed: pip install tensorboard"


@attrs.define(eq=False)
class TensorBoard:
    """Writes tensorboard/train and tensorboard/eval: event files of the run's numbers, and LAYER/METRIC of each layer.

    See them with: tensorboard --logdir runs. Needs pip install "moe-engine[tensorboard]". Written again, the
    files replace what was there.
    """

    @hookimpl
    def moe_check(self, setup):
        return None if find_spec("tensorboard") else MISSING

    @hookimpl
    def moe_report(self, run):
        if not find_spec("tensorboard"):
            raise UsageError(MISSING)
        fresh, folder = run.folder / "tensorboard.new", run.folder / "tensorboard"
        shutil.rmtree(fresh, ignore_errors=True)  # of a report that was killed
        for split in dict.fromkeys(record["split"] for record in run.records):
            _write(fresh / split, [record for record in run.records if record["split"] == split])
        shutil.rmtree(folder, ignore_errors=True)
        fresh.rename(folder)
        return sorted(str(path.relative_to(run.folder)) for path in folder.rglob("*") if path.is_file())


def _write(folder, records):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for record in records:
            for name, value in _numbers(record).items():
                writer.add_scalar(name, value, record["step"])
    (events,) = folder.iterdir()
    events.rename(folder / "events.out.tfevents.run")  # not a name with the time in it


def _numbers(record):
    layers = {f"{layer}/{name}": value for layer, own in record["layers"].items() for name, value in own.items()}
    every = {**{name: value for name, value in record.items() if name not in ("step", "epoch")}, **layers}
    return {name: value for name, value in every.items() if isinstance(value, int | float)}
