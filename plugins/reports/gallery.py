import attrs

from moe_engine import gallery_page, hookimpl, write_atomically


@attrs.define(eq=False)
class Gallery:
    """What each expert gets, in pictures and words.

    gallery.html: for each layer and expert, from the sample of the test set that a run keeps: the images with the
    largest gates and the mean image, weighted by gate; or the most characteristic tokens by lift, P(expert | token) /
    P(expert), and the places with the largest gates; the classes it gets; and how exclusive it is: D(expert) = sum
    p(c | expert) log2 p(c | expert) / p(c) over classes or tokens c, in bits and minus its bias, and the linear CKA of
    its outputs with those of the nearest expert. Without a sample (--no-sample) the page says so.

    Sources: DeWeese and Meister, 1999 (How to Measure the Information Gained from One Symbol); Kornblith et al., 2019
    (CKA); the bias is that of Miller, 1955.
    """

    @hookimpl
    def moe_report(self, run):
        write_atomically(run.folder / "gallery.html", gallery_page(run).encode())
        return ["gallery.html"]
