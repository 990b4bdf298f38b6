"""The arguments of every command, and how the program ends. Standard library only: ``--help`` must not wait for torch.

``packops`` (the console script, ``_packops_cli.py``) and ``python -m packops`` both read their arguments here before packops
itself is imported. A command's own module is imported when the command runs.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import bench

# name -> (module with main(arguments) -> exit status, one line of help)
COMMANDS = {
    "info": ("packops.cli.info", "versions, build, device, and what is usable here"),
    "demo": ("packops.demo", "train the same small Llama padded, packed carelessly, and packed with packops"),
    "bench": ("packops.cli.bench", "measure the ops of this checkout against the peers that are installed"),
    "pack": ("packops.cli.pack", "pack a list of document lengths and say how full the packs are"),
    "verify": ("packops.cli.verify", "prove for a model that packed equals unpacked"),
}
STRATEGIES = ("best_fit", "bfd", "ffd", "next_fit", "sequential", "wrapped")
REDUCTIONS = ("mean", "seq-mean-token-mean", "seq-mean-token-sum")
LENGTH_FORMATS = ("npy", "txt", "jsonl", "csv", "parquet")
DTYPES = ("fp32", "bf16", "fp16", "fp64")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the result is the exit status."""
    try:
        arguments = read(sys.argv[1:] if argv is None else argv)
        if arguments is None:
            return 0
        command = importlib.import_module(COMMANDS[arguments.command][0])
        heed_interrupts()
        status = command.main(arguments)
        if sys.stdout:  # None where it was closed before the start
            sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever read our output, head or less, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains when it flushes
        return 141  # what a shell reports for a program that SIGPIPE ended


def run() -> int:
    """:func:`main` as a program of its own: Ctrl-C ends it without a traceback."""
    hush_interrupts()
    return main()


def early() -> None:
    """Answer ``python -m packops --help`` and mistakes now. For ``packops/__init__.py``, before it imports torch.

    While ``-m packops`` is being found, ``sys.argv[0]`` is ``"-m"``, and nothing but the arguments follows the name.
    """
    if sys.argv[:1] == ["-m"] and sys.orig_argv[-len(sys.argv)] == "packops":
        hush_interrupts()
        if read(sys.argv[1:]) is None:
            sys.exit(0)


