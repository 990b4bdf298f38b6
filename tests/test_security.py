"""What importing and running packops must never do; docs/design.md lists the concerns in order of weight."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import packops
from packops import _build

PACKAGE = Path(packops.__file__).parent
MODULES = {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}

# What a build may read besides PACKOPS_*: the usual names of its tools. Each is used as a path or checked word by word.
BUILD_VARIABLES = {
    "_build.py": {"CUDA_HOME", "CUDA_PATH", "CXX", "PATH", "TORCH_CUDA_ARCH_LIST"},
    "_loader.py": {"CUDA_VISIBLE_DEVICES"},
    "jit.py": {"CXX", "TORCH_CUDA_ARCH_LIST"},
}

IMPORT = """
import sys, torch
seen = []
def hook(event, arguments):
    changes = ("mkdir", "rename", "remove", "system", "exec", "fork", "forkpty", "posix_spawn")
    if event.split(".")[0] in ("socket", "subprocess", "urllib", "http", "tempfile") or event in ["os." + c for c in changes]:
        seen.append((event, arguments))
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        seen.append((event, arguments))
sys.addaudithook(hook)
import packops
assert "packops.functional" in sys.modules
if torch.cuda.is_initialized():
    seen.append("a CUDA context")
threads = sys.modules["threading"].active_count()
if threads != 1:
    seen.append(f"{threads} threads")
print(seen)
"""


@pytest.mark.parametrize("flags", [[], ["-O"]])
def test_import_does_nothing_but_import(tmp_path, flags):
    """No socket, no process, no file written, no CUDA context (it would break fork); also with a home that cannot be written."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(PACKAGE.parent),
        "HOME": str(tmp_path / "absent"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    result = subprocess.run([sys.executable, *flags, "-c", IMPORT], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "[]\n"
    assert result.stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_the_hook_above_sees_what_it_looks_for(tmp_path):
    deeds = "import subprocess, socket; socket.socket(); subprocess.run(['true']); open('x', 'w')"
    script = IMPORT.replace("import packops\n", f"import packops\n{deeds}\n")
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, cwd=tmp_path)
    for event in ("socket.__new__", "subprocess.Popen", "('open', ('x', 'w'"):
        assert event in result.stdout


def names(tree):
    """Dotted names of everything that is read or called."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Attribute, ast.Name)):
            yield node.lineno, ast.unparse(node)
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = getattr(node, "module", None)
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}" if module else alias.name


@pytest.mark.parametrize("name", MODULES)
def test_no_pickle_and_no_evaluation(name):
    forbidden = {
        "torch.load",
        "pickle",
        "pickle.load",
        "pickle.loads",
        "marshal",
        "shelve",
        "eval",
        "exec",
        "os.system",
        "gettempdir",
    }
    if name == "hf/rewrite.py":  # compiles a method of the user's own model, parsed from its file
        forbidden -= {"exec"}
    found = [(line, used) for line, used in names(MODULES[name]) if used in forbidden or used.endswith(".gettempdir")]
    assert not found


@pytest.mark.parametrize("name", MODULES)
def test_no_shell(name):
    shells = [node.lineno for node in ast.walk(MODULES[name]) if isinstance(node, ast.keyword) and node.arg == "shell"]
    assert not shells


@pytest.mark.parametrize("name", MODULES)
def test_no_argument_check_is_an_assert(name):
    """python -O removes them."""
    asserts = [node.lineno for node in ast.walk(MODULES[name]) if isinstance(node, ast.Assert)]
    assert not asserts


def constants(tree):
    """Module-level string constants by name."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            for target in node.targets:
                yield ast.unparse(target), node.value.value


def environment_variables(tree, known):
    """(line, name) of every environment variable a module reads or writes; an unknown name is its expression."""
    for node in ast.walk(tree):
        key = None
        if isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("environ"):
            key = node.slice
        elif isinstance(node, ast.Call) and node.args:
            called = ast.unparse(node.func)
            if called.split(".")[-1] in ("getenv", "putenv", "env_flag") or ".environ." in f".{called}":
                key = node.args[0]
        elif isinstance(node, ast.Compare) and ast.unparse(node.comparators[0]).endswith("environ"):
            key = node.left
        if key is not None:
            text = key.value if isinstance(key, ast.Constant) else ast.unparse(key)
            yield node.lineno, known.get(str(text).split(".")[-1], text)


@pytest.mark.parametrize("name", MODULES)
def test_only_packops_environment_variables(name):
    known = {key: value for tree in MODULES.values() for key, value in constants(tree)}
    allowed = BUILD_VARIABLES.get(name, set())
    for line, variable in environment_variables(MODULES[name], known):
        if name == "_build.py" and variable == "name":
            continue  # env_flag's own parameter: its callers are what counts
        assert str(variable).startswith("PACKOPS_") or variable in allowed, (
            f"{name}:{line} uses the environment variable {variable}"
        )


def test_environment_scan_finds_what_it_looks_for():
    tree = ast.parse(
        "X = 'HOME'\nos.environ['A']\nos.environ.get(X)\nos.getenv('B')\nenv_flag('C')\n'D' in os.environ\nos.environ.pop('E')"
    )
    assert sorted(name for _, name in environment_variables(tree, dict(constants(tree)))) == ["A", "B", "C", "D", "E", "HOME"]


def test_environment_variables_are_documented():
    """Every PACKOPS_* variable that the package reads is in docs/packaging.md."""
    docs = Path(__file__).resolve().parents[1] / "docs" / "packaging.md"
    text = docs.read_text()
    known = {key: value for tree in MODULES.values() for key, value in constants(tree)}
    for tree in MODULES.values():
        for _, variable in environment_variables(tree, known):
            if str(variable).startswith("PACKOPS_"):
                assert f"`{variable}" in text, f"{variable} is not in {docs.name}"
    for variable in _build.COMPILER_VARIABLES:
        assert f"`{variable}`" in text, f"{variable} is not in {docs.name}"
