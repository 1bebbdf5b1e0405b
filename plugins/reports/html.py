import attrs

from moe_engine import hookimpl, run_page, write_atomically


@attrs.define(eq=False)
class Html:
    """One self-contained page about a run.

    report.html: the verdict first, then curves, the load of each expert over the steps, growth, what each layer does,
    and the configuration. It works offline and follows the reader's light or dark mode.
    """

    @hookimpl
    def moe_report(self, run):
        write_atomically(run.folder / "report.html", run_page(run).encode())
        return ["report.html"]
