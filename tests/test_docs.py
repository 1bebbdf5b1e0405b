"""What docs/ shows is true of the code; the tutorial has a test of its own."""

import html
import importlib
import importlib.util
import inspect
import math
import re
import shlex
from pathlib import Path

import attrs
import click
import pytest
import torch

import moe_engine
from moe_engine import Engine, Traits
from moe_engine.cli import group
from moe_engine.contract.hookspecs import HOOKS
from moe_engine.contract.options import options_of
from moe_engine.contract.traits import DECLARED, EFFECTS, ROUTER_TRAITS, USUAL
from moe_engine.registry.discovery import KINDS, find

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.glob("*.md"))
HOOKS_PAGE = (DOCS / "hooks.md").read_text("utf-8")
NAV = (DOCS.parent / "mkdocs.yml").read_text("utf-8")
READERS = {"my_router"}  # plugins that the tutorial has a reader write


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.M | re.S)


def commands():
    lines = [(page.stem, line) for page in PAGES for block in blocks(page, "sh") for line in block.splitlines()]
    return [(page, line) for page, line in lines if line.startswith("moe-engine ")]


@pytest.mark.parametrize(("page", "line"), commands())
def test_every_command_on_a_page_is_one(page, line):
    """Command, flags and plugins exist."""
    _, name, *words = shlex.split(line, comments=True)
    command = group.get_command(None, name)
    assert command is not None, f"there is no moe-engine {name}"
    with command.make_context(name, words, parent=click.Context(group)) as context:
        plugins = context.params.get("plugins") or ()
    assert set(plugins) <= find().keys() | READERS


def test_the_python_on_the_testing_page_runs():
    """All but the block that is for the reader's own router; it asserts by itself."""
    _, number = blocks(DOCS / "testing.md", "python")
    exec(number, {})


