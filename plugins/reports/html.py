import attrs
from markupsafe import Markup

from moe_engine import hookimpl, run_figures, write_atomically

CAPTIONS = {
    "loss": "Loss",
    "accuracy": "Accuracy",
    "balance": "Balance",
    "usage": "Usage per expert",
    "classes": "Classes by expert",
    "effects": "Effect of each loss and bias",
}


@attrs.define(eq=False)
class Html:
    """One self-contained page about a run.

    report.html: the verdict first, then curves, usage per expert over time, classes by expert, the effect of each
    loss and bias, and the configuration. It works offline and follows the reader's light or dark mode.
    """

    @hookimpl
    def moe_report(self, run):
        from jinja2 import Environment, PackageLoader

        figures = [
            {
                "caption": CAPTIONS[name.split(" ")[0]],
                "layer": " ".join(name.split(" ")[1:]),
                "svg": _svg(svg, index),
            }
            for index, (name, svg) in enumerate(run_figures(run).items())
        ]
        page = Environment(loader=PackageLoader(__package__, ""), autoescape=True).get_template("report.html.jinja")
        config = (run.folder / "config.toml").read_text("utf-8")
        text = page.render(run=run, summary=run.summary, figures=figures, config=config)
        write_atomically(run.folder / "report.html", text.encode())
        return ["report.html"]


def _svg(content, index):
    """An SVG to embed in a page: without its prologue, and with ids unique to this figure."""
    text = content.decode()
    text = text[text.index("<svg") :]
    for prefix in ('id="', 'xlink:href="#', 'href="#', "url(#"):
        text = text.replace(prefix, f"{prefix}f{index}-")
    return Markup(text.replace(f'xlink:href="#f{index}-f{index}-', f'xlink:href="#f{index}-'))
