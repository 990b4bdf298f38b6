"""``tests/gpu_record.json``: which ``csrc/`` was tested on which GPU, and what came of it.

Most machines that run this suite have no GPU. The record carries what a machine with one has seen to those without, and says by
the digest of ``csrc/`` whether it still speaks of the same kernels. ``make test-gpu`` writes its ``tests``, ``make sanitize`` its
``sanitizer``.
"""

from __future__ import annotations

import datetime
import importlib.util
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PATH = ROOT / "tests" / "gpu_record.json"

# By its path, because the record must be readable where packops is not built.
_spec = importlib.util.spec_from_file_location("packops_build", ROOT / "python" / "packops" / "_build.py")
_build = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_build)


def current_digest() -> str:
    return _build.source_digest(ROOT / "csrc")


def read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.is_file() else None


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
    commit = _run("git", "rev-parse", "HEAD")
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
        "commit": commit or None,
    }


def _write(path: Path, part: str, content: dict[str, Any]) -> dict[str, Any]:
    """Replace one part of the record. Parts seen with other sources are dropped: one record speaks of one ``csrc/``."""
    digest = current_digest()
    record = read(path) or {}
    if record.get("csrc_sha256") != digest:
        record = {}
    record = {"csrc_sha256": digest, **{k: v for k, v in record.items() if k != "csrc_sha256"}, **environment(), part: content}
    path.write_text(json.dumps(record, indent=2) + "\n")
    return record


def merge_tests(path: Path, outcomes: dict[str, dict[str, int]], selection: str) -> dict[str, Any]:
    kinds = ("passed", "failed", "skipped", "out_of_memory")
    counts = {where: {kind: outcomes[where].get(kind, 0) for kind in kinds} for where in outcomes}
    return _write(path, "tests", {**counts, "selection": selection or "everything"})


def merge_sanitizer(path: Path, results: dict[str, Any]) -> dict[str, Any]:
    return _write(path, "sanitizer", results)


def problems(path: Path) -> list[str]:
    """Why the record does not vouch for the present ``csrc/``; empty if it does."""
    record = read(path)
    if record is None:
        return [f"there is no {path.name}: the CUDA kernels of this checkout have no recorded GPU run"]
    if record["csrc_sha256"] != current_digest():
        return [f"{path.name} speaks of other sources: csrc/ was changed after its run on {record['device']} ({record['date']})"]
    found = []
    tests = record.get("tests")
    if tests is None:
        found.append(f"{path.name} has no test run, only a sanitizer run")
    else:
        if tests["selection"] != "everything":
            found.append(f"{path.name} is of a partial run: {tests['selection']}")
        for kind in ("failed", "skipped", "out_of_memory"):
            if tests["gpu"][kind]:
                found.append(f"{path.name}: {tests['gpu'][kind]} GPU tests {kind.replace('_', ' ')}")
        if not tests["gpu"]["passed"]:
            found.append(f"{path.name}: no GPU test passed")
    sanitizer = record.get("sanitizer")
    if sanitizer is None:
        found.append(f"{path.name} has no compute-sanitizer run")
    else:
        found += [f"{path.name}: {tool}: {result['errors']} errors" for tool, result in sanitizer.items() if result["errors"]]
    return found


def describe(path: Path) -> str:
    """One or more lines for the terminal summary."""
    found = problems(path)
    if found:
        return "GPU record: " + "; ".join(found) + "."
    record = read(path)
    excused = sum(result.get("excused", 0) for result in record["sanitizer"].values())
    return (
        f"GPU record: these sources passed {record['tests']['gpu']['passed']} GPU tests on {record['device']} "
        f"(torch {record['torch']}, driver {record['driver']}, {record['date']}), compute-sanitizer clean"
        + (f" but for {excused} hazards that tests/sanitize.py excuses." if excused else ".")
    )
