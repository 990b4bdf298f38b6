"""``packops pack LENGTHS``: how full the packs of a data set would be, as a table, JSON and a picture."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .data.packing import STRATEGIES, IntArray, PackingPlan, as_lengths, pack

PADDED_BATCH = 8  # documents of the padded batches that packing is compared with

DESCRIPTION = """\
Pack documents and say how full the packs are.

LENGTHS is one of
  lengths.npy     a one-dimensional array of integers, tokens per document
  lengths.txt     one integer a line
  data.jsonl      one JSON value a line: a number, a list of token ids, or an object of which --column names the field to use;
                  a text field needs --tokenizer"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "pack",
        help="pack a list of document lengths and say how full the packs are",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("lengths", metavar="LENGTHS", type=Path, help=".npy, .txt or .jsonl")
    parser.add_argument("--max-length", type=int, default=4096, metavar="TOKENS", help="capacity of a pack (default 4096)")
    parser.add_argument("--strategy", choices=[*STRATEGIES, "all"], default="all", help="how to pack (default: compare all)")
    parser.add_argument("--seed", type=int, default=0, help="order of the documents (default 0)")
    parser.add_argument("--max-docs-per-pack", type=int, metavar="N", help="at most so many documents a pack")
    parser.add_argument(
        "--overlong",
        choices=["error", "truncate", "split", "drop"],
        default="error",
        help="documents longer than a pack (default: an error that names the first)",
    )
    parser.add_argument("--pad-doc-to-multiple-of", type=int, default=1, metavar="N", help="room of a document, rounded up")
    parser.add_argument("--column", help="field of the jsonl objects: a length, token ids or text")
    parser.add_argument("--tokenizer", metavar="NAME", help="a tokenizer.json, or what transformers' AutoTokenizer takes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table and the histograms")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw documents per pack and fill (needs matplotlib)")
    parser.add_argument("--plan", type=Path, metavar="FILE.npz", help="write the packs of one --strategy: indices, offsets, ...")
    return parser


def main(args: argparse.Namespace) -> int:
    try:
        return run(args)
    except (OSError, ValueError, TypeError, KeyError) as error:
        message = str(error.args[0] if isinstance(error, KeyError) else error)
        message = message.replace('overlong="truncate", "split" or "drop"', "--overlong truncate, split or drop")
        print(f"packops pack: {message}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace) -> int:
    if args.plan and args.strategy == "all":
        raise ValueError("--plan wants one --strategy, not all of them")
    lengths = read_lengths(args.lengths, args.column, args.tokenizer)
    plans, rows = [], []
    for strategy in STRATEGIES if args.strategy == "all" else [args.strategy]:
        begin = time.perf_counter()
        plan = pack(
            lengths,
            args.max_length,
            strategy=strategy,  # type: ignore[arg-type]
            seed=args.seed,
            max_docs_per_pack=args.max_docs_per_pack,
            overlong=args.overlong,
            pad_doc_to_multiple_of=args.pad_doc_to_multiple_of,
        )
        plans.append(plan)
        rows.append(plan.stats() | {"seconds": time.perf_counter() - begin})
    padded = padded_efficiency(lengths, args.seed)
    print(format_table(lengths, rows, padded))
    if args.json:
        args.json.write_text(json.dumps(to_json(lengths, plans, rows, padded), indent=1) + "\n")
    if args.plan:
        plan = plans[0]
        np.savez_compressed(args.plan, indices=plan.indices, offsets=plan.offsets, starts=plan.starts, lengths=plan.lengths)
    if args.picture:
        draw(plans, args.picture)
    return 0


# ---- input -----------------------------------------------------------------------------------------------------------------


def read_lengths(path: Path, column: str | None, tokenizer: str | None) -> IntArray:
    if path.suffix == ".npy":
        return as_lengths(np.load(path, allow_pickle=False))
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"{path}: LENGTHS must end in .npy, .txt or .jsonl")
    measure = _measure(column, tokenizer)
    lengths = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                value = int(line) if path.suffix == ".txt" else json.loads(line)
            except ValueError:
                wanted = "an integer" if path.suffix == ".txt" else "JSON"
                raise ValueError(f"{path}, line {number}: want {wanted}, got {line.strip()[:40]!r}") from None
            lengths.append(measure(value, f"{path}, line {number}"))
    return as_lengths(lengths)


def _measure(column: str | None, tokenizer: str | None) -> Callable[[Any, str], int]:
    encode = _load_tokenizer(tokenizer) if tokenizer else None

    def measure(value: Any, where: str) -> int:
        if isinstance(value, dict):
            if column is None or column not in value:
                fields = ", ".join(map(repr, value))
                raise KeyError(
                    f"{where}: --column must name one of the fields {fields}" + (f", got {column!r}" if column else "")
                )
            value = value[column]
        if isinstance(value, bool) or not isinstance(value, (int, list, str)):
            raise TypeError(f"{where}: want a length, a list of token ids or text, got {type(value).__name__}")
        if isinstance(value, int):
            return value
        if isinstance(value, list):
            return len(value)
        if encode is None:
            raise ValueError(f"{where}: text needs --tokenizer to be counted in tokens")
        return encode(value)

    return measure


