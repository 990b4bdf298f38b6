"""``packops demo``: the same small Llama trained on the same documents padded, packed carelessly, and packed with packops.

One concern per file: :mod:`corpus` finds real text and tokenises it, :mod:`ways` holds the three ways to put a step's documents
through the model, :mod:`train` trains them side by side, :mod:`report` prints the table and draws the picture.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch

from .. import _C

DESCRIPTION = """\
Trains the same small Llama three times, from the same weights, on the same documents in the same steps:

  padded    each document in a row of its own, the mean over documents of each document's mean token loss: what you meant
  careless  documents end to end in packs, model(input_ids=pack, labels=pack).loss averaged over the packs
  packops   the same packs, with the attention, the positions and the loss of each document kept apart

prints a table and writes a picture. Needs no GPU and no internet: the text is the docstrings of installed packages.
"""
REQUIRED = ("matplotlib", "tokenizers", "tqdm", "transformers")


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add ``demo`` to the subcommands of a parser."""
    parser = subparsers.add_parser(
        "demo",
        help="train a small Llama padded, packed carelessly, and packed with packops, and compare",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    return parser


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", type=device_name, help="cpu, cuda, cuda:1, ... (default: a GPU if there is one, else cpu)")
    parser.add_argument(
        "--steps", type=positive, help="optimizer steps of each run (default: 50; 200 on a GPU, with a larger model)"
    )
    parser.add_argument("--seed", type=int, default=0, help="chooses weights, documents and their order (default: 0)")
    parser.add_argument(
        "--out", type=Path, default=Path("demo_out"), help="folder for demo.png and demo.json (default: demo_out)"
    )


def device_name(text: str) -> torch.device:
    """A device that packops can use here; what argparse calls for ``--device``."""
    try:
        device = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} is no device; cpu or cuda are") from None
    if device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"packops runs on cpu and cuda, not on {device.type}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"no {text} here: this torch sees {torch.cuda.device_count()} GPUs")
    if device.type == "cuda" and not _C.build_info()["cuda"]:
        raise argparse.ArgumentTypeError("this packops was built without CUDA kernels")
    return device


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text}")
    return int(text)


def missing_packages() -> list[str]:
    """Which packages of the ``demo`` extra are not installed."""
    return [name for name in REQUIRED if importlib.util.find_spec(name) is None]


def main(args: argparse.Namespace) -> int:
    """Run the demo; returns the exit status."""
    if missing := missing_packages():
        print(f"packops demo needs {', '.join(missing)}: pip install 'packops[demo]'", file=sys.stderr)
        return 1
    from . import report, train

    settings = train.Settings.for_device(args.device, steps=args.steps, seed=args.seed)
    result = train.run(settings)
    print(report.table(result))
    for path in report.write(result, args.out):
        print(f"wrote {path}")
    return 0
