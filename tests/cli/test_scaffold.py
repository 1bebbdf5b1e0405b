"""`moe-engine new-plugin` refuses bad names, and writes a whole package or nothing."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from moe_engine.cli import main
from moe_engine.cli.scaffold import project
from moe_engine.registry.discovery import KINDS
from sentences import check

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
        "my_router holds a working router; edit moe_engine_my_router.py. Next steps:",
        "    python -m pip install --editable my_router",
        "    python -m pytest my_router",
        "    moe-engine run --plugins my_router",
    ]
    assert expected == capsys.readouterr().out.splitlines()


def test_the_folder_and_the_distribution_keep_dashes_and_the_plugin_gets_underscores():
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
    ("words", "code", "named"),
    [
        (["rooter", "mine"], "unknown-kind", ["'rooter'", "'router'"]),
        (["router", "9lives"], "bad-plugin-name", ["'9lives'", "digits and underscores"]),
        (["router", "a.b"], "bad-plugin-name", ["'a.b'"]),
        (["router", "../up"], "bad-plugin-name", ["'../up'"]),
        (["loss", "Mine"], "bad-plugin-name", ["'Mine'", "lower-case", "my_loss"]),
        (["router", "a" * 65], "bad-plugin-name", ["a" * 65, "64"]),
        (["router", "none"], "reserved-plugin-name", ["'none'"]),
        (["router", "recorded"], "reserved-plugin-name", ["'recorded'"]),
        (["bias", "bias"], "reserved-plugin-name", ["'bias'", "Bias"]),
        (["router", "topk"], "plugin-exists", ["'topk'", "moe-engine"]),
        (["router", "z-loss"], "plugin-exists", ["'z_loss'", "moe-engine"]),
        (["router", "mine", "--out", "."], "folder-exists", [". ", "--out"]),
        (["router", "mine", "--out", "file"], "folder-exists", ["file", "--out"]),
        (["router", "mine", "--out", "file/mine"], "unwritable-folder", ["file/mine", "Not a directory", "--out"]),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(refusal, words, code, named):
    Path("file").touch()
    check(refusal("new-plugin", *words), *named, code=code)
    assert tree(".") == {"file"}


def test_a_second_one_of_the_same_name_is_refused():
    assert main(["new-plugin", "router", "my_router"]) == 0
    Path("my_router/moe_engine_my_router.py").write_text("mine")
    assert main(["new-plugin", "loss", "my_router"]) == 2
    assert Path("my_router/moe_engine_my_router.py").read_text() == "mine"


def test_a_write_that_fails_half_way_leaves_nothing(monkeypatch, refusal):
    def full(path, text, encoding):
        if path.name == "README.md":
            raise OSError(28, "No space left on device")
        path.touch()

    monkeypatch.setattr(Path, "write_text", full)
    check(refusal("new-plugin", "router", "my_router"), "my_router", "No space left", code="unwritable-folder")
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("kind", KINDS.values())
def test_each_kind_has_a_module_whose_class_is_the_entry_point(kind):
    wanted = project(kind, f"my_{kind}", None)
    files = wanted.files()
    points = tomllib.loads(files["pyproject.toml"])["project"]["entry-points"][wanted.group]
    module, _, cls = points[f"my_{kind}"].partition(":")
    assert f"class {cls}:\n" in files[f"{module}.py"]
    assert all(text.endswith("\n") and not text.endswith("\n\n") for text in files.values())


def test_the_example_has_the_files_of_a_new_package():
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
