"""One self-contained page about a run."""

import attrs
from markupsafe import Markup

from moe_engine import hookimpl
from moe_engine.files import write_atomically

CAPTIONS = {
    "loss": "Loss",
    "accuracy": "Accuracy",
    "balance": "Balance",
    "usage": "Usage per expert",
    "classes": "Classes and experts",
    "effects": "What each term did",
}


@attrs.define(eq=False)
class Html:
    """Writes report.html: the verdict first, then curves, usage per expert over time, classes by expert,
    what each term did, and the configuration. It needs no network and follows the reader's light or dark mode.
    """

    @hookimpl
    def moe_report(self, run):
        from jinja2 import Environment, PackageLoader

        from moe_engine.run.figures import figure_bytes, of_run

        pictures = [
            {
                "caption": CAPTIONS[name.split(" ")[0]],
                "layer": " ".join(name.split(" ")[1:]),
                "svg": _svg(figure_bytes(figure, "svg"), index),
            }
            for index, (name, figure) in enumerate(of_run(run).items())
        ]
        page = Environment(loader=PackageLoader(__package__, ""), autoescape=True).get_template("report.html.jinja")
        config = (run.folder / "config.toml").read_text("utf-8")
        text = page.render(run=run, summary=run.summary, pictures=pictures, config=config)
        write_atomically(run.folder / "report.html", text.encode())
        return ["report.html"]


def _svg(content, index):
    """An SVG to stand inside a page: without its prologue, with ids that no other picture has."""
    text = content.decode()
    text = text[text.index("<svg") :]
    for mark in ('id="', 'xlink:href="#', 'href="#', "url(#"):
        text = text.replace(mark, f"{mark}f{index}-")
    return Markup(text.replace(f'xlink:href="#f{index}-f{index}-', f'xlink:href="#f{index}-'))
