"""What every op must have: a benchmark, here; a sanitizer's case, test_sanitize.py; a smoke test, test_smoke.py."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from op_table import OPS

BENCH = Path(__file__).resolve().parents[1] / "bench"
# No benchmark of their own, and why. One that gets a benchmark leaves this list.
NOT_MEASURED = {
    "cross_entropy_stats": "cross_entropy with return_stats",
    "packed_labels": "microseconds, in every step of end-to-end",
    "packed_metadata": "microseconds, in every step of end-to-end",
    "packed_forest": "microseconds, once a batch",
    "document_sums": "reads T numbers, beside a T x V product",
    "linear_cross_entropy_stats": "linear_cross_entropy with return_stats",
}

# What a file of bench/ calls on the way to what it measures.
ON_THE_WAY = {"shared_prefix.py": {"packed_metadata", "packed_forest"}}


def names_used(source: str) -> set[str]:
    """Functions of packops, ops of torch.ops.packops, and their names as strings (for getattr), that a program mentions."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
    return found


def benchmarks_of(name: str) -> list[str]:
    wanted = {OPS[name].function.__name__, name}
    if name.endswith("cross_entropy_stats"):
        wanted = {name}
    files = [path for path in sorted(BENCH.glob("*.py")) if name not in ON_THE_WAY.get(path.name, ())]
    return [path.name for path in files if wanted & names_used(path.read_text())]


@pytest.mark.parametrize("name", OPS)
def test_every_op_has_a_benchmark(name):
    """Or a reason why not."""
    assert bool(benchmarks_of(name)) != (name in NOT_MEASURED), benchmarks_of(name) or f"no file of bench/ calls {name}"


def test_names_are_found():
    source = 'packops.attention(q); torch.ops.packops.rope; getattr(packops, "gated_linear")'
    assert {"attention", "rope", "gated_linear"} <= names_used(source)
    assert "attention" not in names_used("# packops.attention")
