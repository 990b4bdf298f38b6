"""The examples run as they stand, on a CPU."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import packops

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
FEW = ["--steps", "3", "--documents", "60"]
ARGUMENTS = {
    "jit_your_kernel.py": ["--rows", "3", "--vocab", "5000"],
    "hf_trainer.py": FEW,
    "trl_sft.py": FEW,
    "accelerate_loop.py": FEW,
    "compiled_steps.py": FEW,
    "dpo_step.py": FEW,
    "grpo_step.py": FEW,
    "shared_prefix.py": FEW,
}
# what an example needs beyond packops
NEEDS = {
    "jit_your_kernel.py": ["platformdirs"],
    "hf_trainer.py": ["transformers", "accelerate", "tokenizers", "tqdm"],
    "trl_sft.py": ["transformers", "accelerate", "tokenizers", "tqdm", "trl", "datasets"],
    "accelerate_loop.py": ["transformers", "accelerate", "tokenizers", "tqdm"],
    "compiled_steps.py": ["transformers", "tokenizers", "tqdm"],
    "dpo_step.py": ["transformers", "tokenizers", "tqdm"],
    "grpo_step.py": ["transformers", "tokenizers", "tqdm"],
    "shared_prefix.py": ["transformers", "tokenizers", "tqdm"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_example(name, tmp_path):
    for package in NEEDS.get(name, []):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed, so nothing is shown about examples/{name}")
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(packops.__file__).parents[1]),
        "PACKOPS_CACHE_DIR": str(tmp_path / "cache"),
        "PACKOPS_CUDA": "0",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, str(EXAMPLES / name), *ARGUMENTS.get(name, [])]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    if name in ("hf_trainer.py", "trl_sft.py"):
        first, last = re.search(r"^loss ([\d.]+) -> ([\d.]+)$", result.stdout, re.MULTILINE).groups()
        assert float(last) < float(first)
    if name == "dpo_step.py":
        first, last = re.search(r"^loss ([\d.]+) -> ([\d.]+)$", result.stdout, re.MULTILINE).groups()
        assert float(last) < float(first)
    if name in ("compiled_steps.py", "dpo_step.py", "grpo_step.py", "shared_prefix.py"):
        assert "gradients agree" in result.stdout
    if name == "compiled_steps.py":
        assert "\n1 graph; " in result.stdout
    if name == "shared_prefix.py":
        assert float(re.search(r"([\d.]+) times fewer", result.stdout)[1]) > 3
    if name == "jit_your_kernel.py":
        rows = [line.split() for line in result.stdout.splitlines() if line.strip().startswith(("1024", "256"))]
        assert len(rows) == 2
        assert float(rows[0][-2]) == 0  # the installed kernel against itself
        assert float(rows[1][-2]) < 1e-5  # the edited one against it


def test_blocks_that_cannot_be_are_refused_first(tmp_path):
    command = [sys.executable, str(EXAMPLES / "jit_your_kernel.py"), "--blocks", "256", "-1"]
    environment = {**os.environ, "PYTHONPATH": str(Path(packops.__file__).parents[1]), "PACKOPS_CACHE_DIR": str(tmp_path)}
    result = subprocess.run(command, capture_output=True, text=True, env={**environment, "PACKOPS_DISABLE_JIT": "1"})
    assert result.returncode == 2
    assert result.stderr.endswith("error: --blocks, --rows and --vocab must be positive\n")
