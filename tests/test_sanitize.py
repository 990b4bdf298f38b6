"""The sanitizer driver never takes a broken run for a clean one."""

from __future__ import annotations

import pytest

import sanitize

CLEAN = "case a: x\ncase a: y\n2 cases ran on NVIDIA H200\n========= ERROR SUMMARY: 0 errors\n"


@pytest.mark.parametrize(
    ("text", "status", "errors", "cases"),
    [
        (CLEAN, 0, 0, 2),
        (CLEAN, 99, -1, 2),
        (CLEAN.replace("0 errors", "3 errors"), 99, 3, 2),
        (CLEAN.replace("ERROR SUMMARY: 0 errors", "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"), 0, 0, 2),
        (CLEAN.replace("ERROR SUMMARY: 0 errors", "RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)"), 99, 1, 2),
        (CLEAN.replace("========= ERROR SUMMARY: 0 errors", ""), 0, -1, 2),
        (CLEAN.replace("2 cases ran on NVIDIA H200\n", ""), 0, -1, 2),  # died between two cases
        ("========= Error: Device not supported\n", 1, -1, 0),
    ],
)
def test_read_log(text, status, errors, cases):
    assert sanitize.read_log(text, status) == {"errors": errors, "cases": cases}


def test_findings_begin_with_the_first():
    text = "========= COMPUTE-SANITIZER\ncase a: x\n" + "========= Invalid __global__ read\n=========  Host Frame: main\n"
    text += "terminate called\n" + "========= ERROR SUMMARY: 1 error\n"
    assert sanitize.findings(text).splitlines() == [
        "case a: x",
        "========= Invalid __global__ read",
        "========= ERROR SUMMARY: 1 error",
    ]
    assert sanitize.findings("no tool ran") == "no tool ran"


def test_every_case_runs(device):
    """Also where there is no sanitizer, so that a case that breaks is seen before someone waits for a GPU."""
    assert sanitize.run_cases(device) == 0
