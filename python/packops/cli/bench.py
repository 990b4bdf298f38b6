"""``packops bench NAME``: runs a benchmark of the source tree that this packops was imported from.

Benchmarks and their peers are no part of an installed package. Standard library only: the list is shown without torch.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import runpy
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[3] / "bench"


def benchmarks() -> dict[str, tuple[Path, str]]:
    """Name to file and first line: what in ``bench/`` assigns ``NAME``. Nothing is imported to find out."""
    found = {}
    for path in FOLDER.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "NAME":
                found[str(ast.literal_eval(node.value))] = path, (ast.get_docstring(tree) or "").partition("\n")[0]
    return dict(sorted(found.items()))


def listing(found: dict[str, tuple[Path, str]]) -> str:
    width = max(map(len, found))
    return "\n".join(
        [
            "usage: packops bench NAME [options]",
            "",
            *(f"  {name:<{width}}  {text}" for name, (_, text) in found.items()),
            "",
            f"A first look: packops bench {next(iter(found))} --quick. All options: packops bench NAME --help.",
            "Results that are committed: bench/results.",
        ]
    )


def print_list() -> bool:
    """Print what ``packops bench`` can run; False where there are no benchmarks."""
    if found := benchmarks():
        print(listing(found))
    return bool(found)


def main(arguments: argparse.Namespace) -> int:
    found = benchmarks()
    if not found:
        print(
            f"packops bench: there is no {FOLDER}. Benchmarks are part of the source tree, not of the wheel: in a clone of the "
            "repository run python bench/ce_loss.py, or any other file of bench/",
            file=sys.stderr,
        )
        return 2
    name, *rest = arguments.arguments
    if name not in found:
        near = difflib.get_close_matches(name, found, 1, 0.4)
        guess = f" Did you mean {near[0]}?" if near else ""
        print(f"packops bench: there is no benchmark {name!r}, only {', '.join(found)}.{guess}", file=sys.stderr)
        return 2
    path, _ = found[name]
    sys.argv = [f"packops bench {name}", *rest]
    sys.path.insert(0, str(FOLDER))
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
            return 2
        return stop.code or 0
    return 0
