"""Documentation is tested like code: what it shows runs, what it quotes exists, where it points there is something."""

from __future__ import annotations

import ast
import doctest
import importlib.util
import inspect
import re
from pathlib import Path

import pytest
import torch

import packops
import packops.cli.program
from packops import rotary
from packops.ops import ce_loss

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
SOURCES = [ROOT / "setup.py"]
SOURCES += [p for folder in ("python", "csrc") for p in sorted((ROOT / folder).rglob("*")) if p.suffix in (".py", ".h", ".cpp")]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def ids(path: Path) -> str:
    return path.name


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page.read_text(), "python")], ids=ids)
def test_python_blocks_run(page):
    """A page's blocks, from top to bottom, as a reader would paste them."""
    namespace: dict = {}
    for number, block in enumerate(blocks(page.read_text(), "python")):
        exec(compile(block, f"{page.name}, block {number}", "exec"), namespace)


@pytest.mark.parametrize("module", [ce_loss, rotary], ids=lambda module: module.__name__)
def test_docstring_examples_run(module):
    results = doctest.testmod(module, extraglobs={"torch": torch, "packops": packops}, verbose=False)
    assert results.attempted
    assert not results.failed


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_named_tests_files_and_functions_exist(page):
    text = page.read_text()
    known = set(
        re.findall(r"^def (test_\w+)", "\n".join(p.read_text() for p in (ROOT / "tests").glob("test_*.py")), re.MULTILINE)
    )
    for name in re.findall(r"`(test_\w+)`", text):
        assert name in known, f"{page.name} names {name}"
    for name in re.findall(r"`((?:tests|tools|csrc|python|examples|bench|docs)/[\w/]+\.\w+)`", text):
        assert name.startswith("tests/gpu_record") or (ROOT / name).exists(), f"{page.name} names {name}"
    for name in re.findall(r"`packops\.(\w+)\b(?!:)", text):
        assert hasattr(packops, name), f"{page.name} names packops.{name}"


def literals() -> list[str]:
    """Every string that packops' sources can put into a message, pieces of one literal joined."""
    found = []
    for path in SOURCES:
        text = path.read_text()
        if path.suffix == ".py":
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
        else:
            for run in re.findall(r'(?:"(?:[^"\\\n]|\\.)*"\s*)+', text):
                found.append("".join(re.findall(r'"((?:[^"\\\n]|\\.)*)"', run)).replace('\\"', '"'))
    return found


# Said by torch, CUDA, Python or another package, in words that packops has no say in.
FOREIGN = (
    "Could not run 'packops::...",
    "no kernel image is available",
    "CUDA driver version is insufficient",
    "the provided PTX was compiled",
    "FlexAttention does not support backward on CPU",
    "one of the variables needed for gradient computation",
)


def test_troubleshooting_quotes_messages_that_exist():
    """What a reader searches for is what packops says, word for word; ``...`` stands for what varies."""
    said = literals()
    quoted = re.findall(r"\*\*`(.+?)`\*\*", (ROOT / "docs" / "troubleshooting.md").read_text())
    assert len(quoted) > 15
    for quote in quoted:
        if quote.startswith(FOREIGN):
            continue
        for part in re.split(r"\.\.\.|PACKOPS_[A-Z_]*|packops_dev", quote):  # names that the code puts in
            words = part.strip()
            assert not words or any(words in literal for literal in said), f"nothing says {words!r} (of {quote!r})"


def test_adding_an_op_names_every_file_that_an_op_touches():
    """CONTRIBUTING walks through rms_norm. A file that it forgets, or one that is gone, makes the page wrong."""
    section = (ROOT / "CONTRIBUTING.md").read_text().partition("## Adding an op")[2].partition("\n## ")[0]
    named = {name for name in re.findall(r"`([\w/.]+\.\w+)`", section) if "/" in name or name.endswith(".md")}
    own = {name for name in named if "rms_norm" in name}
    folders = ("csrc", "python", "tests", "bench", "tools")
    files = [p for folder in folders for p in (ROOT / folder).rglob("*rms_norm*") if "results" not in p.parts]
    sources = {p.relative_to(ROOT).as_posix() for p in files if p.suffix in (".py", ".h", ".cu", ".cuh", ".cpp")}
    assert own == {name for name in sources if not name.startswith("tests/test_hf_") and "/hf/" not in name}
    known = {"csrc/torch/check.h", "python/packops/ops/op.py"}  # named for what they give, not to be edited
    edited = named - own - known
    for name in edited:
        assert "rms_norm" in (ROOT / name).read_text(), f"{name} has no entry"
    assert f"{len(own)} files of its own and an entry in {len(edited)} others" in section


