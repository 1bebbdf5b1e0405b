"""The pictures of a run as PNG files."""

import attrs

from moe_engine import hookimpl
from moe_engine.files import write_atomically


@attrs.define(eq=False)
class Plots:
    """Writes plots/NAME.png: loss, accuracy, and for each layer balance, usage, classes and effects."""

    @hookimpl
    def moe_report(self, run):
        from moe_engine.run.figures import figure_bytes, of_run

        folder = run.folder / "plots"
        folder.mkdir(exist_ok=True)
        written = []
        for name, figure in of_run(run).items():
            path = folder / f"{name.replace(' ', '-').replace('/', '_')}.png"
            write_atomically(path, figure_bytes(figure, "png"))
            written.append(str(path.relative_to(run.folder)))
        return written
