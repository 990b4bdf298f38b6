"""The GPU record tells the truth about itself."""

from __future__ import annotations

import json

import pytest

import gpu_record

GOOD = {
    "device": "a GPU",
    "date": "2026-01-01",
    "torch": "2.10",
    "driver": "1",
    "tests": {"gpu": {"passed": 9, "failed": 0, "skipped": 0, "out_of_memory": 0}, "selection": "everything"},
    "sanitizer": {"memcheck": {"errors": 0, "cases": 3}},
}


def test_record_vouches_for_the_present_kernels(loud):
    """No failure, because a machine without a GPU cannot mend it; but nobody shall overlook it."""
    for problem in gpu_record.problems(gpu_record.PATH):
        loud(problem)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({}, None),
        ({"csrc_sha256": "0" * 64}, "other sources"),
        ({"tests": None}, "no test run"),
        ({"tests": {**GOOD["tests"], "selection": "-k rope"}}, "partial run: -k rope"),
        ({"tests": {**GOOD["tests"], "gpu": {"passed": 9, "failed": 1, "skipped": 0, "out_of_memory": 0}}}, "1 GPU tests failed"),
        ({"tests": {**GOOD["tests"], "gpu": {"passed": 0, "failed": 0, "skipped": 0, "out_of_memory": 0}}}, "no GPU test passed"),
        ({"sanitizer": None}, "no compute-sanitizer run"),
        ({"sanitizer": {"memcheck": {"errors": 2, "cases": 3}}}, "memcheck: 2 errors"),
    ],
)
def test_problems(tmp_path, change, complaint):
    path = tmp_path / "record.json"
    path.write_text(json.dumps({"csrc_sha256": gpu_record.current_digest(), **GOOD, **change}))
    found = gpu_record.problems(path)
    if complaint is None:
        assert found == []
        assert "passed 9 GPU tests on a GPU" in gpu_record.describe(path)
    else:
        assert len(found) == 1
        assert complaint in found[0]
        assert complaint in gpu_record.describe(path)


def test_no_record(tmp_path):
    assert "no recorded GPU run" in gpu_record.problems(tmp_path / "absent.json")[0]