def hush_interrupts() -> None:
    """End by SIGINT without a traceback when Ctrl-C is pressed."""
    previous = sys.excepthook

    def hook(kind: Any, error: Any, trace: Any) -> None:
        if not issubclass(kind, KeyboardInterrupt):
            previous(kind, error, trace)

    sys.excepthook = hook
    # Some libraries catch every exception of what they import, and go on: until torch is there, no exception is raised.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def heed_interrupts() -> None:
    """From here on Ctrl-C is an exception again, so that commands tidy up."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def read(argv: Sequence[str]) -> argparse.Namespace | None:
    """The arguments of a command, or None if help was all that was asked for and has been printed. Mistakes exit with 2."""
    parser, commands = build_parsers()
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:  # parse_args would show the usage of packops, not that of the command
        commands.get(arguments.command, parser).error(f"unrecognized arguments: {' '.join(unknown)}")
    if arguments.command is None:
        parser.print_help()
        return None
    if clash := named_twice(arguments):
        commands[arguments.command].error(clash)
    if arguments.command == "bench" and asks_for_list(arguments) and bench.print_list():
        return None
    return arguments


def named_twice(arguments: argparse.Namespace) -> str | None:
    """A complaint about a file that two arguments name: the one that is written last would replace what was read or written."""
    names: dict[Path, str] = {}
    for name, path in vars(arguments).items():
        if not isinstance(path, Path) or str(path) == "-" or (path.exists() and not path.is_file()):  # not of a device
            continue
        if (place := path.resolve()) in names:
            return f"{names[place]} and {name} are one file, {path}, which would be written over"
        names[place] = name
    return None


def asks_for_list(arguments: argparse.Namespace) -> bool:
    return arguments.wants_list or not (arguments.arguments or arguments.reproduce)


def build_parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser of packops, and those of its commands by name."""
    parser = argparse.ArgumentParser(
        prog="packops", description="Packed LLM training with the loss and the gradients of padded training."
    )
    parser.add_argument("--version", action="version", version=f"packops {version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, (_, text) in COMMANDS.items():
        add_arguments, options = ARGUMENTS[name]
        defaults: dict[str, Any] = {"description": text, "formatter_class": argparse.RawDescriptionHelpFormatter}
        command = commands.add_parser(name, help=text, **defaults | options)
        add_arguments(command)
    return parser, commands.choices


def version() -> str:
    """The version without importing packops: the literal in ``_version.py``."""
    text = (Path(__file__).resolve().parents[1] / "_version.py").read_text(encoding="utf-8")
    return text.partition('__version__ = "')[2].partition('"')[0]


def integer_from(least: int, bits: int) -> Callable[[str], int]:
    """A reader of integers from ``least`` to ``2^bits - 1``."""

    def integer(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) < 2**bits:
            raise argparse.ArgumentTypeError(f"must be an integer from {least} to 2^{bits} - 1, got {text}")
        return int(text)

    return integer


positive = integer_from(1, 31)  # tokens, documents or steps


def tolerance(text: str) -> float:
    """What packops.verify takes, which is asked only when the model is there."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be positive and finite, got {text}")
    return value


seed = integer_from(0, 64)


def new_file(text: str) -> Path:
    """A file to write when everything is done, which may take minutes: what is wrong with its place is said now."""
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent}")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{path} cannot be written")
    return path


# ---- the commands ----------------------------------------------------------------------------------------------------------


def info_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one, else cpu)")
    parser.add_argument(
        "--steps", type=positive, help="optimizer steps of each run (default: 50; 200 on a GPU, with a larger model)"
    )
    parser.add_argument("--seed", type=seed, default=0, help="chooses weights, documents and their order (default: 0)")
    parser.add_argument(
        "--out", type=Path, default=Path("demo_out"), help="folder for demo.png and demo.json (default: demo_out)"
    )


def bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-h", "--help", action="store_true", dest="wants_list")
    parser.add_argument("--reproduce", nargs=argparse.REMAINDER)  # a file, and arguments that go before those it has
    parser.add_argument("arguments", nargs=argparse.REMAINDER)  # of the benchmark, --help among them


def pack_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("lengths", metavar="LENGTHS", type=Path, help="a file, or - for the standard input")
    parser.add_argument("--max-length", type=positive, default=4096, metavar="TOKENS", help="capacity of a pack (default 4096)")
    parser.add_argument("--strategy", choices=[*STRATEGIES, "all"], default="all", help="how to pack (default: compare all)")
    parser.add_argument("--seed", type=seed, default=0, help="order of the documents (default 0)")
    parser.add_argument("--max-docs-per-pack", type=positive, metavar="N", help="at most so many documents a pack")
    parser.add_argument(
        "--overlong",
        choices=["error", "truncate", "split", "drop"],
        default="error",
        help="documents longer than a pack (default: an error that names the first)",
    )
    parser.add_argument("--pad-doc-to-multiple-of", type=positive, default=1, metavar="N", help="room of a document, rounded up")
    parser.add_argument(
        "--column", help="field to read: a length, token ids or text (default: input_ids, or the only field there is)"
    )
    parser.add_argument("--format", choices=LENGTH_FORMATS, help="default: by the file's name; jsonl for the standard input")
    parser.add_argument("--tokenizer", metavar="NAME", help="a tokenizer.json, or what transformers' AutoTokenizer takes")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write the table and the histograms")
    parser.add_argument("--picture", type=new_file, metavar="FILE", help="draw documents per pack and fill (needs matplotlib)")
    parser.add_argument("--plan", type=new_file, metavar="FILE.npz", help="write the packs of one --strategy: indices, ...")


def verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="what AutoModelForCausalLM.from_pretrained takes: a name or a folder")
    parser.add_argument("--random-weights", action="store_true", help="only MODEL's configuration is needed, not its weights")
    parser.add_argument("--apply", action="store_true", help="after packops.hf.apply, with its loss of --reduction")
    parser.add_argument("--attention", metavar="NAME", help="attn_implementation: sdpa, packops_varlen, eager, ...")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the parameters (default fp32)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one, else cpu)")
    parser.add_argument("--reduction", choices=REDUCTIONS, default="mean", help="the loss that is meant (default mean)")
    parser.add_argument("--documents", type=Path, metavar="FILE.jsonl", help="a list of token ids a line; default: random ones")
    parser.add_argument("--max-length", type=positive, metavar="TOKENS", help="capacity of a pack; default: about two packs")
    parser.add_argument("--tolerance", type=tolerance, help="largest relative difference (default: by dtype, 1e-4 for fp32)")
    parser.add_argument("--no-gradients", action="store_true", help="compare losses and logits only")
    parser.add_argument("--trust-remote-code", action="store_true", help="let MODEL bring its own code")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write the report")


DEMO = """\
Trains the same small Llama three times, from the same weights, on the same documents in the same steps:

  padded    each document in a row of its own, the mean over documents of each document's mean token loss: what you meant
  careless  documents end to end in packs, model(input_ids=pack, labels=pack).loss averaged over the packs
  packops   the same packs, with the attention, the positions and the loss of each document kept apart

prints a table and writes a picture. Needs no GPU and no internet: the text is the docstrings of installed packages."""
PACK = """\
Pack documents and say how full the packs are.

LENGTHS is one of
  lengths.npy     a one-dimensional array of integers, tokens per document
  lengths.txt     one integer a line
  data.jsonl      one JSON value a line: a number, a list of token ids, or an object with such a field
  data.csv        one document a row: a number or a JSON list of token ids in a column
  data.parquet    the same (needs pyarrow)
  -               the standard input: numbers or JSON, one a line (another --format if you say so)

.gz after .txt, .jsonl and .csv is read too. --column names the field; without it input_ids is taken, or else the only field
there is. Text needs --tokenizer."""
VERIFY = """\
Run documents one by one and packed through a Hugging Face causal language model, and compare the loss, the gradient of every
parameter, and whether one document sees another. Exit status 0: equal, 1: different, 2: not run, or crashed."""
ARGUMENTS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], dict[str, Any]]] = {
    "info": (info_arguments, {}),
    "demo": (demo_arguments, {"description": DEMO}),
    "bench": (bench_arguments, {"add_help": False}),
    "pack": (pack_arguments, {"description": PACK}),
    "verify": (verify_arguments, {"description": VERIFY}),
}
