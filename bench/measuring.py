"""How the benchmarks take time, what they compare it with, and what the machine was doing meanwhile.

A benchmark yields a :class:`Case` for every piece of work, with several :class:`Candidate` that do it; :func:`measure`
times them. ``reporting.py`` makes tables and pictures of the result, ``command.py`` is the program around both.

Method. All candidates of a case take turns, round by round, and a plain copy of as many bytes (``y.copy_(x)``) is one of them,
so that clocks and neighbours change for all alike. Ratios are taken within a round; medians over the rounds are shown, with the
10th to 90th percentile as spread. Work rotates over several buffers that together exceed the cache, and results are kept until
the round's calls are done (else a call would write where the last one's output still lies in the cache). On CUDA the cache is
filled with something else beforehand, and a sleeping kernel holds the stream until a group of calls is queued, so that events
time the device and not the host; a candidate that waits for the device within its call shows that wait. Every candidate's result
is checked first: a wrong one is measured, and marked.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import math
import os
import platform
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

import packops
from peers import Peer

COPY = "copy"
OURS = "packops"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
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


def candidate_of(
    function: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]],
    inputs: Sequence[Sequence[torch.Tensor]],
    upstream: Sequence[torch.Tensor | tuple[torch.Tensor, ...]],
    gradient: bool,
    check: Callable[[Any], str] | None,
) -> Candidate:
    """``function(*inputs[i])`` and, if wanted, the gradients of all of these for ``upstream[i]``, on each buffer in turn."""

    def several(made: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return made if isinstance(made, tuple) else (made,)

    def forward(i: int) -> tuple[torch.Tensor, ...]:
        return several(function(*inputs[i % len(inputs)]))

    @torch.enable_grad()
    def forward_and_backward(i: int) -> tuple[torch.Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in inputs[i % len(inputs)]]
        results = several(function(*leaves))
        gradients = torch.autograd.grad(results, leaves, several(upstream[i % len(inputs)]))
        return *(result.detach() for result in results), *gradients

    return Candidate(forward_and_backward if gradient else forward, check)


def beyond_rounding(names: Sequence[str], found: Sequence[torch.Tensor], exact: Sequence[torch.Tensor], worst: float) -> str:
    """What of a result is off by more than ``worst`` of its largest number, or ""."""
    for name, x, right in zip(names, found, exact, strict=False):
        if x.shape != right.shape:
            return f"{name} of shape {tuple(x.shape)} instead of {tuple(right.shape)}"
        error = ((x.double() - right).abs().max() / right.abs().max()).item()
        if not error <= worst:  # NaN is wrong
            return f"{name} off by up to {100 * error:.3g} % of the largest"
    return ""


def buffers_for(bytes_per_call: int, device: str) -> int:
    """How many buffers a case rotates over, so that none is in a cache when its turn comes."""
    return min(32, 1 + BEYOND_CACHE[device] // max(1, bytes_per_call))


# ---- statistics ------------------------------------------------------------------------------------------------------------


def ratio(samples: Sequence[float], base: Sequence[float]) -> float:
    """Median over the rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(samples, base, strict=True))


def summary(case: Case, samples: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Rows of the result: one per candidate that ran."""
    rows = []
    for name, values in samples.items():
        row: dict[str, Any] = {"system": name, "microseconds": statistics.median(values)}
        row["spread"] = np.quantile(values, [0.1, 0.9]).tolist()
        row["rounds"] = len(values)
        row["samples"] = list(values)  # as measured, round by round
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
    """Moments on a device and the time between them: events of its stream on CUDA, where nothing waits, else the host's clock."""

    def __init__(self, device: str | torch.device):
        self.on_cuda = torch.device(device).type == "cuda"

    def now(self) -> Any:
        if not self.on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, begin: Any, end: Any) -> float:
        if not self.on_cuda:
            return 1e3 * (end - begin)
        end.synchronize()
        return begin.elapsed_time(end)


