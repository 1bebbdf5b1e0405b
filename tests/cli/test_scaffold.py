"""What `moe-engine new-plugin` refuses, what it writes, and that it writes all or nothing."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from moe_engine.cli import main
from moe_engine.cli.scaffold import project
from moe_engine.registry.discovery import KINDS

FILES = {
    ".github/workflows/ci.yml",
    ".gitignore",
    "README.md",
    "moe_engine_my_router.py",
    "pyproject.toml",
    "tests/test_my_router.py",
}


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def tree(folder):
    return {path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file()}


def test_it_writes_a_distribution_and_says_what_comes_next(capsys):
    assert main(["new-plugin", "router", "my_router"]) == 0
    assert tree("my_router") == FILES
    expected = [
        "my_router holds a router that works as it is; moe_engine_my_router.py is yours to change. Next:",
        "    python -m pip install --editable my_router",
        "    python -m pytest my_router",
        "    moe-engine run --plugins my_router",
    ]
    assert expected == capsys.readouterr().out.splitlines()


def test_dashes_are_of_the_folder_and_the_distribution_underscores_of_the_plugin():
    assert main(["new-plugin", "loss", "my-loss"]) == 0
    written = tomllib.loads(Path("my-loss/pyproject.toml").read_text())["project"]
    assert written["name"] == "moe-engine-my-loss"
    assert written["entry-points"] == {"moe_engine.losses": {"my_loss": "moe_engine_my_loss:MyLoss"}}
    assert Path("my-loss/moe_engine_my_loss.py").is_file()


def test_a_folder_can_be_named(capsys):
    assert main(["new-plugin", "router", "my_router", "--out", "some where/else"]) == 0
    assert tree("some where/else") == FILES
    assert "pip install --editable 'some where/else'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["rooter", "mine"], "there is no kind of plugin 'rooter'; did you mean 'router'?"),
        (["router", "9lives"], "'9lives' can't be a plugin's name; use small letters, digits and underscores"),
        (["router", "a.b"], "'a.b' can't be a plugin's name"),
        (["router", "../up"], "'../up' can't be a plugin's name"),
        (["loss", "Mine"], "'Mine' can't be a plugin's name; use small letters, digits and underscores, as in my_loss"),
        (["router", "none"], "plugin 'none' would be the class None, a name that is taken; choose another name"),
        (["bias", "bias"], "plugin 'bias' would be the class Bias, a name that is taken; choose another name"),
        (["router", "topk"], "there is a plugin 'topk' already, of moe-engine; choose another name"),
        (["router", "z-loss"], "there is a plugin 'z_loss' already, of moe-engine; choose another name"),
        (["router", "mine", "--out", "."], ". exists already; name another folder with --out"),
        (["router", "mine", "--out", "file"], "file exists already; name another folder with --out"),
        (["router", "mine", "--out", "file/mine"], "file/mine can't be written: Not a directory; name another folder"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(capsys, words, sentence):
    Path("file").touch()
    assert main(["new-plugin", *words]) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"moe-engine: {sentence}")
    assert (out, err.count("\n"), tree(".")) == ("", 1, {"file"})


def test_a_second_one_of_the_same_name_is_refused():
    assert main(["new-plugin", "router", "my_router"]) == 0
    Path("my_router/moe_engine_my_router.py").write_text("mine")
    assert main(["new-plugin", "loss", "my_router"]) == 2
    assert Path("my_router/moe_engine_my_router.py").read_text() == "mine"


def test_a_write_that_fails_half_way_leaves_nothing(monkeypatch, capsys):
    def full(path, text, encoding):
        if path.name == "README.md":
            raise OSError(28, "No space left on device")
        path.touch()

    monkeypatch.setattr(Path, "write_text", full)
    assert main(["new-plugin", "router", "my_router"]) == 2
    assert "my_router can't be written: No space left on device" in capsys.readouterr().err
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("kind", KINDS.values())
def test_each_kind_has_a_module_whose_class_is_the_entry_point(kind):
    wanted = project(kind, f"my_{kind}", None)
    files = wanted.files()
    points = tomllib.loads(files["pyproject.toml"])["project"]["entry-points"][wanted.group]
    module, _, cls = points[f"my_{kind}"].partition(":")
    assert f"class {cls}:\n" in files[f"{module}.py"]
    assert all(text.endswith("\n") and not text.endswith("\n\n") for text in files.values())


def test_the_example_has_the_shape_of_what_is_written():
    example = Path(__file__).parents[2] / "examples" / "moe-engine-demo"
    assert main(["new-plugin", "router", "demo"]) == 0
    left_behind = ("__pycache__", ".egg-info", "/build/", ".pytest_cache", ".ruff_cache")  # by tools, and ignored
    kept = {path for path in tree(example) if not any(word in f"/{path}" for word in left_behind)}
    assert tree("demo") == kept


def test_it_needs_no_torch():
    code = (
        "import sys; from moe_engine.cli import main; main(['new-plugin', 'router', 'mine']); "
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
