"""The examples run as they stand, on a CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import packops

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
ARGUMENTS = {"jit_your_kernel.py": ["--rows", "3", "--vocab", "5000"]}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_example(name, tmp_path):
    if name.startswith("jit_"):
        pytest.importorskip("platformdirs", reason="needs packops[jit]")
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(packops.__file__).parents[1]),
        "PACKOPS_CACHE_DIR": str(tmp_path / "cache"),
        "PACKOPS_CUDA": "0",
    }
    command = [sys.executable, str(EXAMPLES / name), *ARGUMENTS.get(name, [])]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    if name == "jit_your_kernel.py":
        rows = [line.split() for line in result.stdout.splitlines() if line.strip().startswith(("1024", "256"))]
        assert len(rows) == 2
        assert float(rows[0][-2]) == 0  # the installed kernel against itself
        assert float(rows[1][-2]) < 1e-5  # the edited one against it
