"""What every benchmark here shares: how time is taken, what it is compared with, and what is written down.

A benchmark yields a :class:`Case` for every piece of work, with several :class:`Candidate` that do it. :func:`main` measures
them, prints tables, writes ``results/<op>_<device>.json`` and draws a picture from that file alone.

Method. All candidates of a case take turns, round by round, and a plain copy of as many bytes (``y.copy_(x)``) is one of them,
so that clocks and neighbours change for all alike. Ratios are taken within a round; medians over the rounds are shown, with the
10th to 90th percentile as spread. Work rotates over several buffers that together exceed the cache, and results are kept until
the round's calls are done (else a call would write where the last one's output still lies in the cache). On CUDA the cache is
filled with something else beforehand, and a sleeping kernel holds the stream until a group of calls is queued, so that events
time the device and not the host; a candidate that waits for the device within its call shows that wait. Every candidate's result
is checked first: a wrong one is measured, and marked.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import packops
from peers import Peer

RESULTS = Path(__file__).parent / "results"
COPY = "copy"
OURS = "packops"
# Bytes after which nothing of a buffer can be left in a cache: several times the second level of an H200, the third of a CPU.
BEYOND_CACHE = {"cuda": 192 << 20, "cpu": 128 << 20}
LARGEST_COPY = 4 << 30  # bytes moved; beyond that bandwidth no longer changes, so the time is scaled


@dataclass
class Candidate:
    """One way to do a case's work.

    ``call(i)`` works on buffer ``i``. ``check(result)`` says what is wrong with the result of ``call(0)``, or "". ``restore(i)``,
    untimed, puts back what a call destroys.
    """

    call: Callable[[int], Any]
    check: Callable[[Any], str] | None = None
    restore: Callable[[int], Any] | None = None


@dataclass
class Target:
    """Time at most ``limit`` times that of another candidate of the case, or ``limit`` microseconds for ``against="us"``."""

    against: str
    limit: float

    def __str__(self) -> str:
        return f"{self.limit:g} us" if self.against == "us" else f"{self.limit:.3g} x {self.against}"


@dataclass
class Case:
    """One piece of work. A candidate is made when its turn comes: what cannot be imported is left out, with the reason."""

    name: str
    candidates: dict[str, Callable[[], Candidate]]
    bytes: int = 0  # the least a call must move; 0: no copy to compare with
    buffers: int = 1
    targets: dict[str, list[Target]] = field(default_factory=dict)  # by candidate
    facts: dict[str, Any] = field(default_factory=dict)  # what tables and pictures select by
    host: bool = False  # time the host spends in a call, not the device
    flops: int = 0  # the arithmetic of a call; given, it is what speed is shown in, but for the copy's

    def calls_per_sample(self) -> int:
        return 100 if self.host else self.buffers


class Overwritable(torch.autograd.Function):
    """``Overwritable.apply(leaf)``: the leaf's memory as a computed tensor, since ops that work in place refuse leaves."""

    @staticmethod
    def forward(ctx: Any, leaf: torch.Tensor) -> torch.Tensor:
        return leaf.data

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile`` for the shapes at hand. Beyond its limit of recompilations it would quietly run eagerly."""
    torch._dynamo.reset()
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(function, dynamic=False)


def buffers_for(bytes_per_call: int, device: str) -> int:
    """How many buffers a case rotates over, so that none is in a cache when its turn comes."""
    return min(32, 1 + BEYOND_CACHE[device] // max(1, bytes_per_call))


# ---- statistics ------------------------------------------------------------------------------------------------------------


def percentile(values: Sequence[float], share: float) -> float:
    """With linear interpolation between the two nearest values."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def ratio(samples: Sequence[float], base: Sequence[float]) -> float:
    """Median over the rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(samples, base, strict=True))


def summary(case: Case, samples: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Rows of the result: one per candidate that ran."""
    rows = []
    for name, values in samples.items():
        row: dict[str, Any] = {"system": name, "microseconds": statistics.median(values)}
        row["spread"] = [percentile(values, 0.1), percentile(values, 0.9)]
        row["rounds"] = len(values)
        if case.bytes:
            row["bytes"] = case.bytes
        if case.flops and name != COPY:
            row["flops"] = case.flops
        row["of"] = {base: ratio(values, samples[base]) for base in (COPY, OURS) if base in samples and base != name}
        row["targets"] = []
        for target in case.targets.get(name, []):
            if target.against == "us":
                value = row["microseconds"]
            elif target.against in samples:
                value = ratio(values, samples[target.against])
            else:
                continue
            met = value <= target.limit
            row["targets"].append({"against": target.against, "limit": target.limit, "value": value, "met": met})
        rows.append(row)
    return rows


