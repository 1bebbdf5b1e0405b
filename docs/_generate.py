"""Pages made when the site is built: hooks, plugins, public names, error codes, options of commands, recipes."""

import ast
import inspect
import re
from pathlib import Path

import click
from mkdocs.structure.files import File

import moe_engine
from moe_engine import pages, tasks
from moe_engine.cli import group as command_line
from moe_engine.contract.hookspecs import HOOKS
from moe_engine.contract.options import options_of
from moe_engine.contract.traits import acts_on_tokens, traits_of
from moe_engine.registry.discovery import KINDS, find, load

ROOT = Path(__file__).parents[1]
HOOKS_PAGE, COMMANDS_PAGE = "hooks.md", "commands.md"

# every public name of `moe_engine` by purpose; a test compares this with `moe_engine.__all__`
REFERENCE = {
    "Engine and layers": (
        "Build layers, control the training step, compute metrics for models of other libraries.",
        "Engine MoE Spec Layer LayerBuilder adam evaluating",
    ),
    "Real models": (
        "Read, change and export the mixtures of transformers models; describe an architecture.",
        "watch adopt release export upcycle Upcycled PretrainedLM train_only training_memory TrainingMemory Family "
        "Block Stored GATE STACKED Dense DenseBlock DENSE unwrapped",
    ),
    "Records of routing": (
        "What a router receives and returns, and what losses and metrics read.",
        "Tokens LevelSpec Level Assignments Slots Routing assign assign_where keep_best_groups groups_problem "
        "causal_problem",
    ),
    "Parts of a layer": (
        "Modules whose tensors declare their expert axis: base classes for routers, biases, banks and states.",
        "Part Router LinearRouter GroupLimitedRouter Bias Experts StackedMLP ModuleBank RunningLoad ACTIVATIONS",
    ),
    "Tensors of parts": (
        "How parts draw, score and multiply.",
        "uniform ones zeros linear_logits grouped_linear grouped_conv own_values row_counts DenseMLP",
    ),
    "Plugins: hooks, options and traits": ("Turn a class into a plugin.", "hookimpl option Traits"),
    "Metrics": ("What metrics read and return.", "Stats Finding Effects mean_of_pairs"),
    "Controllers": ("What biases and states read after an optimizer step.", "Step ema_update_"),
    "Growth": (
        "Ask for experts, make their weights, read what happened.",
        "Growth NewExpert Grown HiddenUnits merging prune History consecutive grow_at_peaks least_experts",
    ),
    "Tasks": ("The data, the model and the score of a run.", "Task TaskSpec"),
    "Numerics": (
        "Sums and statistics that are correct in every precision.",
        "at_least_fp32 centred_log count_by cv2 entropy_of linear_cka mutual_information generator",
    ),
    "Several processes": (
        "Spread a model over ranks; sums over them.",
        "parallelize expert_mesh all_reduce_sum sum_over_ranks",
    ),
    "Saving": ("Checkpoints in one file, without pickle; the files of others.", "save load safetensors_of"),
    "Reports": (
        "Draw a finished run, and write files that a crash can't damage.",
        "run_page gallery_page run_figures expert_loads characteristic_tokens read_sample Sample SampledLayer "
        "write_atomically",
    ),
    "Errors": (
        "What moe-engine raises on purpose. Each carries a stable `.code`.",
        "UsageError PluginError RunError nearest",
    ),
}
# of classes that the core shares, the members that are public; of all others, every one with a docstring
MEMBERS = {
    "Engine": "moe attach layers aux_loss after_backward after_step due grow metrics implementing check state_dict "
    "load_state_dict",
    "MoE": "tokens route state_of step_load parts",
}
# of names whose docstring is another library's
NOTES = {
    "ACTIVATIONS": "The activations of stacked experts by name: a function of the hidden rows [N, H].",
    "hookimpl": "Mark a method of a plugin class as the implementation of the hook of the same name.",
}


# -- mkdocs calls these -----------------------------------------------------------------------------


def on_config(config):
    """Add generated pages to the navigation."""
    _fill(config.nav, "Hooks", hook_pages())
    _fill(config.nav, "Plugins", [{title: [_path(p) for p in plugins]} for title, plugins in built_in().items()])
    return config


def _fill(nav, title, pages):
    for section in nav:
        if isinstance(section, dict):
            for name, entries in section.items():
                if name == title:
                    entries.extend(pages)
                elif isinstance(entries, list):
                    _fill(entries, title, pages)


