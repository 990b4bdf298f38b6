"""``packops bench NAME``: runs ``bench/NAME.py`` of a checkout.

Benchmarks and their peers are no part of an installed package.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[2] / "bench"


def benchmarks() -> dict[str, Path]:
    """Name, as it is typed, to file: what in ``bench/`` has a ``main()``."""
    return {path.stem.replace("_", "-"): path for path in sorted(FOLDER.glob("*.py")) if "def main(" in path.read_text()}


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "bench", help="measure the ops of this checkout against the peers that are installed", add_help=False
    )
    parser.add_argument("name", nargs="?", choices=[*benchmarks()] or None, metavar="NAME", help=", ".join(benchmarks()))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="passed on; try: packops bench NAME --help")
    return parser


def main(arguments: argparse.Namespace) -> int:
    found = benchmarks()
    if not found:
        print(
            f"packops bench: there is no {FOLDER}: benchmarks run from a checkout of packops, not from a wheel", file=sys.stderr
        )
        return 2
    if not arguments.name:
        print("usage: packops bench NAME [arguments]\n\n" + "\n".join(f"  {name}" for name in found))
        return 2
    sys.argv = [f"packops bench {arguments.name}", *arguments.arguments]
    sys.path.insert(0, str(FOLDER))
    runpy.run_path(str(found[arguments.name]), run_name="__main__")
    return 0
