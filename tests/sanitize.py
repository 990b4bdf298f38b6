"""Runs every CUDA kernel on small, nasty inputs under NVIDIA's compute-sanitizer, and puts the result into the GPU record.

    python tests/sanitize.py                    all tools
    python tests/sanitize.py memcheck           one tool
    python tests/sanitize.py --cases            the cases alone, without a sanitizer (it then needs a GPU, but no sanitizer)

memcheck: accesses out of bounds. racecheck: shared-memory races. synccheck: divergent barriers. initcheck: reads of memory that
nobody wrote. The allocator's cache is off, because inside its big blocks an overrun looks legal.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
CASES: list[Callable[[], Iterator[str]]] = []


def cases(function: Callable[[], Iterator[str]]) -> Callable[[], Iterator[str]]:
    """Registers a generator that runs one small case after the other and yields the name of each."""
    CASES.append(function)
    return function


# --------------------------------------------------------------------------------------------------------------------------------
# Cases: at most some ten thousand elements each. Odd sizes, rows that are not 16-byte aligned, labels and positions out of range.


@cases
def rope() -> Iterator[str]:
    import torch

    import packops

    cos, sin = packops.rope_table(24, 20, device="cuda")
    tokens = 23
    bad_ids = torch.randint(-3, 25, (tokens,), device="cuda")
    documents = torch.tensor([0, 4, 4, 19], dtype=torch.int32, device="cuda")
    broken = torch.tensor([3, 2**40, -7, 11], device="cuda")
    for dtype in (torch.bfloat16, torch.float32):
        for shift in (0, 1, 3):
            storage = torch.randn(tokens * 4 * 36 + 8, device="cuda", dtype=dtype)
            both = storage[shift : shift + tokens * 4 * 36].view(tokens, 4, 36)
            for name, options in {
                "positions": {"position_ids": bad_ids},
                "documents": {"cu_seqlens": documents},
                "broken documents": {"cu_seqlens": broken},
                "M-RoPE": {"position_ids": bad_ids.expand(3, tokens), "mrope_section": [4, 5, 3]},
            }.items():
                for interleaved in (False, True):
                    q, k = (x.detach().requires_grad_() for x in (both[:, :3], both[:, 3:]))
                    out = packops.apply_rope(q, k, cos, sin, rotary_offset=6, interleaved=interleaved, **options)
                    torch.autograd.backward(out, [torch.ones_like(o) for o in out])
                    packops.apply_rope(both[:, :3].clone(), None, cos, sin, rotary_offset=6, inplace=True, **options)
                    for heads in ((1, 1), (3, 1)):  # a norm per head, or across heads
                        weights = [torch.ones(36 * h, device="cuda", dtype=dtype, requires_grad=True) for h in heads]
                        out = packops.apply_qk_norm_rope(
                            q, k, *weights, cos, sin, eps=1e-6, rotary_offset=6, interleaved=interleaved, **options
                        )
                        torch.autograd.backward(out, [torch.ones_like(o) for o in out])
                    yield f"{name}, {dtype}, offset {shift}, interleaved {interleaved}"
    for dim in (64, 512):  # aligned rows: the widest vectors; 512 is normalised by a whole block
        q, weight = (torch.randn(*s, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True) for s in ((tokens, 5), ()))
        table = packops.rope_table(dim, tokens, device="cuda")
        packops.apply_rope(q, None, *table, cu_seqlens=documents)[0].sum().backward()
        packops.apply_qk_norm_rope(q, None, weight, None, *table, eps=1e-6, cu_seqlens=documents)[0].sum().backward()
        yield f"head_dim {dim}"


def run_cases() -> int:
    import torch

    torch.manual_seed(0)
    count = 0
    for function in CASES:
        for name in function():
            torch.cuda.synchronize()
            print(f"case {function.__name__}: {name}", flush=True)
            count += 1
    print(f"{count} cases ran on {torch.cuda.get_device_name()}", flush=True)
    return 0 if count else 1


# --------------------------------------------------------------------------------------------------------------------------------
# The driver.


def run_tool(tool: str, log: Path) -> dict[str, int | float]:
    sanitizer = ["compute-sanitizer", f"--tool={tool}", "--error-exitcode=99", "--print-limit=20"]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "CUDA_LAUNCH_BLOCKING": "1"}
    started = time.monotonic()
    command = [*sanitizer, sys.executable, __file__, "--cases"]
    with log.open("w") as file:
        status = subprocess.run(command, stdout=file, stderr=file, env=environment).returncode
    seconds = round(time.monotonic() - started, 1)
    return {**read_log(log.read_text(), status), "seconds": seconds}


def read_log(text: str, status: int) -> dict[str, int]:
    """Errors and cases of one run. A run that did not reach its end, or whose summary is missing, never counts as clean."""
    ran = re.search(r"^(\d+) cases ran on ", text, re.MULTILINE)
    summary = re.search(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard", text)
    errors = int(summary[1] or summary[2]) if summary else -1
    if errors == 0 and (status != 0 or ran is None):
        errors = -1
    return {"errors": errors, "cases": int(ran[1]) if ran else len(re.findall(r"^case ", text, re.MULTILINE))}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tools", nargs="*", default=[], metavar="TOOL", help=f"any of {', '.join(TOOLS)}; all by default")
    parser.add_argument("--cases", action="store_true", help="run the cases in this process")
    parser.add_argument("--logs", type=Path, default=Path("build/sanitize"), help="folder of the full logs")
    arguments = parser.parse_args()
    if unknown := set(arguments.tools) - set(TOOLS):
        parser.error(f"unknown tool {', '.join(sorted(unknown))}; choose from {', '.join(TOOLS)}")
    if arguments.cases:
        return run_cases()
    if shutil.which("compute-sanitizer") is None:
        print("compute-sanitizer is not on PATH; it comes with the CUDA toolkit", file=sys.stderr)
        return 2
    import gpu_record

    arguments.logs.mkdir(parents=True, exist_ok=True)
    results = {}
    for tool in arguments.tools or TOOLS:
        log = arguments.logs / f"{tool}.log"
        print(f"{tool} ...", end=" ", flush=True)
        result = results[tool] = run_tool(tool, log)
        print(f"{result['errors']} errors in {result['cases']} cases, {result['seconds']} s ({log})", flush=True)
        if result["errors"]:
            print(log.read_text()[-6000:])
    if set(results) == set(TOOLS):
        gpu_record.merge_sanitizer(gpu_record.PATH, results)
    return 1 if any(result["errors"] for result in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
