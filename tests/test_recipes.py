"""examples/recipes/: each runs, and holds the numbers that were published."""

import json
import tomllib
from pathlib import Path

import pytest

from moe_engine.cli import main
from moe_engine.registry.discovery import find

RECIPES = Path(__file__).parents[1] / "examples" / "recipes"

# as the papers give them; `weight` in this engine's scale, as docs/coefficients.md converts
PUBLISHED = {
    "deepseek_v3": {  # arXiv 2412.19437, section 4.2: 8 of 256 experts, 4 of 8 groups, gamma 0.001, alpha 0.0001
        "run": {"top_k": 8},
        "sigmoid_topk": {"groups": 8, "groups_kept": 4, "scale": 2.5},
        "loss_free": {"rate": 0.001},
        "sequence_aux": {"weight": 0.0001},
    },
    "switch": {  # arXiv 2101.03961, section 2.2: one expert, capacity factor 1.25, alpha 0.01
        "run": {"top_k": 1, "capacity": 1.25},
        "switch_aux": {"weight": 0.01},
    },
    "mixtral": {  # arXiv 2401.04088, section 2.1: 2 of 8; the released router_aux_loss_coef 0.02, times K
        "run": {"experts": 8, "top_k": 2},
        "topk": {"renorm": True},
        "switch_aux": {"weight": 2 * 0.02},
    },
    "olmoe": {  # arXiv 2409.02060, section 2: 8 of 64, load balancing 0.01, z-loss 0.001
        "run": {"experts": 64, "top_k": 8},
        "topk": {"renorm": False},
        "switch_aux": {"weight": 0.01},
        "z_loss": {"weight": 0.001},
    },
    "shazeer": {  # arXiv 1701.06538, appendix C.1: MoE-32, 4 active, w_importance = w_load = 0.1
        "run": {"experts": 32, "top_k": 4},
        "importance_cv2": {"weight": 0.1},
        "load_cv2": {"weight": 0.1},
    },
}


def tables(name):
    written = tomllib.loads((RECIPES / f"{name}.toml").read_text("utf-8"))
    return {"run": written["run"], **written["plugins"]}


def test_every_recipe_is_here():
    assert {path.stem for path in RECIPES.glob("*.toml")} == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_it_holds_the_published_numbers(name):
    """Of what it sets, all but the width of experts and the length of the run is published."""
    written = tables(name)
    for table, values in PUBLISHED[name].items():
        assert values == {key: written[table][key] for key in values}
    assert set(PUBLISHED[name]) - {"run"} <= set(written["run"]["plugins"])
    assert set(written) - {"run", "lm"} <= set(PUBLISHED[name])


@pytest.mark.parametrize("name", PUBLISHED)
def test_it_runs(name, tmp_path):
    """One epoch on a text of a few thousand characters."""
    written = tables(name)
    if missing := {written["run"]["task"], *written["run"]["plugins"]} - find().keys():
        pytest.skip(f"not installed: {', '.join(sorted(missing))}")
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(97 + (7 * i * i + i // 5) % 26) for i in range(6000)))
    words = ["--config", str(RECIPES / f"{name}.toml"), "--no-plugin", "plots,html", "--quiet"]
    assert main(["run", *words, "--set", f"lm.file={text}", "--out", str(tmp_path / "run")]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text("utf-8"))
    (layer,) = summary["layers"]
    assert (layer["experts"], layer["top_k"]) == (written["run"]["experts"], written["run"]["top_k"])
    assert {"loss", "perplexity", "verdict"} <= {key for key, value in summary.items() if value is not None}