class OutOfTime(BaseException):
    """Not an Exception: nothing on the way shall take it for the failure of a row."""

    def __init__(self, number: int = signal.SIGALRM) -> None:
        super().__init__(number)
        self.terminated = number == signal.SIGTERM  # else a limit is over


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise :class:`OutOfTime` after so many seconds, wherever the program is, and at SIGTERM. Limits may lie within limits."""

    def stop(number: int, frame: Any) -> None:
        raise OutOfTime(number)

    begin = time.perf_counter()
    around = signal.setitimer(signal.ITIMER_REAL, 0)[0]  # seconds that an outer limit leaves; 0 without one
    seconds = min(seconds, around or math.inf)
    before = {number: signal.signal(number, stop) for number in (signal.SIGALRM, signal.SIGTERM)}
    try:
        if seconds < math.inf:  # and again, should it be raised where Python can only print it
            signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6), 1.0)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
        if around:
            signal.setitimer(signal.ITIMER_REAL, max(around - (time.perf_counter() - begin), 1e-6), 1.0)


class Sampler:
    """Takes one sample, in microseconds per call, of a candidate."""

    def __init__(self, case: Case, device: str):
        self.case, self.device = case, device
        self.calls = 100 if case.host else case.buffers
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
        clock = Clock("cuda")
        # The first sample, which is thrown away, finds out how long; again and again would add up for a call that waits.
        held = min(1.3 * self.queueing.get(id(candidate), 0), 0.1)
        torch.cuda._sleep(int(2e9 * held) + 100_000)  # cycles; no GPU runs much above 2 GHz
        self._restore(candidate)
        self.cold.max()  # read, not written: dirty lines would be written back on the candidate's time
        begin = time.perf_counter()
        start = clock.now()
        kept = [candidate.call(i) for i in range(self.calls)]
        stop = clock.now()
        self.queueing.setdefault(id(candidate), time.perf_counter() - begin)
        milliseconds = clock.milliseconds(start, stop)
        del kept
        return milliseconds / self.calls * 1e3


def interleave(
    candidates: dict[str, Candidate], sample: Callable[[Candidate], float], rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Samples of every candidate, one a round, until there are ``rounds`` or, from the fifth on, ``seconds`` have passed.

    Each round has its own random order, so that none always follows the same neighbour; the same at every run.
    """
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    names, begin, order = list(candidates), time.perf_counter(), random.Random(0)
    for done in range(rounds):
        if done >= 5 and time.perf_counter() - begin > seconds:
            break
        for name in order.sample(names, len(names)):
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


def reason(error: BaseException, allowed: float) -> str:
    """Why a candidate is left out."""
    if isinstance(error, OutOfTime):
        return f"not ready after {allowed:.0f} s" if allowed > 0 else "no time left"
    return "not installed" if isinstance(error, ModuleNotFoundError) else first_line(error)


def prepare(make: Callable[[], Candidate], device: str) -> tuple[Candidate, dict[str, Any]]:
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