# ---- time ------------------------------------------------------------------------------------------------------------------


class Clock:
    """Takes one sample, in microseconds per call, of a candidate."""

    def __init__(self, case: Case, device: str):
        self.case, self.device = case, device
        self.calls = case.calls_per_sample()
        self.cold = torch.zeros(BEYOND_CACHE[device] // 4, dtype=torch.int32, device=device) if device == "cuda" else None
        self.queueing: dict[int, float] = {}  # seconds the host needs to queue a candidate's calls

    def sample(self, candidate: Candidate) -> float:
        if self.case.host:
            return self._on_host(candidate)
        return self._on_cuda(candidate) if self.device == "cuda" else self._on_cpu(candidate)

    def _restore(self, candidate: Candidate) -> None:
        if candidate.restore:
            for i in range(self.calls):
                candidate.restore(i)

    def _on_host(self, candidate: Candidate) -> float:
        begin = time.perf_counter()
        for i in range(self.calls):
            candidate.call(i)
        seconds = time.perf_counter() - begin
        if self.device == "cuda":
            torch.cuda.synchronize()
        return seconds / self.calls * 1e6

    def _on_cpu(self, candidate: Candidate) -> float:
        self._restore(candidate)
        begin = time.perf_counter()
        kept = [candidate.call(i) for i in range(self.calls)]
        seconds = time.perf_counter() - begin
        del kept
        return seconds / self.calls * 1e6

    def _on_cuda(self, candidate: Candidate) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # The first sample, which is thrown away, finds out how long; again and again would add up for a call that waits.
        held = min(1.3 * self.queueing.get(id(candidate), 0), 0.1)
        torch.cuda._sleep(int(2e9 * held) + 100_000)  # cycles; no GPU runs much above 2 GHz
        self._restore(candidate)
        self.cold.max()  # read, not written: dirty lines would be written back on the candidate's time
        begin = time.perf_counter()
        start.record()
        kept = [candidate.call(i) for i in range(self.calls)]
        stop.record()
        self.queueing.setdefault(id(candidate), time.perf_counter() - begin)
        stop.synchronize()
        del kept
        return start.elapsed_time(stop) / self.calls * 1e3


def interleave(
    candidates: dict[str, Candidate], sample: Callable[[Candidate], float], rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Samples of every candidate, one a round, until there are ``rounds`` or, from the fifth on, ``seconds`` have passed.

    Each round begins with another candidate, so that none always follows the same neighbour.
    """
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    names, begin = list(candidates), time.perf_counter()
    for done in range(rounds):
        if done >= 5 and time.perf_counter() - begin > seconds:
            break
        turn = done % len(names)
        for name in names[turn:] + names[:turn]:
            samples[name].append(sample(candidates[name]))
    return samples


def copy_candidate(case: Case, device: str) -> tuple[Candidate, float]:
    """A copy that moves as many bytes as the case, and the factor to its time where that would be too large a buffer."""
    half = max(1, min(case.bytes, LARGEST_COPY) // 2)
    sources, targets = ([torch.ones(half, dtype=torch.uint8, device=device) for _ in range(case.buffers)] for _ in range(2))
    return Candidate(lambda i: targets[i % case.buffers].copy_(sources[i % case.buffers])), case.bytes / (2 * half)


# ---- measuring a case ------------------------------------------------------------------------------------------------------


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


def prepare(name: str, make: Callable[[], Candidate], device: str) -> tuple[Candidate, dict[str, Any]]:
    """The candidate, compiled and warm, and what its first results said: ``wrong`` and, on CUDA, ``peak_bytes``."""
    candidate = make()
    facts: dict[str, Any] = {}
    for _ in range(2):  # compile and allocate, then look
        if candidate.restore:
            candidate.restore(0)
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        result = candidate.call(0)
        if device == "cuda":
            torch.cuda.synchronize()
            facts["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    wrong = candidate.check(result) if candidate.check else ""
    if wrong:
        facts["wrong"] = wrong
    return candidate, facts


def measure(case: Case, device: str, rounds: int, seconds: float) -> dict[str, Any]:
    """A case of the result: its rows, and why each candidate that did not run did not. Our own candidates must run."""
    candidates: dict[str, Candidate] = {}
    seen: dict[str, dict[str, Any]] = {}
    absent: dict[str, str] = {}
    scale = 1.0
    if case.bytes:
        candidates[COPY], scale = copy_candidate(case, device)
    for name, make in case.candidates.items():
        try:
            candidates[name], seen[name] = prepare(name, make, device)
        except Exception as error:
            if name.startswith(OURS):
                raise
            absent[name] = "not installed" if isinstance(error, ModuleNotFoundError) else first_line(error)
            if device == "cuda":
                gc.collect()
                torch.cuda.empty_cache()
    clock = Clock(case, device)
    for candidate in candidates.values():
        clock.sample(candidate)
    samples = interleave(candidates, clock.sample, rounds, seconds)
    if case.bytes:
        samples[COPY] = [scale * value for value in samples[COPY]]
    rows = summary(case, samples)
    for row in rows:
        row.update(seen.get(row["system"], {}))
    return {"name": case.name, "facts": case.facts, "rows": rows, "absent": absent}


# ---- what it ran on --------------------------------------------------------------------------------------------------------


def output_of(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=Path(__file__).parent)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.is_file() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def environment(device: str, peers: dict[str, Peer]) -> dict[str, Any]:
    """What a figure must be read with: device, versions, commit, date."""
    build = packops._C.build_info()
    commit = output_of("git", "rev-parse", "--short=12", "HEAD")
    facts: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "packops": packops.__version__,
        "commit": commit + ("+" if commit and output_of("git", "status", "--porcelain", "-uno") else ""),
        "sources": build["sources"][:12],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan,  # others at work when this began
        "cpu_isa": build["cpu_isa"],
        "peers": {name: version for name, peer in peers.items() if (version := peer.version())},
    }
    if device == "cuda":
        facts["cuda"] = torch.version.cuda
        facts["driver"] = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]
    return facts


def slug(device: str, name: str) -> str:
    """``cpu``, or the part of a GPU's name that people use: ``h200``, ``rtx_4090``."""
    if device == "cpu":
        return "cpu"
    words = [word for word in re.findall(r"[a-z0-9]+", name.lower()) if word not in ("nvidia", "tesla", "geforce", "gpu")]
    return "_".join(words[:2] if words[0].isalpha() else words[:1])


# ---- words -----------------------------------------------------------------------------------------------------------------


def time_text(microseconds: float) -> str:
    return f"{microseconds:,.1f} us" if microseconds < 1000 else f"{microseconds / 1000:,.3f} ms"


def spread_text(row: dict[str, Any]) -> str:
    unit, digits = (1, 1) if row["microseconds"] < 1000 else (1000, 3)
    low, high = (value / unit for value in row["spread"])
    return f"{low:.{digits}f} to {high:.{digits}f}"


def speed_text(row: dict[str, Any]) -> str:
    if row.get("flops"):
        speed = row["flops"] / row["microseconds"] * 1e6
        return f"{speed / 1e12:.1f} TFLOP/s" if speed >= 1e12 else f"{speed / 1e9:.1f} GFLOP/s"
    speed = row["bytes"] / row["microseconds"] * 1e6
    return f"{speed / 1e12:.2f} TB/s" if speed >= 1e12 else f"{speed / 1e9:.1f} GB/s"


def target_text(target: dict[str, Any]) -> str:
    """``1.18, wanted at most 1.1 x copy: MISSED``"""
    value = f"{target['value']:.1f}" if target["against"] == "us" else f"{target['value']:.3f}"
    return f"{value}, wanted at most {Target(target['against'], target['limit'])}: {'met' if target['met'] else 'MISSED'}"


def format_case(case: dict[str, Any]) -> str:
    """A case as text: the copy, ours, and the peers by their time."""

    def place(row: dict[str, Any]) -> tuple[int, float]:
        group = 0 if row["system"] == COPY else 1 if row["system"].startswith(OURS) else 2
        return group, row["microseconds"] if group == 2 else 0

    width = max(20, *(len(name) + 2 for name in [*case["absent"], *(row["system"] for row in case["rows"])]))
    speeds = 15 if any(row.get("flops") for row in case["rows"]) else 10
    lines = [case["name"]]
    for row in sorted(case["rows"], key=place):
        line = f"  {row['system']:<{width}}{time_text(row['microseconds']):>12}  {spread_text(row):<18}"
        line += f"{speed_text(row):>{speeds}}" if row.get("bytes") or row.get("flops") else " " * speeds
        for base in (COPY, OURS):
            line += f"{row['of'][base]:>8.2f} x {base:<7}" if base in row["of"] else " " * 18
        if "peak_bytes" in row:
            line += f"{row['peak_bytes'] / 2**20:>9,.0f} MiB"
        notes = [target_text(target) for target in row["targets"]]
        if row.get("wrong"):
            notes.insert(0, f"WRONG RESULT: {row['wrong']}")
        lines.append(f"{line}  {'; '.join(notes)}".rstrip())
    lines += [f"  {name:<{width}}{reason:>12}" for name, reason in case["absent"].items()]
    return "\n".join(lines)


def format_environment(data: dict[str, Any]) -> str:
    e = data["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in e["peers"].items())
    where = (
        f"CUDA {e['cuda']}, driver {e['driver']}"
        if "cuda" in e
        else f"{e['threads']} threads, {e['cpu_isa']}, load {e['load']:.1f}"
    )
    return (
        f"{data['benchmark']}: {e['device']}, {where}, torch {e['torch']}, packops {e['packops']}"
        + (f" ({e['commit']})" if e["commit"] else "")
        + f", {e['date']}"
        + (f"\npeers: {versions}" if versions else "")
    )


def format_data(data: dict[str, Any]) -> str:
    """Everything of a result file as text."""
    parts = [format_environment(data)]
    parts += [format_case(case) for case in data["cases"]]
    return "\n\n".join([*parts, format_verdict(data)])


def format_verdict(data: dict[str, Any]) -> str:
    """How many targets are met, which are not, and whose results are wrong."""
    targets = [(case["name"], row["system"], target) for case, row in rows_of(data) for target in row["targets"]]
    wrong = [f"  {row['system']}, {case['name']}: {row['wrong']}" for case, row in rows_of(data) if row.get("wrong")]
    missed = [f"  {system}, {case}: {target_text(t)}" for case, system, t in targets if not t["met"]]
    lines = [f"{len(targets) - len(missed)} of {len(targets)} targets met" + (", missed:" if missed else "")] if targets else []
    lines += missed
    return "\n".join(lines + (["wrong results:", *wrong] if wrong else []))


def rows_of(data: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    return [(case, row) for case in data["cases"] for row in case["rows"]]


# ---- pictures --------------------------------------------------------------------------------------------------------------

COLOURS = {OURS: "#0b7a75", COPY: "#d9dde1", "wrong": "#c8553d", "peer": "#b0b7bf"}


def colour(row: dict[str, Any]) -> str:
    if row.get("wrong"):
        return COLOURS["wrong"]
    if row["system"] == COPY:
        return COLOURS[COPY]
    return COLOURS[OURS] if row["system"].startswith(OURS) else COLOURS["peer"]


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def bars(axis: Any, rows: list[dict[str, Any]], title: str) -> None:
    """Times of one case, fastest on top; a wrong result has its own colour and says so."""
    rows = sorted(rows, key=lambda row: -row["microseconds"])
    unit, name = (1000, "ms") if max(row["microseconds"] for row in rows) >= 1000 else (1, "µs")
    places = range(len(rows))
    axis.barh(places, [row["microseconds"] / unit for row in rows], color=[colour(row) for row in rows])
    axis.set_yticks(places, [row["system"] for row in rows])
    for place, row in enumerate(rows):
        value = row["microseconds"] / unit
        label = (f" {value:,.0f}" if value >= 100 else f" {value:.3g}") + (" (wrong result)" if row.get("wrong") else "")
        axis.text(row["microseconds"] / unit, place, label, va="center", fontsize=8)
    axis.set(xlim=(0, 1.2 * max(row["microseconds"] for row in rows) / unit), xlabel=name)
    axis.set_title(title, fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)


def draw_bars(
    data: dict[str, Any],
    path: Path,
    *,
    only: Callable[[dict[str, Any]], bool] = lambda case: True,
    columns: int = 3,
    width: float = 5,
) -> None:
    """One panel, ``width`` inches wide, for each case that ``only`` takes."""
    cases = [case for case in data["cases"] if case["rows"] and only(case)]
    if not cases:
        return
    plot = pyplot()
    columns = min(columns, len(cases))
    lines = math.ceil(len(cases) / columns)
    deepest = max(len(case["rows"]) for case in cases)
    figure, axes = plot.subplots(
        lines, columns, figsize=(width * columns, lines * (1.2 + 0.27 * deepest)), constrained_layout=True, squeeze=False
    )
    for axis in axes.flat[len(cases) :]:
        axis.set_visible(False)
    for axis, case in zip(axes.flat, cases, strict=False):
        bars(axis, case["rows"], case["name"])
    finish(figure, data, path)


def finish(figure: Any, data: dict[str, Any], path: Path) -> None:
    """Write the picture, with what it was measured on at its foot."""
    e = data["environment"]
    figure.supxlabel(f"{e['device']}, torch {e['torch']}, {e['date'].split()[0]}", fontsize=8, color="#667")
    figure.savefig(path, dpi=130)
    pyplot().close(figure)


# ---- the command -----------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser, peers: dict[str, Peer]) -> argparse.ArgumentParser:
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own number)")
    parser.add_argument("--quick", action="store_true", help="few shapes, few rounds: a first look")
    parser.add_argument("--only", metavar="REGEX", help="cases whose name this matches")
    parser.add_argument(
        "--peers", default="all", help=f"all (default), none, or some of: {', '.join(dict.fromkeys(map(base, peers)))}"
    )
    parser.add_argument("--rounds", type=int, help="rounds of a case (default 25, quick 7)")
    parser.add_argument("--seconds", type=float, help="begin no further round of a case after this long (default 4, quick 1)")
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
    parser.add_argument("--draw", type=Path, nargs="*", metavar="JSON", help="measure nothing: table and picture of result files")


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
    arguments: Sequence[str] | None = None,
) -> int:
    """Run a benchmark as a program.

    Args:
        benchmark: its name after ``packops bench``.
        stem: of its files, ``bench/<stem>.py`` and ``bench/results/<stem>_<device>.json``.
        cases: yields cases, one at a time, for parsed arguments (``device``, ``quick``, ``peers`` as a dictionary, ...).
        peers: the libraries that its candidates need, by the candidates' name.
        extend: adds arguments of its own.

    Returns:
        0, or 1 if a result of packops was wrong.
    """
    parser = argparse.ArgumentParser(
        prog=f"packops bench {benchmark}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    extend(add_arguments(parser, peers))
    add_output(parser, f"{stem}_<device>")
    args = parser.parse_args(arguments)
    if args.draw is not None:
        return redraw(args.draw or sorted(RESULTS.glob(f"{stem}_*.json")), draw)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here: --device cpu")
    if args.threads:
        torch.set_num_threads(args.threads)
    args.peers = chosen(peers, args.peers, args.device)
    rounds, seconds = args.rounds or (7 if args.quick else 25), args.seconds or (1 if args.quick else 4)
    data: dict[str, Any] = {
        "benchmark": benchmark,
        "environment": environment(args.device, args.peers),
        "settings": {"rounds": rounds, "seconds": seconds, "quick": args.quick, "only": args.only},
        "cases": [],
    }
    if args.out == Path():
        args.out = RESULTS / f"{stem}_{slug(args.device, data['environment']['device'])}"
    print(format_environment(data), flush=True)
    missing = [peer.requirement for peer in args.peers.values() if not peer.version()]
    if missing:
        print("not installed: pip install " + " ".join(dict.fromkeys(missing)))
    with torch.no_grad():
        for case in cases(args):
            if args.only and not re.search(args.only, case.name):
                continue
            data["cases"].append(measure(case, args.device, rounds, seconds))
            print("\n" + format_case(data["cases"][-1]), flush=True)
            if args.out:  # after every case: a run that is cut short keeps what it measured
                write(data, args.out.with_suffix(".json"))
            del case
            gc.collect()
            if args.device == "cuda":
                torch.cuda.empty_cache()
    if not data["cases"]:
        parser.error(f"no case matches {args.only!r}")
    print("\n" + format_verdict(data))
    if args.out:
        draw(json.loads(args.out.with_suffix(".json").read_text()), args.out.with_suffix(".png"))
        print(f"written: {args.out.with_suffix('.json')}, {args.out.with_suffix('.png')}")
    return int(any(row.get("wrong") and row["system"].startswith(OURS) for _, row in rows_of(data)))


def rounded(value: Any) -> Any:
    """Six significant digits are more than a clock gives."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


def write(data: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rounded(data), indent=1) + "\n")


def redraw(
    paths: Sequence[Path],
    draw: Callable[[dict[str, Any], Path], None],
    text: Callable[[dict[str, Any]], str] = format_data,
) -> int:
    if not paths:
        print("there is no result to draw: run with --out first", file=sys.stderr)
        return 1
    for path in paths:
        data = json.loads(path.read_text())
        print(text(data) + "\n")
        draw(data, path.with_suffix(".png"))
        print(f"drawn: {path.with_suffix('.png')}")
    return 0