def on_files(files, config):
    """Add the generated pages."""
    singles = {"recipes.md": recipes_page(), "reference.md": reference_page(), "errors.md": errors_page()}
    for path, text in {**hook_pages(), **plugin_pages(), **singles}.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown, page, **_):
    """Cut the overview of hooks before the sections that have pages; show each command's options."""
    if page.file.src_uri == COMMANDS_PAGE:
        return with_options(markdown)
    if page.file.src_uri == HOOKS_PAGE:
        overview, _, rest = markdown.partition("\n## `moe_")
        traits = re.search(r"^## Traits\n.*", rest, re.M | re.S)
        return re.sub(r"^\| `(moe_\w+)`", r"| [`\1`](hooks/\1.md)", f"{overview}\n{traits[0]}", flags=re.M)
    return markdown


# -- hooks ------------------------------------------------------------------------------------------


def hook_pages():
    """{path: text}, cut from docs/hooks.md."""
    text = (ROOT / "docs" / HOOKS_PAGE).read_text("utf-8").partition("\n## Traits\n")[0]
    text = re.sub(r"\]\((?=\w+\.md)", "](../", text)  # these pages are one folder deeper
    text = re.sub(r"\]\(#", f"](../{HOOKS_PAGE}#", text)
    sections = re.split(r"^## (?=`moe_)", text, flags=re.M)[1:]
    named = {re.match(r"`(moe_\w+)", section)[1]: section for section in sections}
    return {f"hooks/{name}.md": f"# {named[name]}" for name in HOOKS if name in named}


# -- plugins ----------------------------------------------------------------------------------------


def built_in():
    """moe-engine's own plugins by group, "Routers" first."""
    ours = [plugin for plugins in find().values() for plugin in plugins if plugin.distribution == "moe-engine"]
    groups = {title.capitalize(): [plugin for plugin in ours if plugin.kind == kind] for title, kind in KINDS.items()}
    return {title: plugins for title, plugins in groups.items() if plugins}


def plugin_pages():
    """{path: text}: a page for each built-in plugin, and a list of them."""
    pages = {_path(plugin): _plugin_page(plugin) for plugins in built_in().values() for plugin in plugins}
    lines = [
        "# Plugins",
        "All built-in plugins. Each page gives the formula, the source, the options and the whole code, taken from the "
        "plugin itself. `moe-engine plugins` lists yours too.",
    ]
    for title, plugins in built_in().items():
        rows = [f"| [`{plugin.name}`]({plugin.name}.md) | {_prose(_first(load(plugin)))} |" for plugin in plugins]
        lines.append("\n".join([f"## {title}\n", "| plugin | what it does |", "|---|---|", *rows]))
    return {"plugins/index.md": "\n\n".join(lines) + "\n", **pages}


def _path(plugin):
    return f"plugins/{plugin.name}.md"


def _plugin_page(plugin):
    cls = load(plugin)
    hooks = ", ".join(f"[`{hook}`](../hooks/{hook}.md)" for hook in HOOKS if hasattr(cls, hook))
    facts = " · ".join([f"Kind: {plugin.kind}", f"Hooks: {hooks}", *_traits(cls)])
    source = f"## Source\n\n```python\n{inspect.getsource(inspect.getmodule(cls))}```\n"
    return "\n\n".join([f"# `{plugin.name}`", facts, _docstring(cls), _options(plugin.name, cls), source])


def _traits(cls):
    traits = traits_of(cls)
    words = {"provides": traits.provides, "requires": traits.requires, "effects": traits.effects}
    for field, values in words.items():
        if values:
            yield f"[{field.capitalize()}](../hooks.md#traits): {', '.join(f'`{value}`' for value in values)}"
    if traits.balanced is not None:
        yield f"At perfect balance: {traits.balanced:g}"
    if acts_on_tokens(hook for hook in HOOKS if hasattr(cls, hook)):
        where = "each rank's tokens alone" if traits.per_rank else "as one process with all tokens"
        yield f"[On several ranks](../hooks.md#global-or-per-rank): {where}"


def _options(name, cls):
    rows = []
    for option in options_of(cls).values():
        limits = [f"{word} {value}" for word, value in (("min", option.min), ("max", option.max)) if value is not None]
        limits += [f"one of {', '.join(map(str, option.choices))}"] if option.choices else []
        default = str(option.default).lower() if option.default in (None, True, False) else option.default
        cells = (f"`{option.name}`", f"`{default}`", _prose("; ".join([option.type, *limits])), _prose(option.help))
        rows.append(f"| {' | '.join(cells)} |")
    if not rows:
        return "It has no options."
    head = ["| option | default | type | meaning |", "|---|---|---|---|"]
    return f"## Options\n\nSet with `--set {name}.OPTION=VALUE`.\n\n" + "\n".join([*head, *rows])


# -- the public names -------------------------------------------------------------------------------