def _load_tokenizer(name: str) -> Callable[[str], int]:
    if Path(name).is_file():
        try:
            from tokenizers import Tokenizer
        except ModuleNotFoundError:
            raise ValueError(f"--tokenizer {name} needs the package tokenizers: pip install tokenizers") from None
        loaded = Tokenizer.from_file(name)
        return lambda text: len(loaded.encode(text).ids)
    try:
        from transformers import AutoTokenizer
    except ModuleNotFoundError:
        raise ValueError(
            f"--tokenizer {name} is no file, and its name needs the package transformers: pip install transformers"
        ) from None
    tokenizer = AutoTokenizer.from_pretrained(name)
    return lambda text: len(tokenizer(text)["input_ids"])


# ---- output ----------------------------------------------------------------------------------------------------------------


def padded_efficiency(lengths: IntArray, seed: int) -> float:
    """Useful share of random batches of ``PADDED_BATCH`` documents, each padded to its longest."""
    lengths = lengths[lengths > 0]
    if not len(lengths):
        return 1.0
    shuffled = np.random.default_rng(seed).permutation(lengths)
    starts = np.arange(0, len(shuffled), PADDED_BATCH)
    sizes = np.diff(np.append(starts, len(shuffled)))
    return float(shuffled.sum() / (np.maximum.reduceat(shuffled, starts) * sizes).sum())


def format_table(lengths: IntArray, rows: Sequence[dict[str, Any]], padded: float) -> str:
    percentiles = np.percentile(lengths, [50, 95]).astype(int) if len(lengths) else (0, 0)
    lines = [
        f"{len(lengths):,} documents, {lengths.sum():,} tokens: mean {lengths.mean() if len(lengths) else 0:.0f}, median "
        f"{percentiles[0]:,}, 95 % below {percentiles[1]:,}, longest {lengths.max(initial=0):,}",
        "",
        f"{'strategy':<12}{'packs':>12}{'full':>10}{'documents a pack':>20}{'most':>8}{'seconds':>10}",
    ]
    for row in rows:
        lines.append(
            f"{row['strategy']:<12}{row['num_packs']:>12,}{100 * row['efficiency']:>8.2f} %{row['docs_per_pack_mean']:>20.1f}"
            f"{row['docs_per_pack_max']:>8,}{row['seconds']:>10.2f}"
        )
    lines.append(f"{'padded':<12}{'':>12}{100 * padded:>8.2f} %   (random batches of {PADDED_BATCH}, padded to their longest)")
    first = rows[0]
    if first["num_empty"]:
        lines.append(f"{first['num_empty']:,} empty documents are in no pack")
    if first["num_overlong"]:
        lines.append(
            f"{first['num_overlong']:,} documents are longer than a pack; {first['dropped_tokens']:,} tokens are in no pack"
        )
    return "\n".join(lines)


def to_json(lengths: IntArray, plans: Sequence[PackingPlan], rows: Sequence[dict[str, Any]], padded: float) -> dict[str, Any]:
    return {
        "documents": len(lengths),
        "tokens": int(lengths.sum()),
        "padded_efficiency": padded,
        "plans": [row | {"hash": plan.hash(), **histograms(plan)} for plan, row in zip(plans, rows, strict=True)],
    }


def histograms(plan: PackingPlan, bins: int = 50) -> dict[str, Any]:
    """Packs by documents and by fill."""
    documents = np.bincount(plan.docs_per_pack) if plan.num_packs else np.zeros(1, np.int64)
    fill, edges = np.histogram(plan.tokens_per_pack / plan.max_length, bins=bins, range=(0, 1))
    return {"packs_by_documents": documents.tolist(), "packs_by_fill": fill.tolist(), "fill_edges": edges.round(4).tolist()}


def draw(plans: Sequence[PackingPlan], path: Path) -> None:
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise ValueError("--picture needs matplotlib: pip install 'packops[demo]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    most = max(int(plan.docs_per_pack.max(initial=1)) for plan in plans)
    edges = np.unique(np.geomspace(1, most + 1, 40).astype(int))
    styles = ["-", "--", ":", "-", "--", ":"]
    for plan, style in zip(plans, styles, strict=False):
        label = f"{plan.strategy}: {100 * plan.efficiency:.2f} % full"
        left.stairs(
            np.histogram(plan.docs_per_pack, edges)[0] / np.diff(edges), edges, label=label, linestyle=style, linewidth=1.5
        )
        unused = np.sort(plan.max_length - plan.tokens_per_pack)
        right.plot(unused, 100 * (1 - np.arange(len(unused)) / max(1, len(unused))), linestyle=style, linewidth=1.5)
    left.set(xlabel="documents in a pack", ylabel="packs", yscale="log", xscale="log" if most > 50 else "linear")
    left.legend(fontsize=8)
    right.set(xlabel="unused tokens of a pack", ylabel="packs with at least so many, %")
    right.set_xscale("symlog", linthresh=1)
    right.set_xlim(0, plans[0].max_length)
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{plans[0].num_documents:,} documents in packs of {plans[0].max_length:,} tokens", fontsize=11)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
