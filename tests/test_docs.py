"""Documentation is tested like code: what it shows runs, what it quotes exists, where it points there is something."""

from __future__ import annotations

import ast
import doctest
import re
from pathlib import Path

import pytest
import torch

import packops
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