@pytest.fixture(scope="module")
def generated():
    """docs/_generate.py, which makes pages when the site is built."""
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("_generate", DOCS / "_generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_hook_has_a_page(generated):
    """With the section that docs/hooks.md has of it, whole."""
    pages = generated.hook_pages()
    assert [f"hooks/{name}.md" for name in HOOKS] == list(pages)
    whole = "\n".join(text.partition("# ")[2] for text in pages.values())
    text = (DOCS / "hooks.md").read_text("utf-8")
    whole = whole.replace("](../hooks.md#", "](#").replace("](../", "](")  # links, from a folder deeper
    text = text.partition("\n## Traits\n")[0]
    assert "".join(re.split(r"^## (?=`moe_)", text, flags=re.M)[1:]).split() == whole.split()


@pytest.mark.parametrize(
    ("title", "known"),
    [
        ("### What a router provides", ROUTER_TRAITS),
        ("### Effects", EFFECTS),
        ("## Traits", [field.name for field in attrs.fields(Traits)]),
        ("### Other names that the core reads", [name for name in DECLARED if name != "traits"]),
    ],
)
def test_the_tables_of_traits_are_those_of_the_code(title, known):
    """Each word once, in the code's order."""
    section = re.split(r"^###? ", HOOKS_PAGE.partition(f"\n{title}\n")[2], maxsplit=1, flags=re.M)[0]
    assert re.findall(r"^\| `(\w+)", section, re.M) == list(known)


def test_the_usual_traits_of_a_router_are_told():
    """A router that declares none provides the first five."""
    assert list(ROUTER_TRAITS)[: len(USUAL)] == list(USUAL)
    assert len(USUAL) == 5 and HOOKS_PAGE.count("the first five") == 2


def test_the_entry_point_groups_are_told():
    """All of them, by their names in the metadata."""
    groups = re.search(r"^Entry-point groups: (.*?)\. ", HOOKS_PAGE, re.M)[1]
    assert {name.rpartition(".")[2] for name in re.findall(r"`([\w.]+)`", groups)} == set(KINDS)


def test_the_python_on_the_embedding_page_runs(tmp_path, monkeypatch, capsys):
    """Block after block in one session, as a reader would; the callbacks have tests of their own."""
    monkeypatch.chdir(tmp_path)
    session = {}
    for block in blocks(DOCS / "embedding.md", "python"):
        if not block.startswith("from moe_engine.integrations"):
            exec(block, session)
    assert capsys.readouterr().out.count("Grown(step=") == 1
    assert session["model"][1].spec.experts == 6
    assert (tmp_path / "state.safetensors").exists()


@pytest.mark.filterwarnings("ignore")
def test_the_callbacks_on_the_embedding_page_exist():
    (block,) = (text for text in blocks(DOCS / "embedding.md", "python") if text.startswith("from moe_engine.integ"))
    modules = re.findall(r"from (moe_engine\.integrations\.\w+) import MoECallback", block)
    assert len(modules) == 2
    for module in modules:
        pytest.importorskip(module.rpartition(".")[2])
        assert importlib.import_module(module).MoECallback


def test_every_command_has_a_section_with_its_options(generated):
    """The page has a row and a section for each; on the site each section has a table of options."""
    text = (DOCS / "commands.md").read_text("utf-8")
    assert set(re.findall(r"^## `moe-engine ([\w-]+)`", text, re.M)) == set(group.commands)
    assert set(re.findall(r"^\| \[`([\w-]+)`\]", text, re.M)) == set(group.commands)
    page = generated.with_options(text)
    options = {option.opts[0] for command in group.commands.values() for option in command.params}
    assert all(option in page for option in options if option.startswith("--"))


def test_every_public_name_is_in_the_reference_once(generated):
    """With its signature and the whole docstring."""
    names = [name for _, group_names in generated.REFERENCE.values() for name in group_names.split()]
    assert sorted(names) == moe_engine.__all__
    page = generated.reference_page()
    assert all(page.count(f"### `{name}` {{ #{name} }}") == 1 for name in names)


def test_a_signature_in_the_reference_is_how_it_is_called(generated):
    """With keyword-only arguments, defaults and return types, and without module paths."""
    assert generated._signature("consecutive", moe_engine.consecutive) == (
        "consecutive(memory: dict[str, float], layer: Layer, holds: bool) -> float"
    )
    assert 'activation: str = "relu"' in generated._signature("Spec", moe_engine.Spec)
    assert "*,\n" in generated._signature("moe", Engine.moe)


def test_the_start_page_counts_the_plugins_right(generated):
    """Of each kind that it names."""
    text = (DOCS / "index.md").read_text("utf-8")
    counts = {title.lower(): len(plugins) for title, plugins in generated.built_in().items()}
    shown = ("routers", "biases", "losses", "growth", "initializers", "experts")
    words = ("routers", "biases", "losses", "growth triggers", "initializers", "expert banks")
    for title, word in zip(shown, words, strict=True):
        assert f"{counts[title]} {word}" in text


def test_every_error_code_is_on_its_page(generated):
    """Made from the `raise` statements of core/ and plugins/."""
    page = generated.errors_page()
    codes = generated.error_codes()
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", code) for code, _ in codes)
    assert all(f"| `{code}` | {kind} |" in page for code, kind in codes)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_nav_has_every_page(page):
    """A page that no menu leads to is lost."""
    assert f": {page.name}\n" in NAV or f"[{page.name}]" in NAV


def test_every_built_in_plugin_has_a_page_with_its_formula_and_options(generated):
    """Made from the docstring and the options of its class."""
    pages = generated.plugin_pages()
    own = {name: one[0] for name, one in find().items() if one[0].distribution == "moe-engine"}
    assert set(pages) == {"plugins/index.md", *(f"plugins/{name}.md" for name in own)}
    for name, found in own.items():
        page = pages[f"plugins/{name}.md"]
        assert page.startswith(f"# `{name}`")
        assert all(f"| `{option}` |" in page for option in options_of(found.entry_point.load()))
        assert f"[`{name}`]({name}.md)" in pages["plugins/index.md"]


@pytest.mark.parametrize("name", find())
def test_a_docstring_survives_markdown(generated, name):
    """Its formulas hold characters that Markdown would take for its own; every word of it reaches the reader."""
    markdown = pytest.importorskip("markdown")
    text = inspect.getdoc(find()[name][0].entry_point.load()) or ""
    page = markdown.markdown(generated._prose(text), extensions=["tables"])
    read = html.unescape(re.sub(r"</?(p|code|ul|ol|li)>", "", page))
    assert text.replace("`", "").split() == read.split()


def test_every_recipe_is_on_the_page_of_recipes(generated):
    """Word for word."""
    page = generated.recipes_page()
    for path in (DOCS.parent / "examples" / "recipes").glob("*.toml"):
        assert path.read_text("utf-8") in page


# -- the table of coefficients ----------------------------------------------------------------------


def ours(loss, logits_TE, top_k):
    """The value of one of our losses in a layer whose router gives these logits."""
    tokens, experts = logits_TE.shape
    engine = Engine(f"topk,{loss}", [f"{loss}.weight=1"], experts=experts, top_k=top_k)
    layer = engine.moe(tokens, 4)
    layer.router.weight.data = logits_TE.t().clone()
    layer(torch.eye(tokens))
    return engine.aux_loss().item()


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.filterwarnings("ignore")
def test_transformers_loss_is_k_times_ours_for_one_layer(top_k):
    """Computed by transformers itself."""
    pytest.importorskip("transformers")
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits_TE = torch.randn(32, 8)
    theirs = float(load_balancing_loss_func((logits_TE,), 8, top_k))
    assert theirs == pytest.approx(top_k * ours("switch_aux", logits_TE, top_k), rel=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_transformers_pools_layers_and_so_sees_no_collapse():
    """Four layers, each collapsed onto two experts of its own: K there, which is balance; E / K = 4 here, in each."""
    pytest.importorskip("transformers")
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    layers = [torch.full((32, 8), -100.0) for _ in range(4)]
    for number, logits_TE in enumerate(layers):
        logits_TE[:, 2 * number : 2 * number + 2] = 100.0
    assert float(load_balancing_loss_func(tuple(layers), 8, 2)) == pytest.approx(2)
    assert [ours("switch_aux", logits_TE, 2) for logits_TE in layers] == pytest.approx([4] * 4)


@pytest.mark.parametrize("top_k", [2, 3])
def test_megatron_and_deepspeed_give_our_value(top_k):
    """Megatron-LM: sum(sum_t p * count) E / (K T^2). DeepSpeed, K > 2: mean(P f) E^2 / K, f not divided by K."""
    logits_TE = torch.randn(32, 8)
    p_TE = logits_TE.softmax(-1)
    count_E = torch.zeros(32, 8).scatter(1, p_TE.topk(top_k).indices, 1).sum(0)
    megatron = (p_TE.sum(0) * count_E).sum() * 8 / (top_k * 32**2)
    deepspeed = (p_TE.mean(0) * count_E / 32).mean() * 8**2 / top_k
    assert [float(megatron), float(deepspeed)] == pytest.approx([ours("switch_aux", logits_TE, top_k)] * 2, rel=1e-5)


@pytest.mark.skipif("gshard" not in find(), reason="needs the loss gshard")
def test_deepspeeds_loss_for_two_choices_is_gshards():
    """DeepSpeed, K = 2: mean(P c) E^2, c counts first choices alone."""
    logits_TE = torch.randn(32, 8)
    p_TE = logits_TE.softmax(-1)
    first_E = torch.zeros(32, 8).scatter(1, p_TE.argmax(-1, keepdim=True), 1).mean(0)
    deepspeed = (p_TE.mean(0) * first_E).mean() * 8**2
    assert float(deepspeed) == pytest.approx(ours("gshard", logits_TE, 2), rel=1e-5)


def test_z_loss_is_the_mean_of_squared_logsumexp():
    """As Megatron-LM, MegaBlocks and OLMo have it: (ln 8)^2 for logits of 0."""
    assert ours("z_loss", torch.zeros(32, 8), 2) == pytest.approx(math.log(8) ** 2, rel=1e-6)