def measure(
    case: Case, device: str, rounds: int, seconds: float, patience: float = math.inf, until: float = math.inf
) -> dict[str, Any]:
    """A case of the result: its rows, and why each candidate that did not run did not. Our own candidates must run.

    Others must be compiled and checked within ``patience`` seconds, and before the clock (``time.perf_counter``) says ``until``.
    """
    if min(patience, until) < math.inf:
        importlib.import_module("torch._dynamo")  # an import that the clock cuts off leaves half a module to all later candidates
    candidates: dict[str, Candidate] = {}
    seen: dict[str, dict[str, Any]] = {}
    absent: dict[str, str] = {}
    scale = 1.0
    if case.bytes:
        candidates[COPY], scale = copy_candidate(case, device)
    for name, make in case.candidates.items():
        begin = time.perf_counter()
        allowed = math.inf if name.startswith(OURS) else min(patience, until - begin)
        try:
            with time_limit(allowed):
                candidates[name], seen[name] = prepare(make, device)
        except (Exception, OutOfTime) as error:
            if name.startswith(OURS) or getattr(error, "terminated", False):
                raise
            absent[name] = reason(error, allowed)
            if device == "cuda":
                gc.collect()
                torch.cuda.empty_cache()
        spent = time.perf_counter() - begin
        print(f"{spent:7.1f} s  {case.name}: {name} {absent.get(name, 'ready')}", file=sys.stderr, flush=True)
        if name in seen:
            seen[name]["seconds_to_prepare"] = spent
    sampler = Sampler(case, device)
    for candidate in candidates.values():
        sampler.sample(candidate)
    before = device_state(device)
    samples = interleave(candidates, sampler.sample, rounds, seconds)
    state = {"before": before, "after": device_state(device)}
    if case.bytes:
        samples[COPY] = [scale * value for value in samples[COPY]]
    rows = summary(case, samples)
    for row in rows:
        row.update(seen.get(row["system"], {}))
    return {"name": case.name, "facts": case.facts, "rows": rows, "absent": absent, "state": state}


# ---- what it ran on --------------------------------------------------------------------------------------------------------


def output_of(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=Path(__file__).parent)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def cpu_name() -> str:
    found = re.search(r"model name\s*:\s*(.+)", read_text("/proc/cpuinfo"))
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
        "variables": {name: value for name, value in os.environ.items() if name.startswith("LIGER_")},  # they choose its kernels
        "peers": {name: version for name, peer in peers.items() if (version := peer.version())},
    }
    if device == "cuda":
        facts["cuda"] = torch.version.cuda
        facts["driver"] = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]
    return facts


SENSORS = {  # what nvidia-smi calls it; older drivers say clocks_throttle_reasons
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "power_watts": "power.draw",
    "temperature_c": "temperature.gpu",
    "throttle_reasons": "clocks_event_reasons.active",
}


def device_state(device: str) -> dict[str, Any]:
    """Clocks, power, temperature and why the clocks are held back, now: a GPU that throttles makes other figures.

    On the CPU the load and the mean clock. Without the tools to ask, what they would have said is left out.
    """
    if device != "cuda":
        mhz = [float(found) for found in re.findall(r"cpu MHz\s*:\s*([\d.]+)", read_text("/proc/cpuinfo"))]
        load = {"load": os.getloadavg()[0]} if hasattr(os, "getloadavg") else {}
        return load | ({"cpu_mhz": statistics.fmean(mhz)} if mhz else {})
    uuid = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "uuid", None)
    place = f"GPU-{uuid}" if uuid else str(torch.cuda.current_device())
    return read_sensors(
        lambda names: output_of("nvidia-smi", "-i", place, f"--query-gpu={names}", "--format=csv,noheader,nounits")
    )


def read_sensors(ask: Callable[[str], str]) -> dict[str, Any]:
    """:data:`SENSORS` by name, as numbers where they are numbers."""
    names = ",".join(SENSORS.values())
    line = ask(names) or ask(names.replace("clocks_event_reasons", "clocks_throttle_reasons"))
    values = [value.strip() for value in line.split("\n")[0].split(",")]
    if len(values) != len(SENSORS):
        return {}
    return {name: float(value) if re.fullmatch(r"[\d.]+", value) else value for name, value in zip(SENSORS, values, strict=True)}


def read_text(path: str) -> str:
    return Path(path).read_text() if Path(path).is_file() else ""


def slug(device: str, name: str) -> str:
    """``cpu``, or the part of a GPU's name that people use: ``h200``, ``rtx_4090``."""
    if device == "cpu":
        return "cpu"
    words = [word for word in re.findall(r"[a-z0-9]+", name.lower()) if word not in ("nvidia", "tesla", "geforce", "gpu")]
    return "_".join(words[:2] if words[0].isalpha() else words[:1])
