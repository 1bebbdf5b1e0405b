import attrs

from moe_engine import hookimpl, run_figures, write_atomically


@attrs.define(eq=False)
class Plots:
    """The figures of a run as PNG files.

    plots/NAME.png: loss and accuracy, and for each layer its balance, usage, classes and effects.
    """

    @hookimpl
    def moe_report(self, run):
        folder = run.folder / "plots"
        folder.mkdir(exist_ok=True)
        written = []
        for name, content in run_figures(run, "png").items():
            path = folder / f"{name.replace(' ', '-').replace('/', '_')}.png"
            write_atomically(path, content)
            written.append(str(path.relative_to(run.folder)))
        return written