def test_the_version_is_in_one_place():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" not in project
    assert project["dynamic"] == ["version"]
    assert packops.__version__ == packops.cli.program.version()
    for path in [*ROOT.glob("*.toml"), *ROOT.glob("*.py"), ROOT / "CMakeLists.txt", *(ROOT / "python").rglob("*.py")]:
        assert path.name == "_version.py" or f'"{packops.__version__}"' not in path.read_text(), path


@pytest.fixture
def publishable():
    return tool("publishable")


def tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_index_page_gets_absolute_links(publishable):
    text = publishable.absolute_links((ROOT / "README.md").read_text(), "https://host/us/packops", "v9")
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    assert len(targets) > 20
    assert all(target.startswith("https://") for target in targets)
    assert (
        "![held-out loss, weight difference and speed of the demo](https://host/us/packops/raw/v9/docs/images/demo.png)" in text
    )
    assert "(https://host/us/packops/blob/v9/docs/packing.md)" in text
    kept = "[a](https://x/y) [b](#c) [d](mailto:e)"
    assert publishable.absolute_links(kept, "https://host", "v9") == kept


def test_an_index_page_gets_the_projects_urls(publishable):
    import tomllib

    text = publishable.with_urls((ROOT / "pyproject.toml").read_text(), "https://host/us/packops", "v9")
    urls = tomllib.loads(text)["project"]["urls"]
    assert urls["Homepage"] == "https://host/us/packops"
    assert urls["Changelog"] == "https://host/us/packops/blob/v9/CHANGELOG.md"


def test_the_layout_for_the_kernels_hub(tmp_path):
    import tomllib

    tool("kernels_hub").write(tmp_path / "hub", "us/packops")
    layout = tomllib.loads((tmp_path / "hub" / "build.toml").read_text())
    # The builder refuses keys that it does not know, and files of an older format.
    assert layout.keys() == {"general", "torch", "kernel"}
    assert layout["general"].keys() == {"name", "version", "edition", "license", "backends", "hub"}
    assert (layout["general"]["edition"], layout["general"]["license"]) == (5, "Apache-2.0")
    assert layout["general"]["hub"] == {"repo-id": "us/packops"}
    assert all((tmp_path / "hub" / name).is_file() for name in ("flake.nix", "CARD.md", "LICENSE"))
    parts = [layout["torch"], *layout["kernel"].values()]
    listed = {name for part in parts for name in part["src"]}
    assert all((tmp_path / "hub" / name).is_file() for name in listed)
    there = {p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".cu", ".cuh", ".h")}
    assert there - listed == {"csrc/bindings.cpp"}
    assert {name for name in there if name.startswith("csrc/torch/")} <= set(layout["kernel"]["packops"]["src"])
    kernels = layout["kernel"]
    assert not any(name.endswith(".cu") for name in kernels["packops_cpu"]["src"])
    assert sorted(layout["general"]["backends"]) == sorted(kernel["backend"] for kernel in kernels.values())
    assert layout["torch"]["stable-abi"] == "2.10"
    # What the flags of a kernel are not for must not need them: the namespace, C++20, CUDA.
    assert layout["torch"]["src"] == ["torch-ext/torch_binding.cpp"]
    for kernel in layout["kernel"].values():
        assert "-DPACKOPS_NAMESPACE=TORCH_EXTENSION_NAME" in kernel["cxx-flags"]
    assert (tmp_path / "hub" / "torch-ext" / "packops" / "__init__.py").is_file()


def test_workflows_and_templates_are_yaml():
    yaml = pytest.importorskip("yaml")
    found = [*(ROOT / ".github").rglob("*.yml"), ROOT / "CITATION.cff", ROOT / "mkdocs.yml"]
    assert len(found) > 5
    for path in found:
        loader = yaml.BaseLoader if path.name == "mkdocs.yml" else yaml.SafeLoader
        content = yaml.load(path.read_text(), loader)
        assert isinstance(content, dict), path
        for job in content.get("jobs", {}).values():
            # Beside other keys, `include` adds to their combinations, and what its second entry adds replaces what its first did.
            matrix = job.get("strategy", {}).get("matrix", {})
            assert "include" not in matrix or len(matrix) == 1, path


def test_docstrings_become_markdown():
    """For the site that `make docs` builds: no role or directive of Sphinx is left, no formula is lost."""
    pytest.importorskip("griffe")
    module = tool("docs_markdown")
    assert module.markdown("See :func:`~packops.pack`; :math:`x^2`.\n\n.. math:: a\n    + b\n\nc") == (
        "See `packops.pack`; \\(x^2\\).\n\n\n\\[\na\n+ b\n\\]\n\nc"
    )
    for name in dir(packops):
        left = module.markdown(inspect.getdoc(getattr(packops, name)) or "")
        assert not re.search(r":[a-z]+:`|^ *\.\. ", left, re.MULTILINE), name
