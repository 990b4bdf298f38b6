"""``packops demo``: the same small Llama trained on the same documents padded, packed carelessly, and packed with packops.

One concern per file: :mod:`corpus` finds real text and tokenises it, :mod:`ways` holds the three ways to put a step's documents
through the model, :mod:`train` trains them side by side, :mod:`report` prints the table and draws the picture.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys

from ..cli.device import choose_device

REQUIRED = ("matplotlib", "tokenizers", "tqdm", "transformers")


def missing_packages() -> list[str]:
    """Which packages of the ``demo`` extra are not installed."""
    return [name for name in REQUIRED if importlib.util.find_spec(name) is None]


def main(args: argparse.Namespace) -> int:
    """Run the demo; returns the exit status."""
    if missing := missing_packages():
        print(f"packops demo: needs {', '.join(missing)}: pip install '.[demo]'", file=sys.stderr)
        return 2
    try:
        device = choose_device(args.device)
        args.out.mkdir(parents=True, exist_ok=True)  # before what takes minutes
    except OSError as error:
        print(f"packops demo: --out {args.out}: no folder can be made there ({error.strerror})", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"packops demo: {error}", file=sys.stderr)
        return 2
    if not os.access(args.out, os.W_OK):
        print(f"packops demo: --out {args.out}: the folder cannot be written", file=sys.stderr)
        return 2
    from . import report, train

    settings = train.Settings.for_device(device, steps=args.steps, seed=args.seed)
    result = train.run(settings)
    print(report.table(result))
    for path in report.write(result, args.out):
        print(f"wrote {path}")
    return 0
