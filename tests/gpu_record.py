"""``tests/gpu_record.json``: which ``csrc/`` was tested on which GPU, and what came of it.

    python tests/gpu_record.py                       does the record vouch for the present csrc/? Exit status 1 if not
    python tests/gpu_record.py --override REASON     note that no GPU was to be had for the present csrc/

Most machines that run this suite have no GPU. The record carries what a machine with one has seen to those without, and says by
the digest of ``csrc/`` whether it still speaks of the same kernels. It has three parts, each with the environment it was seen in:
the GPU tests of a build for the card (``tests.card``), those of a build that the card's driver compiles from PTX of 8.0
(``tests.ptx``: the kernels of older and of other cards), and compute-sanitizer (``sanitizer``). ``make test-gpu`` writes the
first two, ``make sanitize`` the third.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PATH = ROOT / "tests" / "gpu_record.json"

# What a whole run has at least. A run with less has lost a part of the suite: a folder, a mark, a package that is not installed.
FEWEST_TESTS = 1950
FEWEST_CASES = 270
BUILDS = {"card": "as built for the card", "ptx": "as PTX of 8.0"}
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
# GPU tests that a machine may skip: it has too few GPUs, or the test is of a dtype that CUDA does not take.
EXCUSED_SKIPS = (r"needs \d+ GPUs: found \d+", r"(fp64|float64) is for the CPU")
EXCUSED_PTX_SKIPS = (r"neither this GPU nor the loaded code has wgmma, .*",)  # PTX of 8.0 is older than the instruction
# The hazards of racecheck that tests/sanitize.py excuses, by the line of the reader: "<kernel's file>: <its source line>".
# A hazard elsewhere, or another number of them, is looked at by someone before it is written down here.
# These: a thread reads what a copy brought, a chunk of logits or lse and delta. The tool does not see that it has arrived.
EXCUSED_HAZARDS: dict[str, int] = {
    "attention_long_split.cuh: const float even = delta[8 * n + 2 * (lane % 4)], odd = delta[8 * n + 2 * (lane % 4) + 1];": 24,
    "attention_long_joint.cuh: x, g, scores, [&](int, int n, int i) { return lse[column(n, i)]; },": 44,
    "packops::<unnamed>::long_joint_kernel": 52,
    "ce_loss_resident.cuh: for (int k = 0; k < kPerThread; k++) raw[k] = chunk[threadIdx.x + k * Role::kReducers];": 86,
}

# By its path, because the record must be readable where packops is not built.
_spec = importlib.util.spec_from_file_location("packops_build", ROOT / "python" / "packops" / "_build.py")
_build = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_build)


# --------------------------------------------------------------------------------------------------------------------------------
# What the record speaks of


def current_digest() -> str:
    return _build.source_digest(ROOT / "csrc")


def python_digests() -> dict[str, str]:
    """The sources beside ``csrc/`` that a GPU run depends on. Their change does not void the record; it is named."""
    tests = [path for path in (ROOT / "tests").glob("*.py") if re.search(r"\bmark\.gpu\b|\bdevice\b|cuda", path.read_text())]
    return {"python/packops": _digest((ROOT / "python" / "packops").rglob("*.py")), "the GPU tests": _digest(tests)}


def _digest(paths) -> str:
    return _build.digest_of(sorted(paths), ROOT)


def build_of(built_for: str, capability: str) -> str:
    """``card`` for a library with machine code for the GPU, ``ptx`` for one with nothing but 8.0 for it; else RuntimeError."""
    archs = built_for.split("_")
    if capability in {re.sub(r"[af]?(\+PTX)?$", "", arch) for arch in archs}:
        return "card"
    if archs == ["8.0+PTX"]:
        return "ptx"
    raise RuntimeError(f'the GPU is of {capability} and the library was built for {built_for}: build for it, or for "8.0+PTX"')


def _run(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def environment() -> dict[str, Any]:
    import torch

    import packops

    info = packops._C.build_info()
    if info["sources"] != current_digest():
        raise RuntimeError("the loaded library was built from other sources than csrc/ has now: run `make build` first")
    return {
        "device": torch.cuda.get_device_name(),
        "compute_capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "driver": _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "built_with_cuda": info["cuda"],
        "built_for": info["cuda_archs"],
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": _run("git", "rev-parse", "HEAD") or None,
    }


# --------------------------------------------------------------------------------------------------------------------------------
# Writing


def read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.is_file() else None


def _present(path: Path) -> dict[str, Any]:
    """The record as far as it speaks of the present ``csrc/``: parts seen with other sources are dropped."""
    digest = current_digest()
    record = read(path) or {}
    return record if record.get("csrc_sha256") == digest else {"csrc_sha256": digest}


def _write(path: Path, record: dict[str, Any]) -> dict[str, Any]:
    path.write_text(json.dumps(record, indent=2) + "\n")
    return record


def merge_tests(
    path: Path, outcomes: dict[str, dict[str, int]], skips: dict[str, int], selection: str
) -> tuple[str, dict[str, Any]]:
    """Put one run of the tests into its part of the record. ``skips``: how many GPU tests were skipped, by reason."""
    seen = environment()
    build = build_of(seen["built_for"], seen["compute_capability"])
    kinds = ("passed", "failed", "skipped", "out_of_memory")
    counts = {where: {kind: outcomes[where].get(kind, 0) for kind in kinds} for where in outcomes}
    part = {**counts, "skips": dict(sorted(skips.items())), "selection": selection or "everything"}
    record = _present(path)
    record["tests"] = {**record.get("tests", {}), build: {"environment": seen, "python": python_digests(), **part}}
    return build, _write(path, record)


def merge_sanitizer(path: Path, seen: dict[str, Any], tools: dict[str, Any], planted: dict[str, bool]) -> dict[str, Any]:
    """``planted``: whether each tool found the errors that were planted for it.

    Tools that are not named keep what they said of the same sources in the same environment, ``seen`` (:func:`environment`).
    """
    record = _present(path)
    part = record.get("sanitizer") or {}
    dated = ("date", "commit")
    if {**part.get("environment", {}), **dict.fromkeys(dated)} != {**seen, **dict.fromkeys(dated)}:
        part = {"tools": {}, "planted": {}}
    tools, planted = {**part["tools"], **tools}, {**part["planted"], **planted}
    order = [tool for tool in TOOLS if tool in tools]
    record["sanitizer"] = {
        "environment": seen,
        "tools": {tool: tools[tool] for tool in order},
        "planted": {tool: planted[tool] for tool in order},
    }
    return _write(path, record)


def override(path: Path, reason: str) -> dict[str, Any]:
    """Note why the present ``csrc/`` has no record. The next change of ``csrc/``, and the next GPU run, end it."""
    if not reason.strip():
        raise ValueError("an override needs a reason")
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    record = read(path) or {}
    record["override"] = {"csrc_sha256": current_digest(), "reason": reason.strip(), "date": today}
    return _write(path, record)


# --------------------------------------------------------------------------------------------------------------------------------
# Reading


def problems(path: Path, parts: tuple[str, ...] = ("card", "ptx", "sanitizer")) -> list[str]:
    """Why the record does not vouch for the present ``csrc/``; empty if it does."""
    record = read(path)
    if record is None:
        return [f"there is no {path.name}: the CUDA kernels of this checkout have no recorded GPU run"]
    if record.get("csrc_sha256") != current_digest():
        return [f"{path.name} speaks of other sources: csrc/ was changed after its run"]
    tests = record.get("tests") or {}
    found = []
    for build in (build for build in BUILDS if build in parts):
        if build not in tests:
            found.append(f"no run of the GPU tests {BUILDS[build]}")
        else:
            found += [f"GPU tests {BUILDS[build]}: {problem}" for problem in _problems_of_tests(tests[build], build)]
    if "sanitizer" in parts:
        found += _problems_of_sanitizer(record["sanitizer"]) if record.get("sanitizer") else ["no compute-sanitizer run"]
    return found


def _problems_of_tests(part: dict[str, Any], build: str) -> list[str]:
    found = []
    seen, gpu = part["environment"], part["gpu"]
    if build_of(seen["built_for"], seen["compute_capability"]) != build:
        found.append(f"were built for {seen['built_for']}")
    if part["selection"] != "everything":
        found.append(f"a partial run: {part['selection']}")
    found += [f"{gpu[kind]} {kind.replace('_', ' ')}" for kind in ("failed", "out_of_memory") if gpu[kind]]
    if sum(part["skips"].values()) != gpu["skipped"]:
        found.append(f"{gpu['skipped']} skipped, and reasons for {sum(part['skips'].values())}")
    for reason, count in part["skips"].items():
        excuses = EXCUSED_SKIPS + (EXCUSED_PTX_SKIPS if build == "ptx" else ())
        if not any(re.fullmatch(excuse, reason) for excuse in excuses):
            found.append(f"{count} skipped: {reason}")
    if gpu["passed"] < FEWEST_TESTS:
        found.append(f"only {gpu['passed']} passed, a whole run has {FEWEST_TESTS} and more")
    return found


def _problems_of_sanitizer(part: dict[str, Any]) -> list[str]:
    seen = part["environment"]
    found = []
    if build_of(seen["built_for"], seen["compute_capability"]) != "card":
        found.append(f"compute-sanitizer saw a build for {seen['built_for']}")
    for tool in TOOLS:
        result = part["tools"].get(tool)
        if result is None:
            found.append(f"{tool}: no run")
            continue
        if result["errors"]:
            found.append(f"{tool}: {result['errors']} errors")
        found += [f"{tool}: {name} did not finish: {why}" for name, why in result.get("unfinished", {}).items()]
        if result["cases"] < FEWEST_CASES:
            found.append(f"{tool}: only {result['cases']} cases, a whole run has {FEWEST_CASES} and more")
        if not part["planted"].get(tool):
            found.append(f"{tool}: did not find the errors that are planted for it")
        excused, expected = result.get("excused", {}), EXCUSED_HAZARDS if tool == "racecheck" else {}
        found += [
            f"{tool}: {excused.get(place, 0)} hazards excused at `{place}`, tests/gpu_record.py has {expected.get(place, 0)}"
            for place in sorted({*excused, *expected})
            if excused.get(place, 0) != expected.get(place, 0)
        ]
    if len({result["cases"] for result in part["tools"].values()}) > 1:
        found.append("compute-sanitizer: the tools saw different numbers of cases")
    return found


def excuse(path: Path) -> str | None:
    """The committed reason why the present ``csrc/`` has no record, if there is one."""
    noted = (read(path) or {}).get("override")
    return f"{noted['reason']} ({noted['date']})" if noted and noted["csrc_sha256"] == current_digest() else None


def changed_since(path: Path) -> list[str]:
    """What else a GPU run depends on and was changed after it."""
    now, tests = python_digests(), (read(path) or {}).get("tests") or {}
    return [name for name in now if any(part["python"].get(name) != now[name] for part in tests.values())]


def describe(path: Path) -> str:
    """One line: the last of `make test` where there is no GPU."""
    found = problems(path)
    if found:
        reason = excuse(path)
        return f"GPU record: {'; '.join(found)}." + (f" Overridden: {reason}." if reason else "")
    record = read(path)
    tests, sanitizer = record["tests"], record["sanitizer"]
    seen = tests["card"]["environment"]
    excused = sum(sum(result.get("excused", {}).values()) for result in sanitizer["tools"].values())
    cases = sanitizer["tools"]["memcheck"]["cases"]
    changed = changed_since(path)
    return (
        "GPU record: these sources passed "
        + " and ".join(f"{tests[build]['gpu']['passed']} GPU tests {BUILDS[build]}" for build in BUILDS)
        + f" on {seen['device']} (torch {seen['torch']}, driver {seen['driver']}, {seen['date']}), "
        + f"compute-sanitizer clean in {cases} cases"
        + (f" but for {excused} hazards that tests/sanitize.py excuses" if excused else "")
        + (f"; changed since: {' and '.join(changed)}." if changed else ".")
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--override", metavar="REASON", help="commit the record afterwards; see CONTRIBUTING.md")
    arguments = parser.parse_args()
    if arguments.override is not None:
        override(PATH, arguments.override)
    print(describe(PATH))
    return 1 if problems(PATH) and not excuse(PATH) else 0


if __name__ == "__main__":
    sys.exit(main())
