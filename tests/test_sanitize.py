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


READER = "Read access at void packops::<unnamed>::resident_kernel<float, (int)0, (bool)0>(packops::CeLossParams, int)+0x10"
COPY = "Write access at packops::bulk_load(void *, const void *, unsigned int, unsigned long *)+0x15b0 in ptx.cuh:96"
OTHER = "Write access at void packops::<unnamed>::resident_kernel<float, (int)0, (bool)0>(packops::CeLossParams, int)+0x90"


@pytest.mark.parametrize(
    ("hazards", "errors", "excused"),
    [
        ([(READER, COPY, COPY)], 0, 1),
        ([(COPY, READER)], 0, 1),
        ([(READER, COPY), (READER, OTHER)], 1, 1),
        ([(READER, COPY, OTHER)], 1, 0),  # one of the two is a race
        ([(COPY, COPY)], 1, 0),
    ],
)
def test_hazards_of_bulk_copies_are_counted_apart(hazards, errors, excused):
    log = "case a: x\n1 cases ran on NVIDIA H100\n"
    for first, *others in hazards:
        log += f"========= Error: Race reported between {first}\n"
        log += "".join(f"=========     and {other} [8 hazards]\n" for other in others) + "========= \n"
    log += f"========= RACECHECK SUMMARY: {len(hazards)} hazards displayed ({len(hazards)} errors, 0 warnings)\n"
    assert sanitize.read_log(log, 99) == {"errors": errors, "cases": 1, **({"excused": excused} if excused else {})}
    # Hazards that are counted but not shown are not excused.
    assert sanitize.read_log(log.replace(f"SUMMARY: {len(hazards)}", "SUMMARY: 9"), 99)["errors"] == 9


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
