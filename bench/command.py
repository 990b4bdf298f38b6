"""The program around a benchmark: its arguments, the loop over its cases, the files that it writes."""

from __future__ import annotations

import argparse
import gc
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from measuring import OURS, Case, OutOfTime, environment, measure, slug, time_limit
from packops.cli.program import positive
from peers import Peer
from reporting import RESULTS, draw_bars, format_case, format_environment, format_verdict, redraw, rows_of, write


def seconds(text: str) -> float:
    """A number of seconds, which may be 0 and may be inf."""
    value = float(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"must be 0 seconds or more, got {text}")
    return value


def add_arguments(parser: argparse.ArgumentParser, peers: dict[str, Peer]) -> argparse.ArgumentParser:
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own number)")
    parser.add_argument("--quick", action="store_true", help="few shapes, few rounds: a first look")
    parser.add_argument("--only", metavar="REGEX", help="cases whose name this matches")
    parser.add_argument(
        "--peers", default="all", help=f"all (default), none, or some of: {', '.join(dict.fromkeys(map(base, peers)))}"
    )
    parser.add_argument("--rounds", type=positive, help="rounds of a case (default 25, quick 7)")
    parser.add_argument("--seconds", type=seconds, help="begin no further round of a case after this long (default 4, quick 1)")
    parser.add_argument("--limit", type=seconds, default=math.inf, help="end the run after so many seconds, with what there is")
    parser.add_argument(
        "--patience", type=seconds, default=math.inf, help="leave out what takes more than so many seconds to compile and check"
    )
    return parser


def add_output(parser: argparse.ArgumentParser, default: str) -> None:
    """``--out`` is None, ``Path()`` for the default, or a path without its suffix."""
    parser.add_argument(
        "--out",
        type=Path,
        nargs="?",
        const=Path(),
        metavar="STEM",
        help=f"write STEM.json and STEM.png; without STEM bench/results/{default}",
    )
    add_draw(parser)


def add_draw(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--draw",
        type=Path,
        nargs="*",
        metavar="JSON",
        help="measure nothing: table and picture of result files, with --out STEM one picture of all",
    )


def without_output(arguments: Sequence[str]) -> list[str]:
    """What ``--reproduce`` needs: the arguments, but for ``--out`` and its value."""
    kept: list[str] = []
    after = ""
    for word in arguments:
        if not (word.startswith("--out") or (after == "--out" and not word.startswith("-"))):
            kept.append(word)
        after = word
    return kept


def chosen(peers: dict[str, Peer], wanted: str, device: str) -> dict[str, Peer]:
    """The peers that ``--peers`` names, of those that run on the device."""
    peers = {name: peer for name, peer in peers.items() if device == "cuda" or not peer.cuda_only}
    if wanted in ("all", "none"):
        return dict(peers) if wanted == "all" else {}
    found: dict[str, Peer] = {}
    for word in filter(None, map(str.strip, wanted.split(","))):
        named = {name: peer for name, peer in peers.items() if base(name).lower() == word.lower()}
        if not named:
            raise SystemExit(f"--peers: no {word} here; there are {', '.join(dict.fromkeys(map(base, peers)))}")
        found |= named
    return found


def base(name: str) -> str:
    """``QuACK, in place`` is a way to call QuACK."""
    return name.partition(",")[0]


def main(
    benchmark: str,
    stem: str,
    description: str,
    cases: Callable[[argparse.Namespace], Iterable[Case]],
    *,
    peers: dict[str, Peer],
    draw: Callable[[dict[str, Any], Path], None] = draw_bars,
    extend: Callable[[argparse.ArgumentParser], Any] = lambda parser: None,
    distribution: str = "",
    arguments: Sequence[str] | None = None,
) -> int:
    """Run a benchmark as a program.

    Args:
        benchmark: its name after ``packops bench``.
        stem: of its files, ``bench/<stem>.py`` and ``bench/results/<stem>_<device>.json``.
        cases: yields cases, one at a time, for parsed arguments (``device``, ``quick``, ``peers`` as a dictionary, ...).
        peers: the libraries that its candidates need, by the candidates' name.
        extend: adds arguments of its own.
        distribution: what the data that it works on is drawn from.

    Returns:
        0, or 1 if a result of packops was wrong.
    """
    begin = time.perf_counter()
    parser = argparse.ArgumentParser(
        prog=f"packops bench {benchmark}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    extend(add_arguments(parser, peers))
    add_output(parser, f"{stem}_<device>")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    args = parser.parse_args(arguments)
    if args.draw is not None:
        return redraw(args.draw or sorted(RESULTS.glob(f"{stem}_*.json")), draw, together=args.out)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here: --device cpu")
    if args.threads:
        torch.set_num_threads(args.threads)
    args.peers = chosen(peers, args.peers, args.device)
    rounds = args.rounds or (7 if args.quick else 25)
    enough = (1 if args.quick else 4) if args.seconds is None else args.seconds
    data: dict[str, Any] = {
        "benchmark": benchmark,
        "environment": environment(args.device, args.peers),
        "settings": {
            "rounds": rounds,
            "seconds": enough,
            "quick": args.quick,
            "only": args.only,
            "arguments": without_output(arguments),
            "data": distribution,
        },
        "cases": [],
    }
    if args.out == Path():
        args.out = RESULTS / f"{stem}_{slug(args.device, data['environment']['device'])}"
    print(format_environment(data), flush=True)
    missing = [peer.requirement for peer in args.peers.values() if not peer.version()]
    if missing:
        print("not installed: pip install " + " ".join(dict.fromkeys(missing)))
    try:
        with torch.no_grad(), time_limit(begin + args.limit - time.perf_counter()):
            for case in cases(args):
                if args.only and not re.search(args.only, case.name):
                    continue
                # What is ready when little time is left is measured still.
                until = begin + args.limit - 1.5 * enough
                data["cases"].append(measure(case, args.device, rounds, enough, args.patience, until))
                print("\n" + format_case(data["cases"][-1]), flush=True)
                write(data, args.out)  # after every case: a run that is cut short keeps what it measured
                del case
                gc.collect()
                if args.device == "cuda":
                    torch.cuda.empty_cache()
    except OutOfTime:
        print(f"out of time after {time.perf_counter() - begin:.0f} s: cases are missing", file=sys.stderr)
    else:
        if not data["cases"]:
            parser.error(f"no case matches {args.only!r}")
    print("\n" + format_verdict(data))
    if args.out and data["cases"]:
        draw(json.loads(args.out.with_suffix(".json").read_text()), args.out.with_suffix(".png"))
        print(f"written: {args.out.with_suffix('.json')}, {args.out.with_suffix('.png')}")
    return int(any(row.get("wrong") and row["system"].startswith(OURS) for _, row in rows_of(data)))
