"""compute-sanitizer: how it is run, the errors that are planted for each of its tools, and what its logs say.

``sanitize.py`` has the cases and puts the results into the GPU record.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gpu_record

SCRIPT = Path(__file__).with_name("sanitize.py")
TOOL = "PACKOPS_SANITIZER"  # the variable that tells the script which tool it runs under
ERROR_STATUS = 99  # of the sanitizer, when it found something
# How many findings are printed. racecheck's are told apart one by one; a kernel that reads nothing but garbage fills a disk.
PRINTED = {"racecheck": 0, "memcheck": 100, "synccheck": 100, "initcheck": 100}  # 0: all


def run_sanitizer(tool: str, log: Path, *arguments: str, limit: float) -> int | None:
    """``sanitize.py`` under a tool, its output in ``log``; the exit status, or None if it was stopped after ``limit`` seconds."""
    sanitizer = ["compute-sanitizer", f"--tool={tool}", f"--error-exitcode={ERROR_STATUS}", f"--print-limit={PRINTED[tool]}"]
    environment = {**os.environ, TOOL: tool, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "CUDA_LAUNCH_BLOCKING": "1"}
    command = [*sanitizer, sys.executable, str(SCRIPT), *arguments]
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the sanitizer and what it runs
            process.wait()
            return None


# --------------------------------------------------------------------------------------------------------------------------------
# Planted errors


@dataclasses.dataclass(frozen=True)
class Planted:
    """An error in a copy of ``csrc/rms_norm.cu``: ``old``, which is there once, becomes ``new``. ``tool`` must say ``message``
    about the function ``where``."""

    tool: str
    old: str
    new: str
    message: str
    where: str = "rms_norm_kernel"
    backward: bool = False  # the pass that shows it

    def plant(self, csrc: Path) -> None:
        source = csrc / "rms_norm.cu"
        text = source.read_text()
        if text.count(self.old) != 1:
            raise ValueError(f"{self.old!r} is {text.count(self.old)} times in {source}, not once")
        source.write_text(text.replace(self.old, self.new))


BARRIER = "  else __syncthreads();\n"  # after the warps' sums
DRIVER = Path(__file__).with_name("planted_errors.cu")
PLANTED = {
    "rows are written 2^32 rows further on": Planted(
        "memcheck",
        "T* out = static_cast<T*>(p.out) + row * p.columns;",
        "T* out = static_cast<T*>(p.out) + (row << 32) * p.columns;",
        r"Invalid __global__ write of size 16 bytes",
    ),
    "sums are read before they are written": Planted(
        "racecheck", BARRIER, "", r"Race reported between", "(rms_norm_kernel|team_sum)"
    ),
    # Not a barrier of the block in half of each warp: synccheck of CUDA 13.0 does not report it on an H200.
    "a thread waits for others than itself": Planted(
        "synccheck",
        BARRIER,
        BARRIER.replace("__syncthreads", "__syncwarp(0xfffffffe), __syncthreads"),
        r"Barrier error detected\. Invalid arguments",
    ),
    "a block's share of the weight's gradient is not written": Planted(
        "initcheck",
        "partial[c] = sum;",
        "if (blockIdx.x == 0) partial[c] = sum;",
        r"Uninitialized __global__ memory read of size 4 bytes",
        "weight_gradient_kernel",
        backward=True,
    ),
}


def compile_planted(name: str, folder: Path) -> Path:
    """A copy of the kernel with that error, as a library for the GPU of this machine, or for Hopper where there is none."""
    home = gpu_record._build.find_cuda_home()
    if home is None:
        raise RuntimeError("no nvcc, so no error can be planted: set CUDA_HOME or put nvcc on PATH")
    arch = ".".join(map(str, torch.cuda.get_device_capability())) if torch.cuda.is_available() else "9.0"
    csrc, library = folder.absolute() / "csrc", folder.absolute() / "planted.so"
    shutil.rmtree(csrc, ignore_errors=True)
    shutil.copytree(gpu_record.ROOT / "csrc", csrc)
    PLANTED[name].plant(csrc)
    config = gpu_record._build.read_config(csrc)
    defines = [f"-D{define}" for define in config["defines"] + config["cuda_defines"]]
    flags = ["-shared", *config["nvcc_flags"], *defines, f"-I{csrc}", *gpu_record._build.arch_flags([arch])]
    subprocess.run([home / "bin" / "nvcc", *flags, "-o", library, DRIVER], check=True)
    return library


def run_planted(name: str, library: Path) -> int:
    """In this process; memory as the cases have it, from torch's allocator."""
    rows, columns = 20, 4096  # a row takes a whole block
    x, grad, weight = (torch.ones(n, columns, device="cuda") for n in (rows, rows, 1))
    out, weight_grad = torch.empty_like(x), torch.empty_like(weight)
    partial = torch.empty(rows, columns, device="cuda")  # of at most so many blocks
    tensors: list[Tensor] = [x, grad, weight, out, partial, weight_grad]
    run = ctypes.CDLL(str(library)).packops_planted
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
    error = run(*pointers, ctypes.c_int64(rows), ctypes.c_int64(columns), ctypes.c_bool(PLANTED[name].backward))
    print(f"planted, {name}: CUDA error {error}", flush=True)
    return 0


