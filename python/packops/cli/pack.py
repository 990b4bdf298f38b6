"""``packops pack LENGTHS``: how full the packs of a data set would be, as a table, JSON and a picture."""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import gzip
import io
import json
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from ..data.counts import counted
from ..data.documents import PADDING_MASK, TOKENS, length_of
from ..data.packing import STRATEGIES, IntArray, PackingPlan, as_lengths, pack
from .program import LENGTH_FORMATS

PADDED_BATCH = 8  # documents of the padded batches that packing is compared with
LONGEST = 2**31 - 1  # tokens of a document: cu_seqlens is int32
FIELDS = ("input_ids", "length", "lengths", "num_tokens")  # taken without --column, the first that is there
EXPECTED = (OSError, ValueError, TypeError, KeyError, EOFError, zlib.error)  # whose message is enough


def main(args: argparse.Namespace) -> int:
    try:
        return run(args)
    except BrokenPipeError:
        raise
    except EXPECTED as error:
        message = str(error.args[0] if isinstance(error, KeyError) else error)
        message = message.replace('overlong="truncate", "split" or "drop"', "--overlong truncate, split or drop")
        print(f"packops pack: {message}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace) -> int:
    if args.plan and args.strategy == "all":
        raise ValueError("--plan wants one --strategy, not all of them")
    lengths = read_lengths(args.lengths, args.column, args.tokenizer, args.format)
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
        with args.plan.open("wb") as file:  # numpy would add .npz to a name without it, and we say what we wrote
            np.savez_compressed(file, indices=plan.indices, offsets=plan.offsets, starts=plan.starts, lengths=plan.lengths)
    if args.picture:
        draw(plans, args.picture)
    for path in filter(None, (args.json, args.plan, args.picture)):
        print(f"wrote {path}")
    return 0


# ---- input -----------------------------------------------------------------------------------------------------------------


def read_lengths(path: Path, column: str | None = None, tokenizer: str | None = None, form: str | None = None) -> IntArray:
    """Tokens of every document that the file ``path``, or the standard input (``-``), tells of."""
    if str(path) != "-" and not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file")
    if str(path) == "-" and sys.stdin is None:
        raise ValueError("the standard input is closed")
    form = form or format_of(path)
    readers: dict[str, Callable[[TextIO, Path], Iterator[tuple[Any, str]]]] = {
        "txt": text_rows,
        "jsonl": json_rows,
        "csv": functools.partial(csv_rows, as_text=bool(tokenizer)),
    }
    if form in ("npy", "txt") and (column or tokenizer):
        raise ValueError(f"{name_of(path)}: {form} holds nothing but lengths; --column and --tokenizer are for other formats")
    if path.suffix == ".gz" and form not in readers:
        raise ValueError(f"{path}: .gz may follow the formats that are text, and {form} is none; unpack it with gunzip")
    if form == "npy":
        lengths = read_npy(path)
    elif form == "parquet":
        lengths = read_parquet(path, column, tokenizer)
    else:
        measure = _measure(column, tokenizer)
        with open_text(path) as lines:
            lengths = np.array([measure(value, where) for value, where in readers[form](lines, path)], np.int64)
    if not len(lengths):
        raise ValueError(f"{name_of(path)} is empty: want the length of at least one document")
    return lengths


def read_npy(path: Path) -> IntArray:
    try:
        values = np.load(seekable(path), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{name_of(path)}: want an array as numpy.save writes it ({error})") from None
    return check_array(path, values)


def format_of(path: Path) -> str:
    if str(path) == "-":
        return "jsonl"
    suffixes = [suffix[1:] for suffix in path.suffixes if suffix != ".gz"]
    if not suffixes or suffixes[-1] not in LENGTH_FORMATS:
        raise ValueError(
            f"{path}: LENGTHS must end in .{', .'.join(LENGTH_FORMATS)} (.gz may follow those that are text), or --format must "
            "say what it is"
        )
    return suffixes[-1]


def name_of(path: Path) -> str:
    return "the standard input" if str(path) == "-" else str(path)


def seekable(path: Path) -> Path | io.BytesIO:
    return io.BytesIO(sys.stdin.buffer.read()) if str(path) == "-" else path  # a pipe cannot seek


def open_text(path: Path) -> TextIO:
    if str(path) == "-":
        return open(sys.stdin.fileno(), encoding="utf-8-sig", newline="", closefd=False)
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def numbered(lines: Iterator[Any], path: Path) -> Iterator[tuple[Any, str]]:
    """Each item with the place it came from; what goes wrong in reading it names that place."""
    number = 0
    while True:
        number += 1
        where = f"{name_of(path)}, line {number}"
        try:
            line = next(lines)
        except StopIteration:
            return
        except UnicodeDecodeError as error:
            raise ValueError(f"{where} or later: not UTF-8 text ({error.reason})") from None
        except (EOFError, zlib.error, csv.Error, gzip.BadGzipFile) as error:
            raise ValueError(f"{where} or later: {error}") from None
        yield line, where


def text_rows(lines: TextIO, path: Path) -> Iterator[tuple[Any, str]]:
    for line, where in numbered(iter(lines), path):
        if line.strip():
            yield whole_number(line, where), where


def json_rows(lines: TextIO, path: Path) -> Iterator[tuple[Any, str]]:
    for line, where in numbered(iter(lines), path):
        if line.strip():
            yield json_value(line, where), where


def csv_rows(lines: TextIO, path: Path, as_text: bool = False) -> Iterator[tuple[Any, str]]:
    """Rows of a table as objects. A number or a list alone in the first row means one nameless column and no header.

    as_text: cells are text, also those that look like a number, and there is a header.
    """
    csv.field_size_limit(2**31 - 1)  # a list of token ids is a long field
    reader = csv.reader(lines)
    header: list[str] | None = None
    first: Any = None
    for row, _ in numbered(reader, path):
        where = f"{name_of(path)}, line {reader.line_num}"
        if not row:
            continue
        if header is None:
            first = cell_value(row[0])
            header = row if len(row) > 1 or isinstance(first, str) else []
            if twice := next((name for name in header if name and header.count(name) > 1), None):
                raise ValueError(f"{where}: the header has {twice!r} twice")
            if header:
                continue
            if as_text:
                raise ValueError(f"{where}: text for --tokenizer wants a header, got {row[0][:40]!r}")
        if not header:
            if len(row) != 1:
                raise ValueError(f"{where}: want one column as in the rows before, got {len(row)}")
            value = cell_value(row[0])
            if type(value) is not type(first):
                raise TypeError(f"{where}: want {type(first).__name__} as in the first row, got {row[0][:40]!r}")
            yield value, where
        elif len(row) != len(header):
            raise ValueError(f"{where}: want {len(header)} columns as in the header, got {len(row)}")
        else:
            yield {name: cell if as_text else cell_value(cell) for name, cell in zip(header, row, strict=True)}, where


def cell_value(cell: str) -> Any:
    """A number or a JSON list where the cell is one, else its text."""
    for read in (int, json.loads):  # JSON knows no +12
        with contextlib.suppress(ValueError, RecursionError):
            value = read(cell)
            if isinstance(value, (int, float, list)) and not isinstance(value, bool):
                return value
    return cell


def read_parquet(path: Path, column: str | None, tokenizer: str | None) -> IntArray:
    where = name_of(path)
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise ValueError(f"{where} needs the package pyarrow: pip install pyarrow") from None
    try:
        file = pyarrow.parquet.ParquetFile(seekable(path))
    except pyarrow.ArrowException as error:
        raise ValueError(f"{where}: {error}") from None
    names = file.schema_arrow.names
    column = choose_field(names, column, where)
    masked = column == TOKENS and PADDING_MASK in names
    measure = _measure(column, tokenizer)
    found, row = [np.zeros(0, np.int64)], 0
    for batch in file.iter_batches(columns=[column, PADDING_MASK] if masked else [column]):
        values = batch.column(column)
        kind, types = values.type, pyarrow.types
        is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
        if values.null_count:
            raise ValueError(f"{where}, row {row + int(np.argmax(values.is_null()))}: {column!r} is null")
        if is_list or types.is_integer(kind):
            check_field(column, is_list, where)
        if is_list and not types.is_integer(kind.value_type):
            raise TypeError(f"{where}: {column!r} must hold token ids, lengths or text, got lists of {kind.value_type}")
        if is_list and values.flatten().null_count:
            place = pyarrow.compute.list_parent_indices(values).filter(values.flatten().is_null())[0].as_py()
            raise ValueError(f"{where}, row {row + place}: {column!r} holds a null")
        if is_list and not masked:
            found.append(pyarrow.compute.list_value_length(values).to_numpy(zero_copy_only=False).astype(np.int64))
        elif types.is_integer(kind) and not tokenizer:
            found.append(check_array(path, values.to_numpy(zero_copy_only=False), first=row))
        else:
            rows = (item.as_py() for item in batch.to_struct_array())
            found.append(np.array([measure(value, f"{where}, row {row + i}") for i, value in enumerate(rows)], np.int64))
        row += len(values)
    return np.concatenate(found)


def check_array(path: Path, values: Any, first: int = 0) -> IntArray:
    """Lengths out of an array file; what is no length is named by its place, counted from 0."""
    try:
        lengths = as_lengths(values)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name_of(path)}: {error}") from None
    for place in np.flatnonzero((lengths < 0) | (lengths > LONGEST))[:1]:
        check_length(int(lengths[place]), f"{name_of(path)}, element {first + int(place)}")
    return lengths


def check_length(length: int, where: str) -> int:
    if not 0 <= length <= LONGEST:
        raise ValueError(f"{where}: a document has 0 to 2^31 - 1 tokens, got {length}")
    return length


def whole_number(text: str, where: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{where}: want an integer, got {text.strip()[:40]!r}") from None


def json_value(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{where}: want JSON, got {text.strip()[:40]!r}") from None


def choose_field(names: Sequence[str], column: str | None, where: str) -> str:
    """The field that holds documents or lengths: ``column``, else a usual name, else the only one."""
    if column is None:
        column = next((name for name in FIELDS if name in names), names[0] if len(names) == 1 else None)
    if column is None or column not in names:
        got = f", got {column!r}" if column else ""
        raise KeyError(f"{where}: --column must name one of the fields {', '.join(map(repr, names))}{got}")
    return column


def check_field(column: str, is_list: bool, where: str) -> None:
    """TypeError for a number where a list of token ids is usual, or the other way round: each would be counted as the other."""
    if column in FIELDS and is_list != (column == TOKENS):
        want, got = ("a list of token ids", "a number") if column == TOKENS else ("a number of tokens", "a list")
        raise TypeError(f"{where}: {column!r} must hold {want}, got {got}; in a field of another name, --column takes either")


def _measure(column: str | None, tokenizer: str | None) -> Callable[[Any, str], int]:
    encode = _load_tokenizer(tokenizer) if tokenizer else None

    def measure(value: Any, where: str) -> int:
        nonlocal column
        mask = None
        if isinstance(value, dict):
            column = choose_field(list(value), column, where)  # once and for all: the next document may lack it
            mask, value = value.get(PADDING_MASK) if column == TOKENS else None, value[column]
            if isinstance(value, (int, list)):
                check_field(column, isinstance(value, list), where)
        if isinstance(value, bool) or not isinstance(value, (int, list, str)):
            raise TypeError(f"{where}: want a length, a list of token ids or text, got {type(value).__name__}")
        if isinstance(value, int):
            if encode is not None:
                raise TypeError(f"{where}: want text for --tokenizer, got the number {value}")
            return check_length(value, where)
        if isinstance(value, list):
            if other := next((type(x).__name__ for x in value if type(x) is not int), None):
                raise TypeError(f"{where}: want a list of token ids, got one of {other}")
            return len(value) if mask is None else length_of({TOKENS: value, PADDING_MASK: mask}, where)
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
        try:
            loaded = Tokenizer.from_file(name)
        except Exception as error:  # tokenizers has no narrower one
            raise ValueError(f"--tokenizer {name}: {error}") from None
        loaded.no_truncation()  # the file may ask for either, which AutoTokenizer does not heed
        loaded.no_padding()
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
    percentiles = np.percentile(lengths, [50, 95], method="inverted_cdf")
    lines = [
        f"{counted(len(lengths), 'document')}, {counted(lengths.sum(), 'token')}: "
        f"mean {lengths.mean():.0f}, median {percentiles[0]:,}, 95 % at most {percentiles[1]:,}, longest {lengths.max():,}",
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
        lines.append(f"{counted(first['num_empty'], 'empty document')} in no pack")
    if first["num_overlong"]:
        lines.append(
            f"{counted(first['num_overlong'], 'document')} longer than a pack; "
            f"{counted(first['dropped_tokens'], 'token')} in no pack"
        )
    return "\n".join(lines)


def to_json(lengths: IntArray, plans: Sequence[PackingPlan], rows: Sequence[dict[str, Any]], padded: float) -> dict[str, Any]:
    return {
        "documents": len(lengths),
        "tokens": int(lengths.sum()),
        "padded_efficiency": padded,
        "plans": [row | {"hash": plan.hash(), **histograms(plan)} for plan, row in zip(plans, rows, strict=True)],
    }


def histograms(plan: PackingPlan) -> dict[str, Any]:
    """Packs by documents and by fill."""
    documents = np.bincount(plan.docs_per_pack) if plan.num_packs else np.zeros(1, np.int64)
    fill, edges = np.histogram(plan.tokens_per_pack / plan.max_length, bins=50, range=(0, 1))
    return {"packs_by_documents": documents.tolist(), "packs_by_fill": fill.tolist(), "fill_edges": edges.round(4).tolist()}


def draw(plans: Sequence[PackingPlan], path: Path) -> None:
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise ValueError("--picture needs matplotlib: pip install matplotlib") from None
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
    documents = counted(plans[0].num_documents, "document")
    figure.suptitle(f"{documents} in packs of {plans[0].max_length:,} tokens", fontsize=11)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
