"""Colours of pages: text that can be read, and series that people with deuteranopia can tell apart."""

import re
from importlib import resources
from itertools import combinations

import numpy as np
import pytest

TEXT = ("ink", "soft", "ok", "warn", "bad")
SERIES = [f"c{at}" for at in range(8)]
# linear RGB as it is seen with deuteranopia: Machado, Oliveira and Fernandes, 2009, severity 1
DEUTERANOPIA = np.array(
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
)
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def palette(mode):
    css = resources.files("moe_engine.pages").joinpath("page.css").read_text("utf-8")
    found = css.split("@media (prefers-color-scheme: dark)")[mode == "dark"]
    return dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", found))


def linear(colour):
    """Linear RGB of a #rrggbb."""
    srgb = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def contrast(one, other):
    """WCAG 2: the lighter luminance over the darker one, each plus 0.05."""
    low, high = sorted(float(TO_XYZ[1] @ linear(colour)) for colour in (one, other))
    return (high + 0.05) / (low + 0.05)


def lab(rgb):
    """CIELAB under D65 of linear RGB."""
    xyz = TO_XYZ @ rgb.clip(0, 1) / TO_XYZ.sum(1)
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_every_text_can_be_read(mode):
    colours = palette(mode)
    for name in TEXT:
        for behind in ("paper", "card"):
            assert contrast(colours[name], colours[behind]) >= 4.5, (name, behind)


@pytest.mark.parametrize("mode", ["light", "dark"])
@pytest.mark.parametrize("seen", [np.eye(3), DEUTERANOPIA], ids=["all cones", "deuteranopia"])
def test_eight_series_can_be_told_apart(mode, seen):
    colours = {name: lab(seen @ linear(colour)) for name, colour in palette(mode).items() if name in SERIES}
    apart = {pair: float(np.linalg.norm(colours[pair[0]] - colours[pair[1]])) for pair in combinations(SERIES, 2)}
    assert min(apart.values()) >= 15, min(apart, key=apart.get)


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_every_line_stands_out_from_its_background(mode):
    colours = palette(mode)
    assert min(contrast(colours[name], colours["card"]) for name in SERIES) >= 1.9