def found_planted(name: str, text: str, status: int | None) -> bool:
    """Whether a run says that the tool found the error, where it was planted."""
    planted = PLANTED[name]
    there = rf"========= .*{planted.message}.*(\n=========.*){{0,9}}?\b{planted.where}\b"
    return status == ERROR_STATUS and re.search(there, text) is not None


# --------------------------------------------------------------------------------------------------------------------------------
# Logs

# Copies that complete at an mbarrier (csrc/common/ptx.cuh), and the kernels that have a ring of them.
RINGS = {"cp_async_bulk": {"resident_kernel"}, "cp_async_4_zfill": {"long_joint_kernel", "long_split_kernel"}}
ACCESS = re.compile(r"(Read|Write) access at (.+?)\+0x[0-9a-f]+(?: in (\S+?):(\d+))?(?= |$)")


def excusable(hazard: str) -> list[str] | None:
    """The places that read what a ring's copies wrote, if that is all that this hazard is about; else None.

    racecheck takes a raw copy for a store by the thread that asks for it. Where the copies are issued in a loop it does not
    see that mbarriers order them with what other warps read; FlashAttention-4 describes the same (AI/RACECHECK_TMA_HAZARD.md in
    its repository). Only such pairs are excused, each with its line, and ``gpu_record.EXCUSED_HAZARDS`` says how many there are:
    the emulator runs these copies late and out of order, and finds real ones.
    """
    accesses = [ACCESS.search(line) for line in hazard.splitlines() if " access at " in line]
    if len(accesses) < 2 or not all(accesses):
        return None
    for copy, ring_kernels in RINGS.items():
        copies = [re.search(rf"\b{copy}\(", access[2]) is not None and access[1] == "Write" for access in accesses]
        if any(copies[0] == other for other in copies[1:]):
            continue
        readers = [access for access, is_copy in zip(accesses, copies, strict=True) if not is_copy]
        kernels = {kernel for access in readers for kernel in re.findall(r"\b\w+_kernel\b", access[2])}
        if all(access[1] == "Read" for access in readers) and kernels <= ring_kernels:
            return [place_of(access) for access in readers]
    return None


def place_of(access: re.Match) -> str:
    """Where an access is, in words that stay while lines move: its file and the text of its line, or its function."""
    function, file, line = access[2], access[3], access[4]
    if file is None:
        return re.sub(r"[<(].*", "", function.removeprefix("void ").replace("<unnamed>", "{}")).replace("{}", "<unnamed>")
    sources = [path for path in gpu_record._build.source_files(gpu_record.ROOT / "csrc") if path.name == Path(file).name]
    lines = sources[0].read_text().splitlines() if sources else []
    return f"{Path(file).name}: {lines[int(line) - 1].strip() if int(line) <= len(lines) else f'line {line}'}"


def races(text: str) -> tuple[int, int, Counter[str]]:
    """How many hazards racecheck reports, how many of them are excused, and the readers of these by place."""
    hazards = re.split(r"^========= (?:Error|Warning): Race reported between ", text, flags=re.MULTILINE)[1:]
    readers = [places for places in map(excusable, hazards) if places]
    return len(hazards), len(readers), Counter(place for places in readers for place in places)


def read_log(text: str, status: int | None) -> dict[str, Any]:
    """Errors and cases of one run. A run that did not reach its end, or whose summary is missing, never counts as clean."""
    ran = re.search(r"^(\d+) cases ran on ", text, re.MULTILINE)
    summary = re.search(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard.*\((\d+) error", text)
    errors = int(summary[1] or summary[2]) if summary else -1
    found, excused, places = races(text)
    # Hazards may be warnings alone: those may leave the status as it is.
    expected = {0} if not found else {ERROR_STATUS} if summary and int(summary[1] or summary[3]) else {0, ERROR_STATUS}
    if summary and summary[2] and found == errors:
        errors -= excused
    if errors == 0 and (status not in expected or ran is None):
        errors = -1
    result = {"errors": errors, "cases": int(ran[1]) if ran else len(re.findall(r"^case ", text, re.MULTILINE))}
    return {**result, "excused": dict(sorted(places.items()))} if places else result


def findings(text: str, most: int = 6000) -> str:
    """What the tool says first, which is what happened; the rest follows from it. With the last case that had passed."""
    lines = text.splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith("=========") and "COMPUTE-SANITIZER" not in line), 0)
    passed = [line for line in lines[:first] if line.startswith("case ")][-1:]
    # The host's frames are always the same: Python calling an op.
    told = [line for line in lines[first:] if line.startswith("=========") and "Host Frame" not in line]
    return "\n".join(passed + (told or lines[-40:]))[:most]