def reference_page():
    """Every public name of `moe_engine` with its signature and docstring, by purpose."""
    parts = [
        "# Python API",
        "Every public name of `moe_engine`, taken from the code, for plugins and for your own training code. Import "
        "each as `from moe_engine import NAME`. [Stability](stability.md) says what will not change.",
        "Shapes are suffixes: T tokens, D model, H hidden, E experts, K chosen per token, N assignments, n units of a "
        "level.",
    ]
    for title, (purpose, names) in REFERENCE.items():
        objects = {name: getattr(moe_engine, name) for name in names.split()}
        rows = [f"| [`{name}`](#{name}) | {_prose(NOTES.get(name) or _first(obj))} |" for name, obj in objects.items()]
        parts += [f"## {title}", purpose, "\n".join(["| name | what it is |", "|---|---|", *rows])]
        parts += [_entry(name, obj) for name, obj in objects.items()]
    parts += [
        "## `moe_engine.tasks`",
        "For plugins that are tasks: data sets, image models and the tasks made of them.",
    ]
    parts += [_entry(name, getattr(tasks, name)) for name in tasks.__all__]
    parts += [
        "## `moe_engine.pages`",
        "For reports: the blocks that pages are made of, and the function that writes a page. Texts are escaped.",
    ]
    parts += [_entry(name, getattr(pages, name)) for name in pages.__all__]
    return "\n\n".join(parts) + "\n"


def _entry(name, obj):
    text = NOTES.get(name) or _listed(_docstring(obj))
    parts = [f"### `{name}` {{ #{name} }}", f"```python\n{_signature(name, obj)}\n```", text]
    if isinstance(obj, type):
        chosen = MEMBERS.get(name, "").split() or [member for member in vars(obj) if not member.startswith("_")]
        parts += [_member(obj, member, inspect.getattr_static(obj, member)) for member in chosen]
    return "\n\n".join(part for part in parts if part)


def _member(cls, name, value):
    function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
    if not inspect.isfunction(function) or not function.__doc__:
        return ""
    shown = f".{name}" if isinstance(value, property) else "." + _signature(name, function).replace("\n", " ")
    shown = re.sub(r"\( +|,? +\)", lambda match: match[0].strip(" ,"), re.sub(r" +", " ", shown))
    return f"#### `{shown}` {{ .member #{cls.__name__}.{name} }}\n\n{_listed(_docstring(function))}"


# "name: " or "name, other [T, n]: " where a sentence begins: what a docstring says of an argument or attribute
NAMED = re.compile(r"(?:(?<=\.\s)|^)(?=[a-z]\w*(?: \\\[[^]]*\])?(?:, [a-z]\w*(?: \\\[[^]]*\])?)*:\s)")


def _listed(text):
    """Arguments and attributes as a list, errors as a paragraph."""
    blocks = []
    for block in text.split("\n\n"):
        if block.startswith("```"):
            blocks.append(block)
            continue
        body, *raises = re.split(r"(?:^|\s)(?=Raises [A-Z])", block.replace("\\_", "_"), maxsplit=1)
        first, *named = NAMED.split(body)
        blocks += [first.strip(), "\n".join(_item(text) for text in named), *raises]
    return "\n\n".join(block for block in blocks if block)


def _item(text):
    names, _, meaning = text.strip().partition(": ")
    names = names.replace("\\", "")
    return f"- **`{names}`**: {meaning}"


def _signature(name, obj):
    """The signature as it is called, on one line if it fits."""
    if isinstance(obj, dict | tuple):
        return f"{name}: {', '.join(map(repr, obj))}"
    if getattr(obj, "_is_protocol", False) or name in NOTES:
        return name
    signature = inspect.signature(obj)
    parameters = [param for param in signature.parameters.values() if param.name != "self"]
    kinds = [param.kind for param in parameters]
    listed = [_parameter(param) for param in parameters]
    if inspect.Parameter.KEYWORD_ONLY in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds:
        listed.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
    returns = signature.return_annotation
    end = "" if returns in (None, signature.empty) else f" -> {_annotation(returns)}"
    line = f"{name}({', '.join(listed)}){end}"
    return line if len(line) <= 100 else f"{name}(\n    " + ",\n    ".join(listed) + f",\n){end}"


def _parameter(param):
    stars = {param.VAR_POSITIONAL: "*", param.VAR_KEYWORD: "**"}.get(param.kind, "")
    typed = "" if param.annotation is param.empty else f": {_annotation(param.annotation)}"
    if param.default is param.empty:
        return f"{stars}{param.name}{typed}"
    default = "..." if "NOTHING" in repr(param.default) else repr(param.default).replace("'", '"')
    return f"{param.name}{typed} = {default}" if typed else f"{param.name}={default}"


