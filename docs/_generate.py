"""The pages that are made when the site is built: one for each hook, each plugin, and the recipes."""

import inspect
import re
from pathlib import Path

from mkdocs.structure.files import File

from moe_engine.contract.hookspecs import HOOKS
from moe_engine.contract.options import options_of
from moe_engine.registry.discovery import KINDS, find, load

ROOT = Path(__file__).parents[1]
HOOKS_PAGE = "hooks.md"


def on_config(config):
    """Give generated pages their places in the navigation."""
    for section in config.nav:
        if "Hooks" in section:
            section["Hooks"] += hook_pages()
        if "Plugins" in section:
            section["Plugins"] += [{title: [_path(one) for one in several]} for title, several in built_in().items()]
    return config


def on_files(files, config):
    """Add the generated pages."""
    for path, text in {**hook_pages(), **plugin_pages(), "recipes.md": recipes_page()}.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown, page, **_):
    """On the site the overview of the hooks ends where their own pages begin."""
    if page.file.src_uri != HOOKS_PAGE:
        return markdown
    overview = markdown.partition("\n## `moe_")[0]
    return re.sub(r"^\| `(moe_\w+)`", r"| [`\1`](hooks/\1.md)", overview, flags=re.M)


def hook_pages():
    """{path: text}, cut from docs/hooks.md."""
    text = (ROOT / "docs" / HOOKS_PAGE).read_text("utf-8")
    text = re.sub(r"\]\((?=\w+\.md)", "](../", text)  # these pages lie one folder deeper
    sections = re.split(r"^## (?=`moe_)", text, flags=re.M)[1:]
    named = {re.match(r"`(moe_\w+)", section)[1]: section for section in sections}
    return {f"hooks/{name}.md": f"---\ntitle: {name}\n---\n\n# {named[name]}" for name in HOOKS if name in named}


def built_in():
    """moe-engine's own plugins by group, "Routers" first."""
    own = [one for several in find().values() for one in several if one.distribution == "moe-engine"]
    groups = {group.capitalize(): [one for one in own if one.kind == kind] for group, kind in KINDS.items()}
    return {title: several for title, several in groups.items() if several}


def plugin_pages():
    """{path: text}: one page for each plugin that moe-engine brings, and a list of them."""
    pages = {_path(one): _plugin_page(one) for several in built_in().values() for one in several}
    lines = ["# Plugins", "What moe-engine brings, made from each plugin's own docstring and options."]
    for title, several in built_in().items():
        rows = [f"| [`{one.name}`]({one.name}.md) | {_prose(_summary(load(one)))} |" for one in several]
        lines.append("\n".join([f"## {title}\n", "| plugin | what it does |", "|---|---|", *rows]))
    return {"plugins/index.md": "\n\n".join(lines) + "\n", **pages}


def _path(found):
    return f"plugins/{found.name}.md"


def _plugin_page(found):
    cls = load(found)
    hooks = [name for name in HOOKS if hasattr(cls, name)]
    traits = {word: getattr(cls, word) for word in ("gives", "needs") if hasattr(cls, word)}
    facts = [
        f"Kind: {found.kind}.",
        "Hooks: " + ", ".join(f"[`{one}`](../hooks/{one}.md)" for one in hooks) + ".",
        *(f"{word.capitalize()}: {', '.join(several) or 'nothing'}." for word, several in traits.items()),
    ]
    help_text = _prose(inspect.getdoc(cls) or "")
    source = f"## The whole plugin\n\n```python\n{inspect.getsource(inspect.getmodule(cls))}```\n"
    return "\n\n".join([f"# `{found.name}`", " ".join(facts), help_text, _options(found.name, cls), source])


def _options(name, cls):
    rows = []
    for one in options_of(cls).values():
        limits = [f"{word} {value}" for word, value in (("min", one.min), ("max", one.max)) if value is not None]
        limits += [f"one of {', '.join(map(str, one.choices))}"] if one.choices else []
        default = str(one.default).lower() if one.default in (None, True, False) else one.default
        rows.append(f"| `{one.name}` | `{default}` | {_prose('; '.join([one.type, *limits]))} | {_prose(one.help)} |")
    if not rows:
        return "It has no options."
    head = ["| option | default | type | meaning |", "|---|---|---|---|"]
    return f"## Options\n\nSet by `--set {name}.OPTION=VALUE`.\n\n" + "\n".join([*head, *rows])


def _summary(cls):
    return (inspect.getdoc(cls) or "").partition("\n\n")[0].replace("\n", " ")


def _prose(text):
    """A docstring as Markdown: its formulas hold characters that Markdown would take for its own."""
    pieces = re.split(r"(`[^`]*`)", text)  # what stands in backticks is code already
    return "".join(one if one.startswith("`") else _escaped(one) for one in pieces)


def _escaped(text):
    return re.sub(r"([\\*_{}\[\]>#|])", r"\\\1", text).replace("<", "&lt;")


def recipes_page():
    """Each file of examples/recipes, after what it says of itself."""
    files = sorted((ROOT / "examples" / "recipes").glob("*.toml"))
    parts = ["# Recipes", (ROOT / "examples" / "recipes" / "README.md").read_text("utf-8").partition("\n")[2].strip()]
    parts += [f"## {one.stem}\n\n```toml\n{one.read_text('utf-8')}```" for one in files]
    return "\n\n".join(parts) + "\n"