def _annotation(annotation):
    """Without the modules that names come from, and without the quotes of forward references."""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    text = re.sub(r"\b(?:[A-Za-z_]\w*\.)+(?=[A-Za-z_])", "", text)
    return text.replace("'", '"') if "Literal" in text else text.replace("'", "")


# -- error codes ------------------------------------------------------------------------------------


def errors_page():
    """Every error code, with its sentences."""
    rows = [
        f"| `{code}` | {kind} | {'<br>'.join(_prose(text) for text in sorted(texts))} |"
        for (code, kind), texts in sorted(error_codes().items())
    ]
    return "\n\n".join(
        [
            "# Error codes",
            "Handle errors in a program by their codes. Every `UsageError`, `PluginError` and `RunError` has a stable "
            "`.code`; the sentence may be reworded at any time. Braces are filled in; sentences that are composed "
            "elsewhere are left out.",
            "\n".join(["| code | raised as | sentence |", "|---|---|---|", *rows]),
        ]
    )


def error_codes():
    """{(code, class): {sentence}} of every `raise` in core/ and plugins/."""
    found = {}
    for path in sorted(file for folder in ("core", "plugins") for file in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            code = _code(node)
            if code and node.args:
                found.setdefault((code, ast.unparse(node.func)), set()).add(_sentence(node.args[0]))
    for sentences in found.values():
        sentences -= {sentence for sentence in sentences if re.fullmatch(r"\{[^}]*\}", sentence)}  # made elsewhere
    return found


def _code(node):
    if not isinstance(node, ast.Call) or not ast.unparse(node.func).endswith("Error"):
        return None
    values = [word.value for word in node.keywords if word.arg == "code"]
    return values[0].value if values and isinstance(values[0], ast.Constant) else None


def _sentence(node):
    if isinstance(node, ast.JoinedStr):
        return "".join(_sentence(piece) for piece in node.values)
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.BinOp):
        return _sentence(node.left) + _sentence(node.right)
    if isinstance(node, ast.FormattedValue) and isinstance(node.value, ast.Name | ast.Attribute):
        return f"{{{ast.unparse(node.value).rpartition('.')[2]}}}"
    return "{…}"


# -- commands ---------------------------------------------------------------------------------------


def with_options(markdown):
    """docs/commands.md with a folded table of options in each command's section."""
    sections = re.split(r"^(?=## )", markdown, flags=re.M)
    return "".join(section + _command_options(re.match(r"## `moe-engine ([\w-]+)", section)) for section in sections)


def _command_options(heading):
    if not heading:
        return ""
    rows = []
    for param in command_line.commands[heading[1]].params:
        record = isinstance(param, click.Option) and param.get_help_record(click.Context(command_line))
        if record:
            rows.append(f"    | `{record[0]}` | {_prose(record[1])} |")
    lines = ['??? abstract "All options"', "", "    | option | meaning |", "    |---|---|", *rows]
    return "\n".join(lines) + "\n\n"


# -- Markdown ---------------------------------------------------------------------------------------


def _first(obj):
    """The first sentence of a docstring."""
    paragraph = (inspect.getdoc(obj) or "").partition("\n\n")[0].replace("\n", " ")
    return re.split(r"(?<=[a-z)\]`])\.\s", paragraph, maxsplit=1)[0].rstrip(".") + "."


def _docstring(obj):
    """A docstring as Markdown; an indented paragraph is code."""
    blocks = []
    for paragraph in (inspect.getdoc(obj) or "").split("\n\n"):
        lines = paragraph.splitlines()
        if lines and all(line.startswith("    ") for line in lines):
            blocks.append("```python\n" + "\n".join(line[4:] for line in lines) + "\n```")
        else:
            blocks.append(_prose(paragraph))
    return "\n\n".join(blocks)


def _prose(text):
    """A docstring as Markdown, with characters escaped that Markdown would interpret."""
    pieces = re.split(r"(`[^`]*`)", text)  # text in backticks is code already
    return "".join(piece if piece.startswith("`") else _escaped(piece) for piece in pieces)


def _escaped(text):
    return re.sub(r"([\\*_{}\[\]>#|])", r"\\\1", text).replace("<", "&lt;")


def recipes_page():
    """Each file of examples/recipes, after its README."""
    folder = ROOT / "examples" / "recipes"
    parts = ["# Recipes", (folder / "README.md").read_text("utf-8").partition("\n")[2].strip()]
    parts += [f"## {path.stem}\n\n```toml\n{path.read_text('utf-8')}```" for path in sorted(folder.glob("*.toml"))]
    return "\n\n".join(parts) + "\n"
